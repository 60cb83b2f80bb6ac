"""Corrections of mlx-lm's models that compute something else than transformers' for a folder.

The lines named are those of mlx-lm 0.32.2, in mlx_lm/models; the reference is transformers 5.24.0.
Models that agree with it are left as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches.activation_names import put_activations
from lora_finetune.mlx_patches.attention_windows import put_windows
from lora_finetune.mlx_patches.module_classes import modules_named, replace, take_biases

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations
from transformers import PretrainedConfig

Weights = dict[str, mx.array]


def corrected(
    model_class: type[nn.Module],
    args_class: type,
    config: dict[str, Any],
    theirs: PretrainedConfig | None,
) -> Callable[[Any], nn.Module]:
    """A function that builds a corrected model from its arguments, for mlx-lm's `load_model`.

    Args:
        config: in mlx-lm's words.
        theirs: the settings of the text model as transformers has them, None where it has none.

    Raises (when called):
        UserError: mlx-lm has another model under this name, or one with other kinds of layers.
    """
    family = model_class.__module__.rpartition(".")[2]

    def build(config: dict[str, Any]) -> nn.Module:
        return model_class(with_a_full_layer(family, args_class.from_dict(config)))

    def put_right(args: Any) -> nn.Module:
        check_is_same(model_class, config, args)
        model = model_class(with_a_full_layer(family, args))
        if any(map(normalizes_one, model.modules())):
            raise refusal("a normalized score for a single expert", family)
        if family in CORRECTIONS:
            CORRECTIONS[family](model, theirs)
        if theirs:
            set_latent_norms(model)
            put_activations(model, theirs)
            put_windows(model, build, config, theirs)
        take_biases(model, theirs)
        return model

    return put_right


# What a model type means in mlx-lm, by how the names of architectures begin, where transformers has
# another model of that type.
MEANT = {"minimax": "MiniMaxM2"}


def check_is_same(model_class: type, config: dict[str, Any], args: Any) -> None:
    """Raise UserError where mlx-lm's model of a type is not the one that was saved.

    minimax.py is MiniMax-M2; transformers' minimax is MiniMax-Text-01, with lightning attention.
    """
    family = model_class.__module__.rpartition(".")[2]
    named = [str(name) for name in config.get("architectures") or ()]
    if family in MEANT and named and not any(name.startswith(MEANT[family]) for name in named):
        raise UserError(
            f"the model is a {named[0]}, and what mlx-lm has as {family} is another "
            f"({MEANT[family]}), which would not compute what it was trained to; take another model"
        )
    what, is_so = REFUSED.get(family, ("", lambda _: False))
    if is_so(args):
        raise refusal(what, family)


def refusal(what: str, family: str) -> UserError:
    return UserError(
        f"this model has {what}, which mlx-lm's {family} does not compute as PyTorch does; take "
        "another model"
    )


# By the name of mlx-lm's module, settings with which it computes something else than PyTorch: it
# expects the keys of all heads behind all queries (gpt_bigcode.py:65), always normalizes the
# experts' scores to 1 (dbrx.py:145), and multiplies weights, but not biases (falcon_h1.py:460).
REFUSED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "dbrx": (
        "moe_normalize_expert_weights other than 1",
        lambda args: args.ffn_config.get("moe_normalize_expert_weights", 1) != 1,
    ),
    "falcon_h1": ("biases", lambda args: any(getattr(args, name) for name in FALCON_BIASES)),
    "gpt_bigcode": ("multi_query = False", lambda args: not args.multi_query),
}


def normalizes_one(router: nn.Module) -> bool:
    """Whether the score of a single expert is to be normalized to 1, which mlx-lm does not do.

    deepseek_v3.py:222 and all else with a `group_expert_select`, and afmoe.py:228, normalize from
    two experts on.
    """
    args = getattr(router, "args", None)  # which Kimi Linear's routers look at themselves
    if getattr(args, "num_experts_per_token", 0) == 1 and getattr(args, "moe_renormalize", False):
        return True
    number = getattr(router, "top_k", getattr(router, "num_experts_per_tok", 0))
    of_group = hasattr(sys.modules[type(router).__module__], "group_expert_select")
    is_normed = of_group and getattr(router, "norm_topk_prob", False)
    return number == 1 and (is_normed or getattr(router, "route_norm", False))


FALCON_BIASES = ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias")


def with_a_full_layer(family: str, args: Any) -> Any:
    """llama.py:179 needs a layer without a window; where there is none, all are built without.

    put_windows gives them their windows afterwards.
    """
    if family == "llama" and "full_attention" not in args.layer_types:
        args.layer_types = ["full_attention"] * args.num_hidden_layers
    return args


# --- By family ----------------------------------------------------------------------------------


def share_keys_and_values(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Gemma 3n: layers with shared keys and values share them without a cache too.

    gemma3n.py:131 takes them from the cache, and without one lets such a layer use projections of
    its own, which were never trained: training and tests would see another model than generation.
    transformers 5 does not save those projections.
    """
    language_model = model.model.language_model

    def sharing(original: Callable, model, inputs=None, cache=None, input_embeddings=None):
        if cache is None:
            cache = [KeysAndValues() for _ in range(model.first_kv_shared_layer_idx)]
        return original(model, inputs, cache, input_embeddings)

    replace([language_model], sharing)
    dropped = []
    for number, layer in enumerate(model.layers):
        if layer.self_attn.is_kv_shared_layer:
            for name in ("k_proj", "v_proj", "k_norm"):
                del layer.self_attn[name]
                dropped.append(f"language_model.layers.{number}.self_attn.{name}.")

    def dropping(original: Callable, model: nn.Module, weights: Weights) -> Weights:
        weights = original(model, weights)
        return {n: a for n, a in weights.items() if not any(name in n for name in dropped)}

    replace([model], dropping, "sanitize")


class KeysAndValues:
    """The keys and values of one layer in one call, in the place of a cache."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.both = keys, values
        return self.both

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self.both


def correct_falcon_h1(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Falcon-H1: the multipliers of keys and values, and norms by groups.

    falcon_h1.py:472 never gets to `key_multiplier`, as a branch before takes the keys, and leaves
    the values out; the norm at 88 is not by groups. The keys' multiplier is put into the scale of
    the scores, since the weights may come from a folder that mlx-lm has converted.
    """
    args, attentions = model.args, [layer.self_attn for layer in model.layers]
    for attention in attentions:
        attention.scale *= args.key_multiplier
    if args.attention_in_multiplier != 1:  # what attention puts out is linear in the values
        replace(attentions, multiplied_by(args.attention_in_multiplier))
    norm_by_groups(model, "FalconH1RMSNormGated", args.mamba_n_groups)


def multiplied_by(factor: float) -> Callable:
    """A method whose result is that of the original, times a factor."""
    return lambda original, *args, **options: original(*args, **options) * factor


def correct_mamba2(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Mamba 2: the gated norm by groups, and the epsilon of the others.

    mamba2.py:53 is over all channels at once, and the norms of mamba2.py:200 have MLX's epsilon.
    """
    for norm in modules_named(model, "RMSNorm"):
        norm.eps = model.args.layer_norm_epsilon
    norm_by_groups(model, "MambaRMSNormGated", model.args.n_groups)


def correct_granite_hybrid(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Granite's hybrids: the gated norm by groups; granitemoehybrid.py:87 is over all at once."""
    norm_by_groups(model, "GraniteMoeHybridRMSNormGated", model.args.mamba_n_groups)


def rotate_with_windows(model: nn.Module, _: PretrainedConfig | None) -> None:
    """EXAONE MoE: with `sliding_window` set, layers of full attention are never rotated.

    exaone_moe.py:192 rotates all where no layer has the window.
    """
    for layer in model.layers:
        attention = layer.self_attn
        attention.use_rope = attention.is_sliding_window or model.args.sliding_window is None


def route_to_two(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Phi-3.5-MoE: two experts, whatever `num_experts_per_tok` says, which phimoe.py:120 reads."""
    for routed in modules_named(model, "PhiMoESparseMoeBlock"):
        routed.top_k = 2


def norm_by_groups(model: nn.Module, name: str, groups: int) -> None:
    """Make the gated norms of that class norm each group of channels on its own."""

    def by_groups(_: Callable, norm: nn.Module, hidden_states: mx.array, gate=None) -> mx.array:
        gates_first = not getattr(norm, "norm_before_gate", False)
        x = hidden_states
        if gate is not None and gates_first:
            x = activations.swiglu(gate, x)
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        normed = mx.fast.rms_norm(x.reshape(*x.shape[:-1], groups, -1), None, eps)
        x = normed.reshape(x.shape) * norm.weight
        return x if gate is None or gates_first else activations.swiglu(gate, x)

    if groups > 1:
        replace(modules_named(model, name), by_groups)


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
    chosen = mx.argpartition(-by, kth=number - 1, axis=-1)[..., :number]
    chosen = mx.stop_gradient(chosen)
    return mx.take_along_axis(scores, chosen, axis=-1), chosen


def route_by_all(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Jamba: the scores are the softmax over all experts; jamba.py:244 has it over the chosen."""

    def by_all(_: Callable, moe: nn.Module, x: mx.array) -> mx.array:
        gates = mx.softmax(moe.router(x).astype(mx.float32), axis=-1, precise=True)
        scores, chosen = best_scores(gates, gates, moe.num_experts_per_tok)
        y = moe.switch_mlp(x, chosen)
        return (y * scores[..., None].astype(y.dtype)).sum(axis=-2)

    replace(modules_named(model, "JambaSparseMoeBlock"), by_all)


def scale_tied_logits(model: nn.Module, _: PretrainedConfig | None) -> None:
    """MiniCPM3: tied logits are scaled as others are, which minicpm3.py:245 leaves out."""
    if model.args.tie_word_embeddings:
        replace([model], multiplied_by(model.args.dim_model_base / model.args.hidden_size))


def norm_where_rotated(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Llama 4 without experts: layers without rotation have no norm of queries and keys.

    llama4_text.py:69 gives it to all.
    """
    for layer in model.layers:
        layer.self_attn.use_qk_norm &= bool(layer.self_attn.use_rope)


def limit_time_steps(model: nn.Module, _: PretrainedConfig | None) -> None:
    """Nemotron-H: time steps are limited from below by `time_step_min`, and in no other way.

    nemotron_h.py:75 has the limits of `time_step_limit`, or none.
    """
    least = model.args.time_step_min
    for layer in model.layers:
        if least is not None and hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (least, float("inf"))


def set_latent_norms(model: nn.Module) -> None:
    """Norms of latent queries and keys have an epsilon of 1e-6 in all of transformers' models.

    Some of mlx-lm's take `rms_norm_eps` (youtu_llm.py:63) or 1e-5 (longcat_flash.py:73).
    """
    for path, module in model.named_modules():
        if path.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.eps = 1e-6


def zero_padding_row(model: nn.Module, theirs: PretrainedConfig | None) -> None:
    """Youtu: the embedding of the padding token is zero, which transformers sees to when it loads.

    Where the output is tied, so is the logit.
    """

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
    "exaone_moe": rotate_with_windows,
    "falcon_h1": correct_falcon_h1,
    "gemma3n": share_keys_and_values,
    "granitemoehybrid": correct_granite_hybrid,
    "jamba": route_by_all,
    "llama4_text": norm_where_rotated,
    "mamba2": correct_mamba2,
    "minicpm3": scale_tied_logits,
    "nemotron_h": limit_time_steps,
    "phimoe": route_to_two,
    "youtu_llm": zero_padding_row,
}
