"""Modules whose class gives way to another one that stands for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import mlx.nn as nn


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
