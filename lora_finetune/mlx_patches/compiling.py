"""Compiling only what can be, and telling what a first run on a GPU waits for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from lora_finetune.base.errors import hint_if_slow

import mlx.core as mx


def hint_if_compiling(tried: str) -> AbstractContextManager[None]:
    """Say that kernels are compiled, if what is tried is slow."""
    return hint_if_slow(
        f"trying {tried}; on a GPU the first run compiles its kernels, for up to a minute, or "
        "several with a hybrid"
    )


def compiled_if_possible(function: Callable) -> Callable:
    """A compiled function, or the function itself once it turns out that MLX cannot compile it.

    It cannot where control flow depends on data: dbrx reads its router's choice.
    """
    present = mx.compile(function)

    def call(*arrays: object) -> object:
        nonlocal present
        try:
            return present(*arrays)
        except ValueError:
            if present is function:
                raise
            present = function
            return function(*arrays)

    return call
