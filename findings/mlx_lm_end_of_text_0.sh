#!/bin/sh
# mlx-lm takes the end-of-text ids of generation_config.json before those of config.json, but not
# where it is the id 0, which it takes for none: generation does not end there.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cd "$folder"
cat > show.py <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx_lm
from mlx_lm.utils import load_config

Path("config.json").write_text(json.dumps({"model_type": "gpt_neox", "eos_token_id": 2}))
print("mlx-lm", mlx_lm.__version__, "- config.json says 2")
found = []
for said in (1, 0, [0]):
    Path("generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    found.append(load_config(Path("."))["eos_token_id"])
    print("generation_config.json says", said, "and the end of text is", found[-1])
sys.exit(found != [1, 2, [0]])
PYTHON
venv/bin/python show.py
