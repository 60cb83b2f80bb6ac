"""Corrections of mlx-lm's models that compute something else than transformers' for a folder.

The lines named are those of mlx-lm 0.32.2, in mlx_lm/models; the reference is transformers 5.24.0.
Models that agree with it are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches import rope
from lora_finetune.mlx_patches.modules import arguments, modules_named, parameters_of, replace
from lora_finetune.mlx_patches.settings import put_activations
from lora_finetune.model_folder.config import model_family

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations
from mlx_lm.models import cache as caches
from mlx_lm.models.base import create_attention_mask
from transformers import PretrainedConfig

Settings = dict[str, Any]
Weights = dict[str, mx.array]


def correct(model: nn.Module, args: Any, config: Settings, theirs: PretrainedConfig | None) -> None:
    """Correct a model of mlx-lm that has no weights yet; raises UserError where that cannot be.

    It was built from `args`; `config` is in mlx-lm's words, `theirs` is as transformers has it.
    """
    family = model_family(type(model))
    check(family, config, args)
    if family in CORRECTIONS:
        CORRECTIONS[family](model, theirs)
    if theirs:
        # Of latent queries and keys in all of transformers' models; some of mlx-lm's have another
        # (youtu_llm.py:63, longcat_flash.py:73).
        for path, module in model.named_modules():
            if path.endswith(("q_a_layernorm", "kv_a_layernorm")):
                module.eps = 1e-6
        put_activations(model, theirs)
        put_windows(model, theirs)
        if getattr(theirs, "rope_parameters", None):
            rope.correct(model, theirs)
    take_biases(model, theirs)


# --- What is refused ----------------------------------------------------------------------------

# By the name of mlx-lm's module, the only values with which it computes what PyTorch does, and all
# released models have (dbrx.py:145, falcon_h1.py:460, gpt_bigcode.py:65, phimoe.py:120).
ONLY: dict[str, Settings] = {
    "dbrx": {"moe_normalize_expert_weights": 1},
    "falcon_h1": dict.fromkeys(
        ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias"), False
    ),
    "gpt_bigcode": {"multi_query": True},
    "phimoe": {"num_experts_per_tok": 2},
}


def check(family: str, config: Settings, args: Any) -> None:
    """Raise UserError for settings with which mlx-lm computes something else than PyTorch."""
    settings = vars(args) | config  # args have the defaults
    settings |= (config.get("text_config") or {}) | (config.get("ffn_config") or {})
    only = ONLY.get(family, {}).items()
    found = [f"{n} = {settings[n]}" for n, v in only if settings.get(n) not in (None, v)]
    if family == "exaone_moe" and "sliding_attention" not in settings["layer_types"]:
        found.append("no window")  # exaone_moe.py:192 then rotates in all layers, PyTorch in none
    if found:
        raise UserError(
            f"this model has {found[0]}, which mlx-lm's {family} does not compute as PyTorch does; "
            "take another model"
        )


# --- In all families ----------------------------------------------------------------------------


WITH_BIAS = (nn.Linear, nn.QuantizedLinear, nn.LayerNorm)


def take_biases(model: nn.Module, theirs: PretrainedConfig | None) -> None:
    """Give linear layers and norms a bias where the folder has one, when weights are loaded.

    mlx-lm often does not know the setting for it. A bias that the folder lacks is removed if some
    setting `…bias` is False; otherwise loading reports it as missing.
    """
    settings = theirs.to_dict() if theirs else {}
    may_lack = any(n.endswith("bias") and value is False for n, value in settings.items())

    def taking(original: Callable, model: nn.Module, weights: list, strict: bool = True):
        given = dict(weights)
        for path, module in model.named_modules():
            if isinstance(module, WITH_BIAS):
                if f"{path}.bias" in given:
                    module.bias = given[f"{path}.bias"]
                elif may_lack and strict:
                    module.pop("bias", None)
        return original(model, weights, strict)

    replace([model], taking, "load_weights")


# --- Sliding windows ----------------------------------------------------------------------------

# The caches of mlx-lm for transformers' kinds of attention; other layers have none of these.
CACHES = {"full": caches.KVCache, "attention": caches.KVCache}
WINDOWED = {"sliding": caches.RotatingKVCache, "chunked": caches.ChunkedKVCache}
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size")


def put_windows(model: nn.Module, theirs: PretrainedConfig) -> None:
    """Give layers the windows that transformers' have and mlx-lm's have not.

    mlx-lm 0.32.2 computes none in gemma2 (gemma2.py:176), qwen2, qwen3, phi3, starcoder2, dots1 and
    others. Its caches show which layers have one. Where other layers have, that is a UserError,
    since such layers differ in more than the mask.
    """
    window = next((w for name in WINDOWS if (w := getattr(theirs, name, None))), None)
    kinds = getattr(theirs, "layer_types", None)
    kinds = kinds or ["sliding" if window else "full"] * len(model.layers)
    wanted = [(CACHES | WINDOWED).get(kind.removesuffix("_attention")) for kind in kinds]
    found = [type(cache) for cache in caches.make_prompt_cache(model)]  # not of layers sharing one
    pairs = zip(wanted, found, strict=False)
    is_same = all(w in (f, None) or f is caches.ArraysCache for w, f in pairs)
    if is_same or not set(WINDOWED.values()).intersection(wanted):
        return
    if set(WINDOWED.values()).intersection(found):
        raise UserError(
            "in PyTorch other layers of this model have a sliding window than in mlx-lm's model of "
            "this kind, which would compute something else; take another model"
        )
    sliding = [w is WINDOWED["sliding"] for w in wanted]
    layers = [layer for layer, is_so in zip(model.layers, sliding, strict=True) if is_so]
    attentions = [attention for layer in layers for attention in attention_modules(layer)]
    replace(attentions, partial(windowed, window))


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """The innermost modules of a layer that are given a mask and a cache."""
    taking = [m for m in layer.modules() if {"mask", "cache"} <= set(parameters_of(type(m)))]
    return [m for m in taking if not any(o is not m and o in taking for o in m.modules())]


def windowed(window: int, original: Callable, attention: nn.Module, *args, **options):
    """A call of an attention with a window; texts that fit into it are given the mask they had."""
    given = arguments(attention, args, options)
    x, cache = next(iter(given.values())), given.get("cache")
    length = x.shape[1] + getattr(cache, "offset", 0)
    if not isinstance(length, int) or length > window:
        given["mask"] = create_attention_mask(x, cache, window, return_array=True)
    return original(attention, **given)


# --- By family ----------------------------------------------------------------------------------


def route_with_bias(model: nn.Module, _: PretrainedConfig | None) -> None:
    """ERNIE 4.5: experts are chosen by their scores and a bias; ernie4_5_moe.py:269 drops it.

    The bias (1, experts) is kept under the name that it has in the folder.
    """
    name = "e_score_correction_bias"

    def with_bias(_: Callable, moe: nn.Module, x: mx.array) -> mx.array:
        gates = moe.gate_act(moe.gate(x).astype(mx.float32))
        biased = gates + moe.moe_statics[name].astype(mx.float32).flatten()
        scores, chosen = best_scores(gates, biased, moe.k)
        scores = scores / mx.maximum(scores.sum(axis=-1, keepdims=True), 1e-12)
        y = moe.switch_mlp(x, chosen)
        y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
        return y if moe.shared_experts is None else y + moe.shared_experts(x)

    def keeping_bias(original: Callable, model: nn.Module, weights: Weights) -> Weights:
        kept = {n: a for n, a in weights.items() if n.endswith(f".mlp.moe_statics.{name}")}
        if len(kept) < len(routed):
            raise UserError(
                f"the weights of this ERNIE lack the biases of its routers ({name}), which mlx-lm "
                "drops when it converts a model; take the folder that it was converted from"
            )
        return original(model, weights) | kept

    routed = modules_named(model, "Ernie4_5_MoeMLP")
    for layer in routed:
        layer.moe_statics = nn.Module()
        layer.moe_statics[name] = mx.zeros((1, layer.gate.weight.shape[0]))
    replace(routed, with_bias)
    replace([model], keeping_bias, "sanitize")


def best_scores(scores: mx.array, by: mx.array, number: int) -> tuple[mx.array, mx.array]:
    """The scores of the experts that rank highest by another number, and their indices."""
    chosen = mx.stop_gradient(mx.argpartition(-by, kth=number - 1, axis=-1)[..., :number])
    return mx.take_along_axis(scores, chosen, axis=-1), chosen


def route_by_all(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Jamba: the scores are the softmax over all experts; jamba.py:244 has it over the chosen."""

    def by_all(_: Callable, moe: nn.Module, x: mx.array) -> mx.array:
        gates = mx.softmax(moe.router(x).astype(mx.float32), axis=-1, precise=True)
        scores, chosen = best_scores(gates, gates, moe.num_experts_per_tok)
        y = moe.switch_mlp(x, chosen)
        return (y * scores[..., None].astype(y.dtype)).sum(axis=-2)

    replace(modules_named(model, "JambaSparseMoeBlock"), by_all)


def norm_by_groups(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Mamba 2: gated norms are by groups of channels; mamba2.py:53, … are over all at once.

    The other norms of mamba2.py:200 have MLX's epsilon and not the model's.
    """

    def by_groups(_: Callable, norm: nn.Module, x: mx.array, gate: mx.array) -> mx.array:
        gates_first = not getattr(norm, "norm_before_gate", False)
        x = activations.swiglu(gate, x) if gates_first else x
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        normed = mx.fast.rms_norm(x.reshape(*x.shape[:-1], groups, -1), None, eps)
        x = normed.reshape(x.shape) * norm.weight
        return x if gates_first else activations.swiglu(gate, x)

    args = model.args
    groups = args.n_groups if hasattr(args, "n_groups") else args.mamba_n_groups
    if hasattr(args, "layer_norm_epsilon"):
        for norm in modules_named(model, "RMSNorm"):
            norm.eps = args.layer_norm_epsilon
    if groups > 1:
        norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNormGated")]
        replace(norms, by_groups)


def correct_falcon_h1(model: nn.Module, theirs: PretrainedConfig | None) -> None:
    """Falcon-H1: besides, keys and values have multipliers.

    falcon_h1.py:472 leaves them out. They go into the scale of the scores and the output of
    attention, which is linear in the values, and not into weights that mlx-lm may have converted.
    """
    attentions = [layer.self_attn for layer in model.layers]
    for attention in attentions:
        attention.scale *= model.args.key_multiplier
    if model.args.attention_in_multiplier != 1:
        replace(attentions, multiplied_by(model.args.attention_in_multiplier))
    norm_by_groups(model, theirs)


def multiplied_by(factor: float) -> Callable:
    """A method whose result is that of the original, times a factor."""
    return lambda original, *args, **options: original(*args, **options) * factor


def scale_tied_logits(model: nn.Module, _: PretrainedConfig | None) -> None:
    """MiniCPM3: tied logits are scaled as others are, which minicpm3.py:245 leaves out."""
    if model.args.tie_word_embeddings:
        replace([model], multiplied_by(model.args.dim_model_base / model.args.hidden_size))


def share_keys_and_values(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Gemma 3n: layers with shared keys and values share them without a cache too.

    Without one, such a layer of gemma3n.py:131 uses projections of its own, never trained.
    """

    def sharing(original: Callable, model, inputs=None, cache=None, input_embeddings=None):
        if cache is None:
            cache = [KeysAndValues() for _ in range(model.first_kv_shared_layer_idx)]
        return original(model, inputs, cache, input_embeddings)

    def dropping(original: Callable, model: nn.Module, weights: Weights) -> Weights:
        weights = original(model, weights)
        return {n: a for n, a in weights.items() if not any(name in n for name in dropped)}

    dropped = []
    for number, layer in enumerate(model.layers):
        if layer.self_attn.is_kv_shared_layer:
            for name in ("k_proj", "v_proj", "k_norm"):
                del layer.self_attn[name]
                dropped.append(f"language_model.layers.{number}.self_attn.{name}.")
    replace([model.model.language_model], sharing)
    replace([model], dropping, "sanitize")


class KeysAndValues:
    """The keys and values of one layer in one call, in the place of a cache."""

    offset = 0

    def update_and_fetch(self, *both: mx.array) -> tuple[mx.array, ...]:
        self.both = both
        return both

    def keys_and_values(self) -> tuple[mx.array, ...]:
        return self.both


def norm_where_rotated(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Llama 4 without experts: layers without rotation, unlike llama4_text.py:69, have no norm."""
    for layer in model.layers:
        layer.self_attn.use_qk_norm &= bool(layer.self_attn.use_rope)


def limit_time_steps(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Nemotron-H: the only limit of time steps is `time_step_min`; nemotron_h.py:75 has others."""
    for layer in model.layers:
        if model.args.time_step_min is not None and hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (model.args.time_step_min, float("inf"))


def zero_padding_row(model: nn.Module, theirs: PretrainedConfig | None) -> None:
    """Youtu: transformers loads zeros as the embedding of the padding token."""

    def zeroing(original: Callable, model: nn.Module, weights: list, strict: bool = True):
        loaded = original(model, weights, strict)
        table = model.model.embed_tokens
        if "scales" not in table:
            is_padding = mx.arange(len(table.weight))[:, None] == theirs.pad_token_id
            table.weight = mx.where(is_padding, 0, table.weight).astype(table.weight.dtype)
        return loaded

    if theirs and theirs.pad_token_id is not None:
        replace([model], zeroing, "load_weights")


# By the name of mlx-lm's module.
CORRECTIONS: dict[str, Callable[[nn.Module, PretrainedConfig | None], None]] = {
    "ernie4_5_moe": route_with_bias,
    "falcon_h1": correct_falcon_h1,
    "gemma3n": share_keys_and_values,
    "granitemoehybrid": norm_by_groups,
    "jamba": route_by_all,
    "llama4_text": norm_where_rotated,
    "mamba2": norm_by_groups,
    "minicpm3": scale_tied_logits,
    "nemotron_h": limit_time_steps,
    "youtu_llm": zero_padding_row,
}
