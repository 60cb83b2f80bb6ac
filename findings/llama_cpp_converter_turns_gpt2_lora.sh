#!/bin/sh
# llama.cpp's convert_lora_to_gguf.py swaps A and B of a GPT-2 adapter, as if they were stored like
# GPT-2's own weights (Conv1D), which PEFT's never are. Where the layer is square (attn.c_proj) the
# file fits the base, and adds A^T B^T in place of B A, without a word.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 gguf==0.19.0 \
    sentencepiece==0.2.1
cd "$folder"
venv/bin/pip download -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz
cat > show.py <<'PYTHON'
import subprocess
import sys

import gguf
import numpy as np
import peft
import transformers
from safetensors.numpy import load_file

config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2)
model = transformers.GPT2LMHeadModel(config)
model.save_pretrained("base")
lora = peft.LoraConfig(
    r=4, target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights=False
)
adapted = peft.get_peft_model(model, lora)
adapted.save_pretrained("adapter")
script = "llama_cpp_python-0.3.36/vendor/llama.cpp/convert_lora_to_gguf.py"
command = [sys.executable, script, "--base", "base", "--outfile", "adapter.gguf", "adapter"]
said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
warnings = [line for line in said.splitlines() if line.startswith(("WARNING", "ERROR"))]
in_peft = load_file("adapter/adapter_model.safetensors")
in_gguf = {tensor.name: tensor.data for tensor in gguf.GGUFReader("adapter.gguf").tensors}
(a,) = (array for name, array in in_peft.items() if "lora_A" in name)
(b,) = (array for name, array in in_peft.items() if "lora_B" in name)
(low_a,) = (array for name, array in in_gguf.items() if name.endswith("lora_a"))
(low_b,) = (array for name, array in in_gguf.items() if name.endswith("lora_b"))
print("warnings:", warnings)
print("the file's product is PEFT's B A:  ", np.allclose(low_b @ low_a, b @ a))
print("the file's product is its transpose:", np.allclose(low_b @ low_a, (b @ a).T))
raise SystemExit(not (np.array_equal(low_a, b.T) and np.array_equal(low_b, a.T) and not warnings))
PYTHON
echo "llama-cpp-python 0.3.36's llama.cpp, peft 0.21.2, transformers 5.24.0"
venv/bin/python show.py
