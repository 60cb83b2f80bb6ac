#!/bin/sh
# transformers saves OLMo-hybrid's convolutions of queries, keys and values cut into three equal
# parts: 86, 86 and 84 channels of what are 64, 64 and 128.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$folder"
cat > show.py <<'PYTHON'
import transformers
from safetensors import safe_open
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

transformers.utils.logging.set_verbosity_error()
print("transformers", transformers.__version__)
keys, values = dict(heads=2, size=32), dict(heads=2, size=64)
config = OlmoHybridConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=2,
    linear_num_key_heads=keys["heads"], linear_key_head_dim=keys["size"],
    linear_num_value_heads=values["heads"], linear_value_head_dim=values["size"],
    rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
)
OlmoHybridForCausalLM(config).save_pretrained("model")
saved = {}
with safe_open("model/model.safetensors", "pt") as file:
    for part in "qkv":
        name = f"model.layers.0.linear_attn.{part}_conv1d.weight"
        saved[part] = file.get_slice(name).get_shape()[0]
print("channels by the configuration:", {"q": 2 * 32, "k": 2 * 32, "v": 2 * 64})
print("channels in model.safetensors:", saved)
raise SystemExit(saved != {"q": 86, "k": 86, "v": 84})
PYTHON
venv/bin/python show.py
