#!/bin/sh
# datasets, streaming a Parquet file of one row group with batch_size=1000, takes several times the
# file in memory before the first row comes. pyarrow's iter_batches with a buffer takes a part of it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
cat > write.py <<'PYTHON'
import random

import pyarrow
import pyarrow.parquet

random.seed(0)
table = pyarrow.table({"text": [random.randbytes(500).hex() for _ in range(70_000)]})
for name, rows in (("one", 70_000), ("many", 1000)):
    pyarrow.parquet.write_table(
        table, f"{name}.parquet", row_group_size=rows, compression="none", use_dictionary=False
    )
PYTHON
cat > first.py <<'PYTHON'
import resource
import sys

import datasets
import pyarrow.parquet

_, way, path = sys.argv


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


before = peak()
if way == "datasets":
    rows = datasets.load_dataset(
        "parquet", data_files=path, split="train", streaming=True, batch_size=1000
    )
else:
    file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    rows = file.iter_batches(batch_size=1000)
for number, _ in enumerate(rows):
    if number == 0:
        print(round(peak() - before))
PYTHON
venv/bin/pip list 2> /dev/null | grep -E "^(datasets|pyarrow) "
venv/bin/python write.py
export HF_HOME="$folder/hf" HF_HUB_OFFLINE=1
pyarrow=$(venv/bin/python first.py pyarrow one.parquet)
many=$(venv/bin/python first.py datasets many.parquet)
one=$(venv/bin/python first.py datasets one.parquet)
echo "MB more at the first row of a file of 70 MB, batches of 1000 of its 70000 rows:"
echo "- one row group, pyarrow's iter_batches with a buffer of 1 MB: $pyarrow"
echo "- 70 row groups, datasets: $many"
echo "- one row group, datasets: $one"
test "$one" -gt $((3 * many)) && test "$one" -gt $((3 * pyarrow))
