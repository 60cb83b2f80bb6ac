#!/bin/sh
# datasets: a cast of a column of texts to Json looks at its first five only. The order of the rows
# decides whether "5" stays a text or becomes a number, and whether the column can be read at all.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
cat > show.py <<'PYTHON'
import datasets

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
found = []
for texts in (["1", "2", "3", "4", "5"], ["서울", "1", "2", "3", "4", "5"], ["1", "2", "3", "4", "5", "서울"]):
    cast = datasets.Dataset.from_dict({"answer": texts}).cast_column("answer", datasets.Json())
    try:
        found.append(cast["answer"][:])
        print(texts, "->", found[-1])
    except ValueError as error:
        found.append("raised")
        print(texts, "-> the cast is done; reading raises ValueError:", error)
raise SystemExit(int(found != [[1, 2, 3, 4, 5], ["서울", "1", "2", "3", "4", "5"], "raised"]))
PYTHON
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 venv/bin/python show.py
