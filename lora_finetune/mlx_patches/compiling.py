"""Compiling: for each shape alone, and only what can be.

Import this before mlx_lm: it compiles some functions of its models when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from lora_finetune.base.errors import hint_if_slow

import mlx.core as mx

mlx_compile = mx.compile


def compile_for_each_shape(
    fun: Callable, inputs: object = None, outputs: object = None, shapeless: bool = False
) -> Callable:
    """mx.compile, but never for all shapes at once.

    MLX can do that only of operations with a rule for it. Our activations have none.
    """
    return mlx_compile(fun, inputs, outputs)


mx.compile = compile_for_each_shape


def hint_if_compiling(tried: str) -> AbstractContextManager[None]:
    """Tell, where what is tried is slow, what a first run on a GPU is waiting for."""
    return hint_if_slow(
        f"trying {tried}; on a GPU the first run compiles its kernels, for up to a minute, or "
        "several with a hybrid"
    )


def compiled_if_possible(function: Callable) -> Callable:
    """A function compiled, or as it is from where it turns out that MLX cannot compile it.

    That is so of control flow that depends on data: dbrx reads its router's choice.
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
