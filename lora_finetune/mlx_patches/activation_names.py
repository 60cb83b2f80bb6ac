"""The activation that a configuration names, in the place of the one that mlx-lm has."""

from __future__ import annotations

from types import FunctionType, SimpleNamespace

from lora_finetune.mlx_patches.module_classes import parameters_of, subclass

import mlx.core as mx
import mlx.nn as nn
from transformers import PretrainedConfig

# Names of the activation's setting; the first that is given counts, since some configurations have
# an older one beside it that is not read.
SETTINGS = ("hidden_activation", "mlp_hidden_act", "hidden_act", "activation_function")

# transformers' names, and those of mlx.nn for the same function.
FUNCTIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_approx", "gelu_fast": "gelu_approx", "gelu_accurate": "gelu_approx",
    "gelu_pytorch_tanh": "gelu_approx", "gelu_python_tanh": "gelu_approx",
    "relu": "relu", "relu2": "relu2", "relu6": "relu6", "quick_gelu": "gelu_fast_approx",
    "sigmoid": "sigmoid", "tanh": "tanh", "mish": "mish", "hardswish": "hardswish",
    "leaky_relu": "leaky_relu",
}  # fmt: skip

# What mlx-lm's feed-forward layers call, and the function of mlx.nn that it is.
CALLED = {name: name for name in FUNCTIONS.values()}
CALLED |= {"swiglu": "silu", "relu_squared": "relu2"}
MODULES = {"SwiGLU": "silu", "GeGLU": "gelu_approx", "ReLU2": "relu2"}

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
        if function_of(layer) != wanted:
            if "activation" in layer:
                layer.activation = Activation(wanted)
            else:
                layer.__class__ = with_function(type(layer), wanted)


def has_activations(model: nn.Module, theirs: PretrainedConfig) -> bool:
    """Whether all layers use the function that the configuration names.

    Layers with convolutions use it too, and are not looked at: of those it cannot be said.
    """
    layers = feed_forward_layers(model)
    is_used = {function_of(layer) for layer in layers} == {wanted_function(theirs)}
    return is_used and not any(
        "conv" in type(module).__name__.lower() for module in model.modules()
    )


def wanted_function(theirs: PretrainedConfig) -> str | None:
    """The activation that a configuration names by its name in mlx.nn, None if it is not known."""
    named = next((getattr(theirs, n) for n in SETTINGS if getattr(theirs, n, None)), None)
    return FUNCTIONS.get(named) if isinstance(named, str) else None


def feed_forward_layers(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if any(name in module for name in DOWN) and "mask" not in parameters_of(type(module))
    ]


def function_of(layer: nn.Module) -> str | None:
    """The activation in a feed-forward layer by its name in mlx.nn, None if it is not known."""
    inner = layer.activation if "activation" in layer else layer
    kind, known = type(inner), getattr(inner, "function_name", None)
    if known or inner is not layer:
        return known or MODULES.get(kind.__name__)
    code = getattr(kind.__call__, "__code__", None)
    names = code.co_names if code else ()
    found = [CALLED.get(name) for name in names if name in CALLED or "elu" in name]
    return found[0] if len(found) == 1 else None


class Activation(nn.Module):
    """As the activations of mlx-lm's experts: function(gate) · x, or function(x) alone."""

    def __init__(self, wanted: str):
        super().__init__()
        self.function_name = wanted

    def __call__(self, x: mx.array, gate: mx.array | None = None) -> mx.array:
        function = getattr(nn, self.function_name)
        return function(x) if gate is None else function(gate) * x


def with_function(original: type, wanted: str) -> type:
    """A kind of layer whose program is the same, with another activation."""
    call = original.__call__

    def function(x: mx.array) -> mx.array:
        return getattr(nn, wanted)(x)  # as it is then: patches.py replaces some

    def gated(gate: mx.array, x: mx.array) -> mx.array:
        return function(gate) * x

    names = {"nn": SimpleNamespace(**(vars(nn) | dict.fromkeys(CALLED, function)))}
    names |= {"swiglu": gated, "relu_squared": function}
    copied = FunctionType(
        call.__code__, call.__globals__ | names, call.__name__, call.__defaults__, call.__closure__
    )
    return subclass(original, __call__=copied, function_name=wanted)
