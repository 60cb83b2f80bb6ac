#!/bin/sh
# datasets keeps a JSON column that holds objects or lists beside texts as JSON; a text which is itself
# JSON ("5", "007", "true", "null", "[1]") comes back as the number, truth value, null or list.
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
ANSWERS = ["서울", "5", "007", "1e3", "3.10", "true", "null", "[1]", '"따옴표"', {"값": 5}, ["가", "나"]]
with open("answers.jsonl", "w") as file:
    file.writelines(json.dumps({"answer": answer}, ensure_ascii=False) + "\n" for answer in ANSWERS)


def load(kind, path):
    return datasets.load_dataset(kind, data_files=path, split="train")


read = load("json", "answers.jsonl")
print("features:", read.features)
print("in the file:", ANSWERS)
print("read:       ", read["answer"][:])
read.save_to_disk("saved")
saved = datasets.load_from_disk("saved")["answer"][:]
print("from save_to_disk the same:", saved == read["answer"][:])
read.to_parquet("answers.parquet")
parquet = load("parquet", "answers.parquet")["answer"][:]
print("from to_parquet the same:  ", parquet == read["answer"][:])
mapped = read.map(lambda row: {"answer": "5" if row["answer"] == "서울" else row["answer"]})
print("map gives the text '5' for the first; it is then:", repr(mapped[0]["answer"]))
expected = ["서울", 5, 7, 1000.0, 3.1, True, None, [1], "따옴표", {"값": 5}, ["가", "나"]]
raise SystemExit(int(not read["answer"][:] == saved == parquet == expected or mapped[0]["answer"] != 5))
PYTHON
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 venv/bin/python show.py
