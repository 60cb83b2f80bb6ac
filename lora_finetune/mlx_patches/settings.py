"""Settings that PyTorch's program reads and mlx-lm's does not: activations are put, others told."""

from __future__ import annotations

import inspect
import re
import sys
from types import FunctionType, SimpleNamespace

from lora_finetune.base.errors import warn
from lora_finetune.mlx_patches.modules import parameters_of, subclass
from lora_finetune.model_folder.config import SAME, pytorch_program

import mlx.core as mx
import mlx.nn as nn
from transformers import PretrainedConfig

# --- Activations --------------------------------------------------------------------------------

# Names of the activation's setting; the first that is given counts.
SETTINGS = ("hidden_activation", "mlp_hidden_act", "hidden_act", "activation_function")

# transformers' names, and those of mlx.nn for the same function.
FUNCTIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2",
    "gelu_new": "gelu_approx", "gelu_fast": "gelu_approx", "gelu_pytorch_tanh": "gelu_approx",
    "quick_gelu": "gelu_fast_approx",
}  # fmt: skip

# What mlx-lm's feed-forward layers call, and the function of mlx.nn that it is.
CALLED = {name: name for name in FUNCTIONS.values()} | {"swiglu": "silu", "relu_squared": "relu2"}

# Names of the last linear layer of a feed-forward layer.
DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "fc_out", "output_linear")


def put_activations(model: nn.Module, theirs: PretrainedConfig) -> None:
    """Make feed-forward layers use the activation that the configuration names, if it is known.

    mlx-lm 0.32.2 has one function in the code of most models, whatever `hidden_act` says, and in
    gemma.py:98, starcoder2.py:82 and gpt_bigcode.py:99 the exact GELU where transformers has the
    one with tanh.
    """
    wanted, layers = wanted_function(theirs), feed_forward_layers(model)
    if wanted is None or None in map(function_of, layers):
        return
    for layer in layers:
        if function_of(layer) == wanted:
            continue
        if "activation" in layer:  # of experts; it is shared by all models
            layer.activation = with_function(type(layer.activation), wanted)()
        else:
            layer.__class__ = with_function(type(layer), wanted)


def wanted_function(theirs: PretrainedConfig) -> str | None:
    """The activation of a configuration by its name in mlx.nn, None if it is not known."""
    named = next((getattr(theirs, n) for n in SETTINGS if getattr(theirs, n, None)), None)
    return FUNCTIONS.get(named) if isinstance(named, str) else None


def feed_forward_layers(model: nn.Module) -> list[nn.Module]:
    with_down = [m for m in model.modules() if any(name in m for name in DOWN)]
    return [m for m in with_down if "mask" not in parameters_of(type(m))]


def function_of(layer: nn.Module) -> str | None:
    """The activation that the code of a feed-forward layer names, as in mlx.nn; None if unclear."""
    kind = type(layer.activation if "activation" in layer else layer)
    code = getattr(kind.__call__, "__code__", None)
    names = [n for n in getattr(code, "co_names", ()) if n in CALLED or "elu" in n]
    known = [getattr(kind, "function_name", None) or CALLED.get(name) for name in names]
    return known[0] if len(known) == 1 else None


def with_function(original: type, wanted: str) -> type:
    """A kind of layer whose program is the same, with another activation."""
    call = original.__call__

    def function(x: mx.array) -> mx.array:
        return getattr(nn, wanted)(x)  # as it is then: patches.py replaces some

    names = dict.fromkeys(CALLED, function) | {"swiglu": lambda gate, x: function(gate) * x}
    names["nn"] = SimpleNamespace(**vars(nn) | names)
    copied = FunctionType(
        call.__code__, call.__globals__ | names, call.__name__, call.__defaults__, call.__closure__
    )
    return subclass(original, __call__=copied, function_name=wanted)


# --- What nobody read ---------------------------------------------------------------------------

# Settings that do not change what a model computes, or without which loading fails (sizes), or that
# are corrected elsewhere (positions and windows).
WITHOUT_EFFECT = re.compile(
    # in training and of the form of outputs
    r".*dropout.*|.*_drop|.*pdrop|initializer.*|init_.*|.*_init_std|.*_init_variance.*|rescale_.*|"
    r".*jitter.*|.*_loss.*|summary_.*|output_.*|return_.*|gradient_checkpointing|.*_token_id|"
    # of how it is computed, and with which precision
    r"use_cache|is_decoder|.*softmax_in_fp32|reorder_and_upcast_attn|"
    r"_?(attn|experts)_implementation.*|dtype|pretraining_tp|residual_in_fp32|"
    r"((mamba|ssm)_)?chunk_size|chunk_size_feed_forward|use_mamba.*|use_associative_scan|"
    # only for the start of training, of state space models
    r"time_step_(min|max|floor|scale|rank|init_scheme)|"
    # sizes
    r"(.*_)?(size|dim|rank|layers|num_heads|attention_heads|key_value_heads|bias)|per_layer_config|"
    r"n_(layer|embd|inner|positions)|d_model|.*_size_per_layer_input|"
    # elsewhere
    r"rope_(interleave|theta|scaling|parameters|local_base_freq)|partial_rotary_factor|rotary_.*|"
    r"(original_)?max_position_embeddings|max_seq_len|"
    r"layer_types|mlp_layer_types|(use_)?sliding_window.*|max_window_layers"
)
READ_BY_PYTORCH = re.compile(r"\bconfig\.(\w+)|getattr\(\s*(?:self\.)?config,\s*\"(\w+)\"")


def warn_of_unread(model: nn.Module, theirs: PretrainedConfig | None) -> None:
    """Say in one line which settings PyTorch's program reads, and mlx-lm's does not.

    A setting at transformers' default counts as known, since mlx-lm's models were written for it.
    Defaults can depend on other settings, so they are those of a configuration with the known ones.
    """
    if theirs is None:
        return
    pairs = [*getattr(theirs, "attribute_map", {}).items(), *SAME.items()]

    def with_aliases(names: set[str]) -> set[str]:
        return names.union(*({a, b} for a, b in pairs if a in names or b in names))

    used = with_aliases({a or b for a, b in READ_BY_PYTORCH.findall(pytorch_program(theirs))})
    known = with_aliases(read_by_mlx(model, theirs))
    settings = theirs.to_dict()
    kept = {n: v for n, v in settings.items() if n in known or WITHOUT_EFFECT.fullmatch(n)}
    others = {n: v for n, v in settings.items() if n in used and n not in kept}
    kept.pop("model_type", None)
    try:
        default = type(theirs)(**kept).to_dict()
    except Exception:  # whatever its checks have against these together
        default = type(theirs)().to_dict()
    if unread := [f"{n} = {v!r}" for n, v in others.items() if v != default.get(n, v)]:
        warn(
            f"settings that mlx-lm does not know: {', '.join(unread)}; the model may compute "
            "something else than in PyTorch"
        )


def read_by_mlx(model: nn.Module, theirs: PretrainedConfig) -> set[str]:
    """The names of the settings that mlx-lm's program may read, and of activations put right."""
    modules = {type(m).__module__ for m in model.modules()}
    programs = [inspect.getsource(sys.modules[m]) for m in modules if m.startswith("mlx_lm.")]
    names = {name for program in programs for name in re.findall(r"\.(\w+)", program)}
    functions = {function_of(layer) for layer in feed_forward_layers(model)}
    has_convolutions = any("conv" in type(m).__name__.lower() for m in model.modules())
    is_put = functions == {wanted_function(theirs)} and not has_convolutions
    return names.union(SETTINGS if is_put else ())
