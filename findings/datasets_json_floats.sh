#!/bin/sh
# datasets writes JSON with ten decimals: it reads 1.5e-12 as 0.0 from a file that is one JSON array,
# and from JSON lines where another column is mixed; to_json writes it as 0.0.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
cat > show.py <<'PYTHON'
import json
from pathlib import Path

import datasets

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
NUMBERS = [1.5e-12, 0.1234567890123456]


def read(words, path, text):
    Path(path).write_text(text)
    numbers = datasets.load_dataset("json", data_files=path, split="train")["number"][:]
    print(f"{words}: {numbers}")
    return numbers


print("the numbers:", NUMBERS)
plain = [{"number": number, "other": "a"} for number in NUMBERS]
mixed = [plain[0], plain[1] | {"other": ["a"]}]
found = [
    read("JSON lines", "lines.jsonl", "".join(json.dumps(row) + "\n" for row in plain)),
    read("the same rows in a JSON array", "array.json", json.dumps(plain)),
    read("JSON lines, another column mixed", "mixed.jsonl", "".join(json.dumps(row) + "\n" for row in mixed)),
]
datasets.Dataset.from_dict({"number": NUMBERS}).to_json("written.jsonl")
lines = Path("written.jsonl").read_text().splitlines()
found.append([json.loads(line)["number"] for line in lines])
print("written by to_json:", *lines)
cut = [0.0, 0.123456789]
raise SystemExit(int(found != [NUMBERS, cut, cut, cut]))
PYTHON
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 venv/bin/python show.py
