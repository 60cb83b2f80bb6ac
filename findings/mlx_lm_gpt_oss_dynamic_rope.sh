#!/bin/sh
# mlx-lm's GPT-OSS with a dynamic rope scaling is built, and raises when it is called: the model's
# maximum length is not handed to the rope, which compares None with a number. Llama does hand it on.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
"$folder/venv/bin/python" - <<'PROGRAM'
import mlx.core as mx
import mlx_lm
from mlx_lm.models import gpt_oss, llama

print("mlx-lm", mlx_lm.__version__)
config = dict(
    hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2, head_dim=16,
    num_key_value_heads=1, vocab_size=64, rms_norm_eps=1e-5, max_position_embeddings=128,
    rope_theta=10000, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
)
raised = []
for module in (llama, gpt_oss):
    name = module.__name__.split(".")[-1]
    for kind in ("linear", "dynamic"):
        scaling = {"rope_type": kind, "factor": 2.0}
        settings = config | {"model_type": name, "rope_scaling": scaling}
        if module is llama:
            del settings["layer_types"], settings["sliding_window"]
        model = module.Model(module.ModelArgs.from_dict(settings))
        try:
            print(name, kind, "logits of shape", model(mx.array([[1, 2, 3]])).shape)
        except TypeError as error:
            print(name, kind, "TypeError:", error)
            raised.append((name, kind))
raise SystemExit(int(raised != [("gpt_oss", "dynamic")]))
PROGRAM
