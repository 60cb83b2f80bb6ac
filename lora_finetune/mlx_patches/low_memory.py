"""Two ways to hold less in memory: compute again, and compute in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx


def recompute(
    function: Callable[..., Any], together: int = 0
) -> Callable[..., mx.array | tuple[mx.array, ...]]:
    """A function of arrays that keeps its inputs only, and is computed again for its gradients.

    Args:
        together: the gradients to so many of the first inputs are there at once, so that what
            waits for one of them does not begin before the others are done.
    """
    keeping = mx.custom_function(function)

    @keeping.vjp
    def gradients(inputs: Any, cotangents: Any, _: Any) -> list[mx.array]:
        inputs, cotangents = as_list(inputs), as_list(cotangents)
        # The dependency keeps mx.compile from merging this with the forward pass, whose
        # intermediate results would then be kept. mx.checkpoint starts all of them at once.
        found = mx.vjp(function, mx.depends(inputs, cotangents), cotangents)[1]
        if together:
            found[:together] = mx.depends(found[:together], found[:together])
        return found

    return keeping


def in_turn(function: Callable[..., Any], chunks: Iterable[Sequence[mx.array]]) -> list[Any]:
    """The results of a function of chunks of arrays, no two of which are computed at a time."""
    results = []
    for chunk in chunks:
        results.append(function(*(mx.depends(list(chunk), results[-1]) if results else chunk)))
    return results


def as_list(arrays: mx.array | Sequence[mx.array]) -> list[mx.array]:
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)
