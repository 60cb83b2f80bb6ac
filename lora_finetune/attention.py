"""Attention that keeps queries, keys and values for its gradients, and nothing of length²."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lora_finetune import fast_exp

import mlx.core as mx

# For so many queries at a time. Half as many take little less memory, and on a GPU more time.
BLOCK = 256

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
    """As mx.fast.scaled_dot_product_attention, block by block of the queries of a text.

    For the gradients the scores of a block are computed again. Under a causal mask, keys behind the
    block are left out.

    Args:
        queries: (rows, heads, length, size).
        keys, values: (rows, heads, length, size); their heads can be fewer.
        mask: "causal", or an array (..., length, length).
    """
    rows, heads, length, size = queries.shape
    shape = mask.shape[-2:] if isinstance(mask, mx.array) else (length, keys.shape[2])
    is_bool = (
        mask == "causal" if isinstance(mask, str) else mask is not None and mask.dtype == mx.bool_
    )
    by_hand = fast_exp.in_place and is_bool and sinks is None
    if shape != (length, length) or options or (length <= BLOCK and not by_hand):
        return whole_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks, **options
        )

    def attend(q: mx.array, k: mx.array, v: mx.array, *masks: mx.array) -> mx.array:
        if by_hand:
            return attention_by_hand(q, k, v, scale, *masks)
        return whole_attention(q, k, v, scale=scale, mask=[*masks, None][0], sinks=sinks)

    attend = mx.checkpoint(attend) if length > BLOCK else attend
    # On a GPU the queries of a group, which have the same keys, are put one behind the other. Else
    # the keys would be copied for each.
    group = 1 if by_hand or sinks is not None else heads // keys.shape[1]
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        seen = end if isinstance(mask, str) else length
        q = queries[:, :, start:end].reshape(rows, heads // group, -1, size)
        masks = [in_groups(mask_of(mask, start, end), group)] if mask is not None else []
        block = attend(q, keys[:, :, :seen], values[:, :, :seen], *masks)
        blocks.append(block.reshape(rows, heads, end - start, -1))
    return mx.concatenate(blocks, axis=2) if len(blocks) > 1 else blocks[0]


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
