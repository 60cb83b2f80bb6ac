"""Attention that keeps queries, keys and values for its gradients, and nothing of length²."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from lora_finetune import fast_exp

import mlx.core as mx

# For so many queries at a time. Half as many take little less memory, and on a GPU more time.
BLOCK = 256

# CUDA's products copy keys and values for each query of a group, in short texts too.
COPIES_GROUPS = mx.cuda.is_available()

whole_attention = mx.fast.scaled_dot_product_attention


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
    **options: object,
) -> mx.array:
    """As mx.fast.scaled_dot_product_attention, for one block of a text after another.

    For the gradients the scores of a block of queries are computed again. Under a causal mask, keys
    behind the block are left out.

    Args:
        queries: (rows, heads, length, size).
        keys, values: (rows, heads, length, size); their heads can be fewer.
        mask: "causal", or an array (..., length, length). One that is added may have gradients of
            its own, and is left to MLX.
    """
    rows, heads, length, size = queries.shape
    is_array = isinstance(mask, mx.array)
    is_added = is_array and mask.dtype != mx.bool_
    by_hand = fast_exp.in_place and queries.dtype == mx.float32
    by_hand = by_hand and mask is not None and sinks is None
    shape = mask.shape[-2:] if is_array else (length, keys.shape[2])
    is_grouped = heads > keys.shape[1] and mask is not None and sinks is None
    is_short = length <= BLOCK and not by_hand and not (is_grouped and COPIES_GROUPS)
    if options or is_added or is_short or shape != (length, length):
        return whole_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks, **options
        )
    # On a GPU the queries of a group, which have the same keys, are put one behind the other. Else
    # the keys would be copied for each.
    group = 1 if by_hand or sinks is not None else heads // keys.shape[1]

    def attend(start: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        end = min(start + BLOCK, length)
        seen = length if mask is None or is_array else end
        q, k, v = q[:, :, start:end], k[:, :, :seen], v[:, :, :seen]
        block = None if mask is None else in_groups(mask_of(mask, start, end), group)
        if by_hand:
            return attention_by_hand(q, k, v, scale, block)
        q = q.reshape(rows, heads // group, -1, size)
        attended = whole_attention(q, k, v, scale=scale, mask=block, sinks=sinks)
        return attended.reshape(rows, heads, end - start, -1)

    if length <= BLOCK:
        return attend(0, queries, keys, values)

    @mx.custom_function
    def in_turn(*inputs: mx.array) -> mx.array:
        blocks = [attend(0, *inputs)]
        for start in range(BLOCK, length, BLOCK):
            blocks.append(attend(start, *mx.depends(inputs, blocks[-1:])))
        return mx.concatenate(blocks, axis=2)

    @in_turn.vjp
    def gradients(inputs: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        totals, ready = [], mx.depends(inputs, [cotangent])
        for start in range(0, length, BLOCK):
            of_block = cotangent[:, :, start : start + BLOCK]
            found = mx.vjp(partial(attend, start), ready, [of_block])[1]
            totals = list(map(mx.add, totals, found)) if totals else found
            ready = mx.depends(inputs, totals)
        return totals

    return in_turn(queries, keys, values)


def attention_by_hand(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array
) -> mx.array:
    """Attention with the exp that is fast on a Linux CPU; the mask is of booleans."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = mx.repeat(k, group, axis=1), mx.repeat(v, group, axis=1)
    return fast_exp.masked_softmax((q * scale) @ k.swapaxes(-1, -2), mask) @ v


def mask_of(mask: str | mx.array, start: int, end: int) -> mx.array:
    """The mask (..., block, keys) of a block of queries; if causal, for the keys up to its end."""
    if isinstance(mask, str):
        return mx.arange(start, end)[:, None] >= mx.arange(end)
    return mask[..., start:end, :]


def in_groups(mask: mx.array, group: int) -> mx.array:
    """The mask (..., group · block, keys) of queries of a group of heads one behind the other."""
    if mask.ndim < 3 or mask.shape[-3] == 1:
        return mx.concatenate([mask] * group, axis=-2)
    return mask.reshape(*mask.shape[:-3], mask.shape[-3] // group, -1, mask.shape[-1])


@contextmanager
def by_blocks() -> Iterator[None]:
    """While it lasts, models attend by blocks."""
    mx.fast.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = whole_attention
