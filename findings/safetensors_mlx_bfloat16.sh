#!/bin/sh
# safetensors.mlx goes by way of NumPy, which has no bfloat16, and can neither read nor write one;
# mx.load reads it. A float64, which safetensors.mlx reads as float32, is what mx.load refuses.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" safetensors==0.8.0 numpy==2.4.6
cd "$folder"
cat > show.py <<'PYTHON'
import mlx.core as mx
import numpy
import safetensors
import safetensors.mlx
import safetensors.numpy

print("safetensors", safetensors.__version__, "mlx", mx.__version__, "numpy", numpy.__version__)
WEIGHTS = {"w": mx.arange(4).astype(mx.bfloat16)}


def tried(words, function, *arguments):
    try:
        read = function(*arguments)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        print(f"{words}: {type(error).__name__}: {error}")
        return type(error)
    print(f"{words}:", "written" if read is None else read["w"])
    return None


mx.save_safetensors("bfloat16.safetensors", WEIGHTS)
with open("bfloat16.safetensors", "rb") as file:
    data = file.read()
safetensors.numpy.save_file({"w": numpy.arange(4.0)}, "float64.safetensors")
found = [
    tried("bfloat16, mx.load", mx.load, "bfloat16.safetensors"),
    tried("bfloat16, safetensors.mlx.load_file", safetensors.mlx.load_file, "bfloat16.safetensors"),
    tried("bfloat16, safetensors.mlx.load", safetensors.mlx.load, data),
    tried("bfloat16, safetensors.mlx.save_file", safetensors.mlx.save_file, WEIGHTS, "b.safetensors"),
    tried("float64, mx.load", mx.load, "float64.safetensors"),
    tried("float64, safetensors.mlx.load_file", safetensors.mlx.load_file, "float64.safetensors"),
]
raise SystemExit(int(found != [None, TypeError, KeyError, ValueError, RuntimeError, None]))
PYTHON
venv/bin/python show.py
