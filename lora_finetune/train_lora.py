"""Run train_lora.py of the folder above; both command lines do the same."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(root)
    runpy.run_path(str(root / "train_lora.py"), run_name="__main__")
