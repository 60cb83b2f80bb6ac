"""Ways to compute a function: compiled, again for its gradients, and one chunk after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

# For `hint_if_slow`, while a model is tried on a few tokens or for its memory.
TRYING = "trying out the model"
if mx.default_device() == mx.gpu:
    TRYING += "; the first run compiles its kernels, which can take minutes"


def compiled_if_possible(function: Callable) -> Callable:
    """A compiled function; where MLX cannot compile it, each call is the function's own.

    It cannot where control flow depends on data: dbrx reads its router's choice.
    """
    compiled = mx.compile(function)

    def call(*arrays: object) -> object:
        try:
            return compiled(*arrays)
        except ValueError:
            return function(*arrays)

    return call


def recompute(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays that keeps its inputs only, and is computed again for its gradients."""
    keeping = mx.custom_function(function)

    @keeping.vjp
    def gradients(inputs: Any, cotangents: Any, _: Any) -> list[mx.array]:
        inputs, cotangents = as_list(inputs), as_list(cotangents)
        # The dependency keeps mx.compile from merging this with the forward pass, whose
        # intermediate results would then be kept. mx.checkpoint starts all of them at once.
        found = mx.vjp(function, mx.depends(inputs, cotangents), cotangents)[1]
        # What waits for one of several gradients does not begin before the others are done.
        return mx.depends(found, found) if len(found) > 1 else found

    return keeping


def in_turn(function: Callable[..., Any], chunks: Iterable[Sequence[mx.array]]) -> list[Any]:
    """The results of a function of chunks of arrays, no two of which are computed at a time."""
    results = []
    for chunk in chunks:
        results.append(function(*(mx.depends(list(chunk), results[-1]) if results else chunk)))
    return results


def as_list(arrays: mx.array | Sequence[mx.array]) -> list[mx.array]:
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)
