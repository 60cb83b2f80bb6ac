#!/bin/sh
# llama.cpp's convert_lora_to_gguf.py writes lora_alpha alone, whatever else sets a layer's scale in
# PEFT's adapter_config.json: `use_rslora` and `alpha_pattern` are dropped without a word. llama.cpp
# then scales each layer by alpha / rank.
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
import peft
import transformers

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
transformers.LlamaForCausalLM(config).save_pretrained("base")
wrong = []
for name, options in [
    ("plain", {}),
    ("use_rslora", {"use_rslora": True}),
    ("alpha_pattern", {"alpha_pattern": {"q_proj": 64}}),
]:
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], **options)
    model = peft.get_peft_model(base, lora)
    model.save_pretrained(name)
    scale = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    script = "llama_cpp_python-0.3.36/vendor/llama.cpp/convert_lora_to_gguf.py"
    command = [sys.executable, script, "--base", "base", "--outfile", f"{name}.gguf", name]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    warnings = [line for line in said.splitlines() if line.startswith(("WARNING", "ERROR"))]
    found = gguf.GGUFReader(f"{name}.gguf").fields["adapter.lora.alpha"].contents() / 4
    print(f"{name}: PEFT's scale {scale}, the file's alpha / rank {found}, warnings: {warnings}")
    if found != scale and not warnings:
        wrong.append(name)
raise SystemExit(wrong != ["use_rslora", "alpha_pattern"])
PYTHON
echo "llama-cpp-python 0.3.36's llama.cpp, peft 0.21.2, transformers 5.24.0"
venv/bin/python show.py
