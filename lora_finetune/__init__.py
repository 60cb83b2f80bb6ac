"""The rooms behind the scripts. Import this before mlx: it loads a fast BLAS on a Linux CPU."""

import os
import sys

from lora_finetune.base import linux_cpu  # noqa: F401

# Hide PyTorch, where it is installed, from transformers: seconds and 180 MB for nothing here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
if "torch" not in sys.modules:
    sys.modules["torch"] = None
    from transformers.utils import is_torch_available

    is_torch_available()  # which remembers its answer
    del sys.modules["torch"]
