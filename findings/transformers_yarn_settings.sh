#!/bin/sh
# transformers: Mixtral (and any configuration whose head_dim is null) with dynamic, yarn or longrope
# scaling cannot be built: getattr(config, "head_dim", default) is None, not the default. linear and
# llama3 say `or` and work. And where parameters are by kind of layer, YaRN's `truncate` is looked for
# beside the kinds, where it never is.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import Gemma3TextConfig, MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

sizes = dict(hidden_size=64, num_attention_heads=4)
scaling = {"rope_theta": 1e4, "factor": 4.0}
sizes["max_position_embeddings"] = 256
failed = []
for kind in ("linear", "dynamic", "yarn"):
    original = {"original_max_position_embeddings": 64} if kind == "yarn" else {}
    config = MixtralConfig(**sizes, rope_parameters=scaling | {"rope_type": kind} | original)
    try:
        ROPE_INIT_FUNCTIONS[kind](config)
        print("Mixtral,", kind, "works")
    except TypeError as error:
        print("Mixtral,", kind, "fails:", error)
        failed.append(kind)
assert failed == ["dynamic", "yarn"], "this has changed"

found = []
for truncate in (True, False):
    yarn = scaling | {"rope_type": "yarn", "truncate": truncate, "beta_fast": 8.0}
    yarn["original_max_position_embeddings"] = 64
    kinds = {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = Gemma3TextConfig(
        **sizes, head_dim=16, num_hidden_layers=2, rope_parameters=kinds,
        layer_types=["sliding_attention", "full_attention"],
    )
    found.append(ROPE_INIT_FUNCTIONS["yarn"](config, layer_type="full_attention")[0])
    print("Gemma 3, truncate", truncate, found[-1])
assert torch.equal(*found), "this has changed"
PYTHON
