"""Methods of single modules of a model, replaced: for good, or while something lasts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
from transformers import PretrainedConfig


def replace(modules: Iterable[nn.Module], method: Callable, name: str = "__call__") -> None:
    """Let `method(original, module, …)` answer in the place of a method of each module.

    Each gets, in the place of its class, a subclass of the same name, one for all of a class.

    Args:
        method: `original` is the function that it replaces, to be called with the module first.
    """
    made: dict[type, type] = {}
    for module in modules:
        kind = type(module)
        if kind not in made:
            made[kind] = subclass(kind, **{name: around(getattr(kind, name), method)})
        module.__class__ = made[kind]


def subclass(kind: type, **attributes: Any) -> type:
    return type(kind.__name__, (kind,), {"__module__": kind.__module__} | attributes)


def around(original: Callable, method: Callable) -> Callable:
    """The function that calls `method(original, …)`; it has the signature of the original."""

    @functools.wraps(original)
    def answer(*args: Any, **options: Any) -> Any:
        return method(original, *args, **options)

    return answer


@contextmanager
def intercepted(
    module: nn.Module, reply: Callable[..., Any], method: str = "__call__"
) -> Iterator[None]:
    """While it lasts, `reply` answers in place of a module's method, with the same arguments."""
    original = type(module)
    answer = {method: lambda _, *args, **options: reply(*args, **options)}
    module.__class__ = replacing = subclass(original, **answer)
    try:
        yield
    finally:
        module.__class__ = original
        delattr(replacing, method)  # Python frees a class late, and with it what reply refers to


def modules_named(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a model whose class has that name."""
    return [module for module in model.modules() if type(module).__name__ == name]


def parameters_of(kind: type) -> list[str]:
    """The names of the parameters of a class's `__call__`, without self."""
    return list(inspect.signature(kind.__call__).parameters)[1:]


def arguments(kind: type, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module of a class, by name."""
    return dict(zip(parameters_of(kind), args, strict=False)) | options


# --- Biases -------------------------------------------------------------------------------------

WITH_BIAS = (nn.Linear, nn.QuantizedLinear, nn.LayerNorm)


def take_biases(model: nn.Module, theirs: PretrainedConfig | None) -> None:
    """Give linear layers and norms a bias where the folder has one, when weights are loaded.

    Which layers have one is a setting in transformers that mlx-lm's models often do not know. A
    bias of mlx-lm's model that the folder lacks is removed where some setting `…bias` is False;
    otherwise loading reports it as missing.
    """
    settings = theirs.to_dict() if theirs else {}
    may_lack = any(n.endswith("bias") and value is False for n, value in settings.items())

    def taking(original: Callable, model: nn.Module, weights: list, strict: bool = True):
        modules = dict(model.named_modules())
        for name, array in weights:
            path, _, last = name.rpartition(".")
            if last == "bias" and isinstance(modules.get(path), WITH_BIAS):
                modules[path].bias = array
        given = {name for name, _ in weights}
        for path, module in modules.items() if may_lack and strict else ():
            if isinstance(module, WITH_BIAS) and f"{path}.bias" not in given:
                module.pop("bias", None)
        return original(model, weights, strict)

    replace([model], taking, "load_weights")
