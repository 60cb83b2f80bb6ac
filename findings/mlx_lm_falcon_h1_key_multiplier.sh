#!/bin/sh
# Falcon-H1 in mlx-lm: key_multiplier, 0.39 in the published models, is never applied to weights as
# they are on the hub.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
"$folder/venv/bin/python" - <<'PROGRAM'
import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models import falcon_h1

config = dict(
    model_type="falcon_h1", hidden_size=64, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, num_hidden_layers=2, vocab_size=128, head_dim=16, mamba_d_ssm=64,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=32, mamba_n_groups=1, mamba_d_conv=4,
)
logits = []
for multiplier in (0.39, 1.0, 5.0):
    mx.random.seed(0)
    model = falcon_h1.Model(falcon_h1.ModelArgs.from_dict(config | {"key_multiplier": multiplier}))
    weights = dict(tree_flatten(model.parameters()))
    hub = {n: a.transpose(0, 2, 1) if "conv1d.weight" in n else a for n, a in weights.items()}
    model.load_weights(list(model.sanitize(hub).items()))
    logits.append(model(mx.arange(3, 43)[None]))
differences = [mx.abs(each - logits[1]).max().item() for each in logits]
print(f"mlx-lm {mlx_lm.__version__}, falcon_h1, key_multiplier 0.39, 1 and 5")
print(f"largest differences of the logits from those with 1: {differences}")
print("expected: other logits with each")
raise SystemExit(0 if max(differences) == 0 else 1)
PROGRAM
