#!/bin/sh
# mlx-lm generates from one prompt with a dynamic rope scaling, and raises at two prompts at a time
# (as in batch_generate): their offsets are an array, which the rope compares as if it were a number.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
"$folder/venv/bin/python" - <<'PROGRAM'
import mlx_lm
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import llama

print("mlx-lm", mlx_lm.__version__, "- a Llama with random weights")
config = dict(
    model_type="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=32,
    num_attention_heads=2, num_key_value_heads=1, vocab_size=64, rms_norm_eps=1e-5,
    max_position_embeddings=128, rope_theta=1e4,
)
raised = []
for kind in ("linear", "dynamic"):
    scaling = {"rope_type": kind, "factor": 2.0}
    model = llama.Model(llama.ModelArgs.from_dict(config | {"rope_scaling": scaling}))
    for prompts in ([[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]):
        generator = BatchGenerator(model, max_tokens=4)
        generator.insert(prompts)
        tokens = 0
        try:
            while responses := generator.next_generated():
                tokens += len(responses)
            print(f"{kind}, prompts: {len(prompts)}, tokens generated: {tokens}")
        except ValueError as error:
            print(f"{kind}, prompts: {len(prompts)}, ValueError: {error}")
            raised.append((kind, len(prompts)))
raise SystemExit(int(raised != [("dynamic", 2)]))
PROGRAM
