#!/bin/sh
# safetensors' NumPy writer saves an array's memory whatever its strides: a transposed matrix comes
# back with its numbers in another order.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import numpy
import safetensors
import safetensors.numpy

print("safetensors", safetensors.__version__, "numpy", numpy.__version__)
matrix = numpy.arange(6, dtype=numpy.float32).reshape(2, 3).T
safetensors.numpy.save_file({"matrix": matrix}, "a.safetensors")
read = safetensors.numpy.load_file("a.safetensors")["matrix"]
print("saved:", matrix.tolist())
print("read: ", read.tolist())
raise SystemExit(int((read == matrix).all()))
PYTHON
venv/bin/python show.py
