#!/bin/sh
# Gemma 3n in mlx-lm: layers that share the keys and values of an earlier layer use projections of
# their own where there is no cache. So a loss (mlx_lm.lora, perplexity) is of another model than
# the one that generates.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
"$folder/venv/bin/python" - <<'PROGRAM'
import mlx.core as mx
import mlx_lm
from mlx_lm.models import gemma3n
from mlx_lm.models.cache import make_prompt_cache

text = dict(
    model_type="gemma3n_text", hidden_size=64, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, num_hidden_layers=6, vocab_size=128, rms_norm_eps=1e-6, head_dim=16,
    rope_theta=1e6, rope_local_base_freq=1e4, max_position_embeddings=512, sliding_window=64,
    num_kv_shared_layers=2, vocab_size_per_layer_input=128, final_logit_softcapping=30.0,
    layer_types=["sliding_attention", "full_attention"] * 3,
    activation_sparsity_pattern=[0.0] * 6, hidden_size_per_layer_input=32, altup_num_inputs=4,
    altup_coef_clip=120.0, altup_correct_scale=True, altup_active_idx=0, laurel_rank=32,
)
mx.random.seed(0)
model = gemma3n.Model(gemma3n.ModelArgs(model_type="gemma3n", text_config=text))
tokens = mx.random.randint(3, 120, (1, 40))
without = model(tokens)
cached = model(tokens, cache=make_prompt_cache(model))
difference = mx.abs(without - cached).max().item()
print(f"mlx-lm {mlx_lm.__version__}, gemma3n, 40 tokens in one call")
print(f"largest difference of the logits with a cache and without one: {difference:.4f}")
print("expected: below 1e-4, as in mlx-lm's llama")
raise SystemExit(0 if difference > 1e-2 else 1)
PROGRAM
