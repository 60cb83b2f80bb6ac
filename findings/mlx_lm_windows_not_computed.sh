#!/bin/sh
# mlx-lm does not compute the sliding window of Qwen2, Gemma 2, Phi-3, Starcoder2 and others:
# a token sees all before it, whatever sliding_window and use_sliding_window say.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
"$folder/venv/bin/python" - <<'PROGRAM'
import mlx.core as mx
import mlx_lm
from mlx_lm.models import qwen2

config = dict(
    model_type="qwen2", hidden_size=64, num_hidden_layers=2, intermediate_size=128,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=128,
    use_sliding_window=True, sliding_window=4, max_window_layers=0,
)
mx.random.seed(0)
model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
tokens = mx.random.randint(3, 120, (1, 40))
other = mx.array(tokens)
other[0, 0] = 1  # 39 tokens back; two layers with a window of 4 reach 6 tokens back
difference = mx.abs(model(tokens)[0, -1] - model(other)[0, -1]).max().item()
print(f"mlx-lm {mlx_lm.__version__}, qwen2, sliding_window 4 in both layers")
print(f"change of the last logits by a token 39 back: {difference:.2e}")
print("expected: 0")
raise SystemExit(0 if difference > 0 else 1)
PROGRAM
