#!/bin/sh
# In huggingface_hub's allow_patterns a * takes slashes too, so "*.json" downloads the JSON files of
# all subfolders (onnx/, checkpoint-500/, original/), where a shell's *.json or Path.glob would not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0
cd "$folder"
cat > show.py <<'PYTHON'
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import filter_repo_objects

names = ["config.json", "onnx/config.json", "checkpoint-500/trainer_state.json", "README.md"]
for name in names:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
by_hub = list(filter_repo_objects(names, allow_patterns=["*.json"]))
by_glob = [str(path) for path in Path().glob("*.json")]
print("huggingface_hub", huggingface_hub.__version__, 'takes for "*.json":', ", ".join(by_hub))
print("Path.glob takes:", ", ".join(by_glob))
sys.exit(by_hub != names[:3] or by_glob != names[:1])
PYTHON
venv/bin/python show.py
