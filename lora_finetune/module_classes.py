"""Modules whose class gives way to another one that stands for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from transformers import PretrainedConfig


def become(modules: Iterable[nn.Module], make: Callable[[type], type]) -> None:
    """Give each module, in the place of its class, a subclass of the same name.

    Args:
        make: makes the subclass of a class, of which it is made once.
    """
    made: dict[type, type] = {}
    for module in modules:
        original = type(module)
        if original not in made:
            made[original] = make(original)
            made[original].__name__ = original.__name__
            made[original].__module__ = original.__module__
        module.__class__ = made[original]


def modules_named(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a model whose class has that name."""
    return [module for module in model.modules() if type(module).__name__ == name]


def parameters_of(kind: type) -> list[str]:
    """The names of what a module of a class is called with."""
    return list(inspect.signature(kind.__call__).parameters)[1:]


def arguments(kind: type, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """What a module of a class is called with, by name."""
    return dict(zip(parameters_of(kind), args, strict=False)) | options


# --- Biases -------------------------------------------------------------------------------------

WITH_BIAS = (nn.Linear, nn.QuantizedLinear, nn.LayerNorm)


def take_biases(model: nn.Module, theirs: PretrainedConfig | None) -> None:
    """Let linear layers and norms have a bias where the folder has one for them.

    Which ones have is a setting in transformers that mlx-lm's models often do not know. One that
    the folder lacks is left out where some such setting is False, and else missing.
    """
    settings = theirs.to_dict() if theirs else {}
    may_lack = any(n.endswith("bias") and value is False for n, value in settings.items())

    def taking(original: type) -> type:
        class Taking(original):
            def load_weights(self, weights: list[tuple[str, mx.array]], strict: bool = True):
                modules = dict(self.named_modules())
                for name, array in weights:
                    path, _, last = name.rpartition(".")
                    if last == "bias" and isinstance(modules.get(path), WITH_BIAS):
                        modules[path].bias = array
                given = {name for name, _ in weights}
                for path, module in modules.items() if may_lack and strict else ():
                    if isinstance(module, WITH_BIAS) and f"{path}.bias" not in given:
                        module.pop("bias", None)
                return super().load_weights(weights, strict)

        return Taking

    become([model], taking)
