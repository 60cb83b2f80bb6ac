#!/bin/sh
# mlx-lm: a rope_scaling in config.json is read by some models and left out by others, without a word.
# Here the same YaRN by 4 is asked of each; what a layer does is compared with what it does without.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2
"$folder/venv/bin/python" - <<'PYTHON'
import importlib

import mlx.core as mx

SIZES = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, vocab_size=64, rms_norm_eps=1e-5, layer_norm_eps=1e-5, norm_epsilon=1e-5,
    layer_norm_epsilon=1e-5, max_position_embeddings=256, rope_theta=1e4, num_experts=2,
    num_local_experts=2, num_experts_per_tok=1, decoder_sparse_step=1, mlp_only_layers=[],
    moe_intermediate_size=32, norm_topk_prob=True, attention_bias=False, partial_rotary_factor=1.0,
    tie_word_embeddings=True, use_bias=False, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, query_pre_attn_scalar=16.0,
)
YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def turned(name, scaling):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    settings = SIZES | {"model_type": name, "rope_scaling": scaling}
    rope = module.Model(module.ModelArgs.from_dict(settings)).layers[0].self_attn.rope
    return rope(mx.ones((1, 1, 1, 16)), offset=100)


for name in ("llama", "qwen3", "mixtral", "qwen3_moe", "cohere", "gemma", "gemma2", "glm4", "starcoder2"):
    ignored = mx.array_equal(turned(name, None), turned(name, YARN)).item()
    print(f"{name:12}", "leaves the scaling out" if ignored else "scales")
    assert ignored == (name not in ("llama", "qwen3")), "this has changed"
PYTHON
