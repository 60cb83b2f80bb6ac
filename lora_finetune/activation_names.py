"""The activation that a configuration names, in the place of the one that mlx-lm has."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, SimpleNamespace

from lora_finetune.module_classes import become, parameters_of

import mlx.core as mx
import mlx.nn as nn
from transformers import PretrainedConfig

Function = Callable[[mx.array], mx.array]

# What the activation of the feed-forward layers is called in configurations, the first that is
# given; some have an older name beside it that is not read.
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

# What is the last linear layer of a feed-forward layer.
DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "fc_out", "output_linear")


def put_activations(model: nn.Module, theirs: PretrainedConfig) -> bool:
    """Let feed-forward layers use the function that the configuration names; true if all do then.

    mlx-lm 0.32.2 has one function in the code of most models, whatever `hidden_act` says, and in
    gemma.py:98, starcoder2.py:82 and gpt_bigcode.py:99 the exact GELU where transformers has the
    one with tanh. Layers with convolutions use it there too, and are not looked at.
    """
    named = next((getattr(theirs, n) for n in SETTINGS if getattr(theirs, n, None)), None)
    wanted = FUNCTIONS.get(named) if isinstance(named, str) else None
    if wanted is None or any("conv1d" in module for module in model.modules()):
        return False
    layers = [
        module
        for module in model.modules()
        if any(name in module for name in DOWN) and "mask" not in parameters_of(type(module))
    ]
    found = {id(layer): function_of(layer) for layer in layers}
    if not layers or None in found.values():
        return False
    for layer in layers:
        if found[id(layer)] == wanted:
            continue
        if "activation" in layer:
            layer.activation = Activation(getattr(nn, wanted))
        else:
            become([layer], lambda original: with_function(original, getattr(nn, wanted)))
    return True


def function_of(layer: nn.Module) -> str | None:
    """The activation in a feed-forward layer by its name in mlx.nn, None if it is not known."""
    if "activation" in layer:
        return MODULES.get(type(layer.activation).__name__)
    code = getattr(type(layer).__call__, "__code__", None)
    found = [CALLED[name] for name in code.co_names if name in CALLED] if code else []
    return found[0] if len(found) == 1 else None


class Activation(nn.Module):
    """As the activations of mlx-lm's experts: function(gate) · x, or function(x) alone."""

    def __init__(self, function: Function):
        super().__init__()
        self.function = function

    def __call__(self, x: mx.array, gate: mx.array | None = None) -> mx.array:
        return self.function(x) if gate is None else self.function(gate) * x


def with_function(original: type, function: Function) -> type:
    """A kind of layer whose program is the same, with another activation."""
    call = original.__call__
    names = dict.fromkeys(CALLED, function) | {"swiglu": lambda gate, x: function(gate) * x}
    replaced = call.__globals__ | {
        "nn": SimpleNamespace(**(vars(nn) | names)),
        "swiglu": names["swiglu"],
        "relu_squared": function,
    }
    copied = FunctionType(
        call.__code__, replaced, call.__name__, call.__defaults__, call.__closure__
    )
    return type(original.__name__, (original,), {"__call__": copied})
