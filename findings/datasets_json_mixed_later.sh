#!/bin/sh
# datasets: where the first file of a JSON set (or the first 10 MB of it) has texts only and a later one
# also an object, the later texts come back in quotes, with each Korean letter as its code.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
cat > show.py <<'PYTHON'
import json

import datasets

print("datasets", datasets.__version__)
datasets.disable_progress_bars()


def write(path, answers):
    with open(path, "w") as file:
        file.writelines(json.dumps({"answer": answer}, ensure_ascii=False) + "\n" for answer in answers)


def read(*paths):
    return datasets.load_dataset("json", data_files=list(paths), split="train")["answer"][:]


write("1.jsonl", ["서울"])
write("2.jsonl", [{"도시": "대구"}, "부산"])
write("large.jsonl", ["서울"] * 530_000 + [{"도시": "대구"}, "부산"])
print("1.jsonl and 2.jsonl:", after := read("1.jsonl", "2.jsonl"))
print("2.jsonl and 1.jsonl:", before := read("2.jsonl", "1.jsonl"))
print("both in a file of 11 MB, the last two:", (large := read("large.jsonl"))[-2:])
changed = [json.dumps({"도시": "대구"}, separators=(",", ":")), json.dumps("부산")]
assert before == [{"도시": "대구"}, "부산", "서울"]
assert after == ["서울", *changed], "this has changed"
assert large[-2:] == changed, "this has changed"
PYTHON
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 venv/bin/python show.py
