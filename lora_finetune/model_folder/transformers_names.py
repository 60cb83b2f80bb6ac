"""Names of arrays and modules in transformers, from those that MLX has for them.

Three sets of names: MLX's, of the parameters of mlx-lm's models; the checkpoint's, of the arrays in
a folder that transformers saved; and those of transformers' modules in memory, which PEFT adapts.
The tables were made from transformers 5.24.0 (its `conversion_mapping`, and the folders it saves)
and mlx-lm 0.32.2 (its `sanitize`), and proved in transformers and PEFT 0.21.2.
"""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx

# The types of models for which the tables hold: without a rule, a name is the same.
MODEL_TYPES = """
    afmoe apertus bailing_hybrid cohere cohere2 dbrx deepseek_v2 deepseek_v3 deepseek_v32 dots1
    ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 gemma gemma2 gemma3 gemma3_text
    gemma3n_text gemma4 gemma4_text gemma4_unified glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa
    gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium
    hunyuan_v1_dense internlm3 iquestcoder jamba kimi_k25 kimi_linear laguna lfm2 lfm2_moe
    lfm2_vl llama llama4 llama4_text llava longcat_flash mellum mimo_v2_flash minicpm3
    minimax_m2 minimax_m3_vl ministral ministral3 mistral mistral3 mistral4 mixtral
    muse_glimmer nanochat nemotron nemotron_h olmo2 olmo3 olmo_hybrid olmoe phi phi3 phimoe
    qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
    qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma seed_oss smollm3 solar_open
    stablelm starcoder2 youtu
""".split()  # noqa: SIM905

# Those whose weights mlx-lm leaves out, or puts in layouts from which nobody has found back.
ONE_WAY = {"dbrx", "ernie4_5_moe", "gpt_oss", "llama4_text", "longcat_flash", "olmo_hybrid"}

TEXT = r"^language_model\.model\."
W_NAMES = r"mixtral|minimax_m[23](_vl)?|phimoe|kimi_linear|lfm2_moe"

# (model types, a pattern in MLX's name, what the checkpoint has in its place), in this order.
CHECKPOINT = [
    (r".*_text", r"^language_model\.", ""),
    (r"gemma3n_text", r"^model\.language_model\.", "model."),
    (r"qwen2(_5)?_vl", TEXT, "model."),
    (r"(qwen3_vl|qwen3_5)(_moe)?|gemma4(_unified)?|lfm2_vl", TEXT, "model.language_model."),
    (r"muse_glimmer", r"^model\.", "model.language_model."),
    (r"gpt_neox", r"^model\.embed_out(?=\.|$)", "embed_out"),
    (r"gpt_neox", r"^model\.h\.", "gpt_neox.layers."),
    (r"gpt_neox", r"^model\.", "gpt_neox."),
    (r"gptj|gpt2", r"^model\.", "transformer."),
    (r"nanochat", r"^transformer\.wte\.", "model.embed_tokens."),
    (r"nanochat", r"^transformer\.h\.", "model.layers."),
    (r"nanochat", r"\.attn\.c_([qkv])(?=\.|$)", r".self_attn.\1_proj"),
    (r"nanochat", r"\.attn\.c_proj(?=\.|$)", ".self_attn.o_proj"),
    (r"nanochat", r"\.mlp\.c_fc(?=\.|$)", ".mlp.fc1"),
    (r"nanochat", r"\.mlp\.c_proj(?=\.|$)", ".mlp.fc2"),
    (r"bailing_hybrid", r"\.attention\.o_proj(?=\.|$)", ".attention.dense"),
    (r"kimi_linear", r"\.mlp\.", ".block_sparse_moe."),
    (r"kimi_linear", r"\.block_sparse_moe\.e_score_", ".block_sparse_moe.gate.e_score_"),
    (r"kimi_linear", r"\.self_attn\.([qkv])_conv\.conv\.", r".self_attn.\1_conv1d."),
    (r"laguna", r"\.gate\.proj(?=\.|$)", ".gate"),
    (r"laguna", r"\.gate\.e_score_correction_bias$", ".experts.e_score_correction_bias"),
    (r"exaone_moe", r"\.gate\.e_score_correction_bias$", ".e_score_correction_bias"),
    (r"granitemoe(hybrid)?", r"\.switch_mlp\.(gate|up)_proj\.", r".input_linear.\1."),
    (r"granitemoe(hybrid)?", r"\.switch_mlp\.down_proj\.", ".output_linear."),
    (r"granitemoehybrid", r"\.mlp\.(gate|up)_proj(?=\.|$)", r".shared_mlp.input_linear.\1"),
    (r"granitemoehybrid", r"\.mlp\.down_proj(?=\.|$)", ".shared_mlp.output_linear"),
    (r"mistral4", r"\.switch_mlp\.(gate|up)_proj\.weight$", r".experts.gate_up_proj.\1"),
    (r"mistral4", r"\.switch_mlp\.down_proj\.weight$", ".experts.down_proj"),
    (r".*", r"\.switch_mlp\.", ".experts."),
    (r"nemotron_h", r"\.experts\.fc1\.", ".experts.up_proj."),
    (r"nemotron_h", r"\.experts\.fc2\.", ".experts.down_proj."),
    (W_NAMES, r"(\.experts|\.feed_forward)\.gate_proj(?=\.|$)", r"\1.w1"),
    (W_NAMES, r"(\.experts|\.feed_forward)\.down_proj(?=\.|$)", r"\1.w2"),
    (W_NAMES, r"(\.experts|\.feed_forward)\.up_proj(?=\.|$)", r"\1.w3"),
]

# (model types, a pattern in the checkpoint's name, what the module has in its place).
MODULES = [
    (r"qwen2(_5)?_vl", r"^model\.", "model.language_model."),
    (r"gemma3|llava|mistral3|minimax_m3_vl|kimi_k25", TEXT, "model.language_model."),
    (r"nemotron_h", r"^backbone\.", "model."),
    (r"mixtral|minimax_m[23](_vl)?|kimi_linear", r"\.block_sparse_moe\.", ".mlp."),
    (r"bailing_hybrid", r"\.attention\.dense$", ".self_attn.o_proj"),
    (r"bailing_hybrid", r"\.attention\.", ".self_attn."),
    (r"phimoe", r"\.block_sparse_moe\.gate$", ".mlp.router"),
    (r"minimax_m3_vl", r"\.(mlp|shared_experts)\.(gate|up)_proj$", r".\1.gate_up_proj.\2"),
    (r"granitemoe(hybrid)?", r"\.router\.layer$", ".router"),
    (r"exaone", r"^transformer\.h\.(\d+)\.attn\.attention\.", r"model.layers.\1.self_attn."),
    (r"exaone", r"\.self_attn\.out_proj$", ".self_attn.o_proj"),
    (r"exaone", r"^transformer\.h\.(\d+)\.mlp\.", r"model.layers.\1.mlp."),
    (r"exaone", r"\.mlp\.c_fc_0$", ".mlp.gate_proj"),
    (r"exaone", r"\.mlp\.c_fc_1$", ".mlp.up_proj"),
    (r"exaone", r"\.mlp\.c_proj$", ".mlp.down_proj"),
]


def replaced(rules: list[tuple[str, str, str]], model_type: str, names: str) -> str:
    """A name, or several in lines, with the rules of a model type applied one after the other."""
    for types, pattern, replacement in rules:
        if re.fullmatch(types, model_type):
            names = re.sub(pattern, replacement, names, flags=re.MULTILINE)
    return names


def checkpoint_name(model_type: str, name: str) -> str:
    """The name in transformers' checkpoints of an array or module of MLX."""
    return replaced(CHECKPOINT, model_type, name)


def is_unused(model_type: str, path: str) -> bool:
    """Whether PEFT's LoRA of a layer does nothing.

    LongCat's is never called; Laguna's PEFT looks for under a name of its own.
    """
    ends = {"longcat_flash": r"\.router\.classifier", "laguna": r"\.shared_expert\.\w+"}
    return bool(re.search(f"{ends.get(model_type, 'none')}$", path))


def module_name(model_type: str, path: str) -> str:
    """The path in transformers' model of the layer at a path of MLX's."""
    return replaced(MODULES, model_type, checkpoint_name(model_type, path))


def multiplier(config: dict, path: str) -> float:
    """What mlx-lm multiplies a checkpoint's weight by when it loads it; not 1 in Falcon-H1 only."""
    if config["model_type"] != "falcon_h1":
        return 1.0
    gate, down = config["mlp_multipliers"]
    values = {"gate_proj": gate, "down_proj": down, "o_proj": config["attention_out_multiplier"]}
    values |= dict.fromkeys(("q_proj", "k_proj"), config["attention_in_multiplier"])
    return values.get(path.rpartition(".")[2], 1.0)


def is_written_by_mlx(folder: Path) -> bool:
    """Whether MLX wrote the weights of a folder, so that they have the names of its modules."""
    files = map(str, folder.glob("model*.safetensors"))
    return any(mx.load(f, return_metadata=True)[1].get("format") == "mlx" for f in files)
