"""Weights in the names and layouts of transformers 5, converted to those that mlx-lm 0.32 reads.

transformers saves most models in the layout of the hub, which mlx-lm knows. The tables hold the
exceptions, by the module of mlx-lm that reads them; what fits already passes through unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_finetune.base.errors import UserError
from lora_finetune.model_folder.config import model_family

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Weights = dict[str, mx.array]

# Weights for images and sounds, which few modules of mlx-lm have a place for.
NOT_OF_TEXT = re.compile(
    r"(model\.)?(vision_\w+|visual|audio_\w+|embed_vision|embed_audio|mm_projector"
    r"|multi_modal_projector)\."
)

# (mlx-lm's module, a pattern in a name, its replacement); all that match are applied in turn.
NAMES = [
    ("gpt2", r"^transformer\.", ""),
    ("gemma3n", r"^model\.(?!language_model\.)", "model.language_model."),
    ("lfm2-vl", r"^model\.language_model\.", "language_model.model."),
    ("llama4", r"^(model|lm_head)\.", r"language_model.\1."),
    ("nanochat", r"^model\.embed_tokens\.", "transformer.wte."),
    ("nanochat", r"^model\.layers\.", "transformer.h."),
    ("nanochat", r"\.self_attn\.([qkv])_proj\.", r".attn.c_\1."),
    ("nanochat", r"\.self_attn\.o_proj\.", ".attn.c_proj."),
    ("nanochat", r"\.mlp\.fc1\.", ".mlp.c_fc."),
    ("nanochat", r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ("olmo_hybrid", r"\.attention_layer_norm\.", ".input_layernorm."),
    ("olmo_hybrid", r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ("kimi_linear", r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),
    ("kimi_k25", r"^language_model\.model\.blocks\.", "language_model.model.layers."),
    ("gpt_oss", r"\.experts\.(gate_up|down)_proj$", r".experts.\1_proj.weight"),
]  # fmt: skip

# (mlx-lm's module, a pattern in a name): arrays whose last two axes may be the other way round.
SWAPPED = [
    ("gpt_oss", r"\.experts\.(gate_up|down)_proj$"),
    ("lfm2-vl", r"\.conv\.conv\.weight$"),
    ("qwen3_vl_moe", r"\.experts\.(gate_up|down)_proj$"),
]


def in_mlx_layout(weights: Weights, model: nn.Module, settings: dict[str, Any]) -> Weights:
    """The weights of a folder as the `sanitize` of mlx-lm's model reads them.

    `settings` are those of the text model in mlx-lm's words. Raises UserError where the weights
    have a head, and the model has no place for it.
    """
    family = model_family(type(model))
    wanted = dict(tree_flatten(model.parameters()))
    is_tied = settings.get("tie_word_embeddings") is not False
    if not is_tied and not the_only(HEADS, wanted) and has_own_head(weights):
        raise UserError(
            "the weights have an lm_head that differs from the embedding, and mlx-lm always ties "
            "the two in this kind of model, so it would compute something else; take another model"
        )
    groups = settings.get("n_group") or settings.get("num_expert_group") or 1
    swapped = [pattern for name, pattern in SWAPPED if name == family]
    found = {}
    for name, array in weights.items():
        if NOT_OF_TEXT.match(name) and name not in wanted:
            continue
        if any(re.search(p, name) for p in swapped) and is_swapped(name, array, settings):
            array = mx.swapaxes(array, -1, -2)
        for module, pattern, replacement in NAMES:
            if module == family:
                name = re.sub(pattern, replacement, name)
        # Experts outside the chosen groups score 0 in mlx-lm, −∞ in transformers: the same choice
        # as long as no bias is negative, and one number added to all of them does not change it.
        if groups > 1 and name.endswith(("e_score_correction_bias", ".expert_bias")):
            array = array - mx.minimum(array.min(), 0)
        found[name] = array
    return FAMILIES[family](found, settings) if family in FAMILIES else found


def is_swapped(name: str, array: mx.array, settings: dict[str, Any]) -> bool:
    """Whether an array's last two axes are the other way round than mlx-lm reads them."""
    if ".conv." in name:  # (channels, 1, kernel); MLX has (channels, kernel, 1)
        return array.shape[-2] == 1
    # gpt-oss is saved in one way only. Qwen3-VL-MoE is (experts, in, out) on the hub, which mlx-lm
    # turns itself, and (experts, out, in) by transformers 5.
    inner = settings.get("moe_intermediate_size")
    if inner is None:
        return True
    hidden = settings["hidden_size"]
    return array.shape[-2:] == ((2 * inner, hidden) if "gate_up" in name else (hidden, inner))


# --- By family ----------------------------------------------------------------------------------


def drop_identity_experts(weights: Weights, settings: dict[str, Any]) -> Weights:
    """LongCat's identity experts ("zero experts") are saved with weights that nothing reads."""

    def is_read(name: str) -> bool:
        expert = re.search(r"\.experts\.(\d+)\.", name)
        return not expert or int(expert[1]) < settings["n_routed_experts"]

    return {name: array for name, array in weights.items() if is_read(name)}


def rename_linear_outputs(weights: Weights, _: dict[str, Any]) -> Weights:
    """transformers names the output of Bailing's linear attention as that of its full attention."""
    for name in [name for name in weights if name.endswith(".attention.A_log")]:
        attention = name.removesuffix("A_log")
        if f"{attention}dense.weight" in weights:
            weights[f"{attention}o_proj.weight"] = weights.pop(f"{attention}dense.weight")
    return weights


def cut_convolutions(weights: Weights, settings: dict[str, Any]) -> Weights:
    """OLMo's convolutions of q, k and v are saved by transformers 5.24 as three equal thirds."""
    keys = settings["linear_num_key_heads"] * settings["linear_key_head_dim"]
    for name in [name for name in weights if name.endswith(".q_conv1d.weight")]:
        names = [name.replace(".q_conv1d.", f".{which}_conv1d.") for which in "qkv"]
        joined = mx.concatenate([weights[name] for name in names])
        weights |= zip(names, mx.split(joined, [keys, 2 * keys]), strict=True)
    return weights


def stack_experts(weights: Weights, settings: dict[str, Any]) -> Weights:
    """Qwen 3.5's experts, saved one by one, become (experts, out, in), gate and up joined."""
    ending, numbers = ".0.down_proj.weight", range(settings["num_experts"])
    for path in [n.removesuffix(ending) for n in weights if n.endswith(f".experts{ending}")]:
        gate, up, down = (
            mx.stack([weights.pop(f"{path}.{n}.{kind}_proj.weight") for n in numbers])
            for kind in ("gate", "up", "down")
        )
        weights[f"{path}.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        weights[f"{path}.down_proj"] = down
    return weights


FAMILIES = {
    "bailing_moe_v3": rename_linear_outputs,
    "longcat_flash": drop_identity_experts,
    "olmo_hybrid": cut_convolutions,
    "qwen3_5_moe": stack_experts,
}


# --- Heads --------------------------------------------------------------------------------------

HEADS = re.compile(r"(.*\.)?(lm_head|embed_out)\.weight")
EMBEDDINGS = re.compile(r".*(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight")


def the_only(pattern: re.Pattern, names: Iterable[str]) -> str | None:
    """The one name that matches, None where none or several do."""
    found = [name for name in names if pattern.fullmatch(name)]
    return found[0] if len(found) == 1 else None


def has_own_head(weights: Weights) -> bool:
    """Whether the weights have an lm_head that differs from the embedding.

    transformers 5 uses such a head whatever `tie_word_embeddings` says.
    """
    head, table = the_only(HEADS, weights), the_only(EMBEDDINGS, weights)
    if not head or not table:
        return False
    same_shape = weights[head].shape == weights[table].shape
    return not same_shape or not mx.array_equal(weights[head], weights[table]).item()


def with_tied_head(model: nn.Module, weights: Weights) -> Weights:
    """The weights with a copy of the embedding as lm_head, where mlx-lm's model cannot tie them."""
    head = the_only(HEADS, dict(tree_flatten(model.parameters())))
    table = the_only(EMBEDDINGS, weights)
    if not head or not table or head in weights:
        return weights
    table, head = table.removesuffix("weight"), head.removesuffix("weight")
    kinds = [kind for kind in ("weight", "scales", "biases") if table + kind in weights]
    return weights | {head + kind: weights[table + kind] for kind in kinds}


def read_weights(folder: Path) -> Weights:
    """The arrays of a folder's weights by name; MLX reads their numbers only when they are used."""
    weights = {}
    for file in folder.glob("model*.safetensors"):
        weights |= mx.load(str(file))
    return weights
