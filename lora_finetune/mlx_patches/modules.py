"""Methods of single modules of a model, replaced: for good, or while something lasts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches.transforms import recompute

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten


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
    return functools.wraps(original)(lambda *args, **named: method(original, *args, **named))


@contextmanager
def intercepted(
    module: nn.Module, reply: Callable[..., Any], method: str = "__call__"
) -> Iterator[None]:
    """While it lasts, `reply` answers in place of a module's method, with the same arguments."""
    original = type(module)
    replace([module], lambda _, __, *args, **options: reply(*args, **options), method)
    try:
        yield
    finally:
        delattr(type(module), method)  # Python frees a class late, and with it what reply holds
        module.__class__ = original


def checkpoint_layers(model: nn.Module) -> None:
    """Let layers keep only their inputs for the backward pass, and compute the rest again."""
    replace(model.layers, checkpointed)


def checkpointed(method: Callable, module: nn.Module, *args: Any, **options: Any) -> Any:
    """A call of a module as in `recompute`, for `replace`."""
    named, given, returned = tree_flatten(module.trainable_parameters()), (args, options), []
    names, own = [name for name, _ in named], [array for _, array in named]

    def function(*arrays: mx.array) -> list[mx.array]:
        module.update(tree_unflatten(list(zip(names, arrays, strict=False))))
        args, options = with_floats(given, arrays[len(names) :])
        returned[:] = [method(module, *args, **options)]
        if named and any(hasattr(leaf, "__dict__") for _, leaf in tree_flatten(returned)):
            raise UserError(  # such as kimi_k3's: gradients would not go through an object
                f"layers of this kind ({type(module).__name__}) cannot be computed twice, which "
                "--shard and a small memory need; take another model, or more memory for it"
            )
        return floats(returned)

    found = recompute(function)(*own, *floats(given))
    return with_floats(returned, found)[0]


def floats(tree: Any) -> list[mx.array]:
    """The arrays in a tree that gradients are of."""
    return [leaf for _, leaf in tree_flatten(tree) if is_float(leaf)]


def with_floats(tree: Any, arrays: Iterable[mx.array]) -> Any:
    """A tree with others in the place of its `floats`."""
    rest = iter(arrays)
    return tree_map(lambda leaf: next(rest) if is_float(leaf) else leaf, tree)


def is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def modules_named(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a model whose class has that name."""
    return [module for module in model.modules() if type(module).__name__ == name]


def parameters_of(kind: type) -> list[str]:
    """The names of the parameters of a class's `__call__`, without self."""
    return list(inspect.signature(kind.__call__).parameters)[1:]


def arguments(module: nn.Module, args: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module, by name."""
    return dict(zip(parameters_of(type(module)), args, strict=False)) | options
