"""Attention that keeps queries, keys and values for its gradients, and no scores of a long text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

from lora_finetune import activations

import mlx.core as mx
import numpy as np

# For so many queries at a time. Half as many take little less memory, and on a GPU more time.
BLOCK = 256

# On CUDA, with cuDNN off, MLX has no kernel for attention, and copies keys and values for each head
# of a group that shares them; by hand the queries of a group stand one behind the other.
ON_CUDA = mx.cuda.is_available()

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
    after the block are left out.

    Args:
        queries: (rows, heads, length, size).
        keys, values: (rows, heads, length, size); their heads can be fewer, and the size of values
            another.
        mask: "causal", or an array (..., length, length). One of booleans lets each query see some
            key. One that is added may have gradients of its own, and is left to MLX.
    """
    length, scale = queries.shape[2], float(scale)
    is_array = isinstance(mask, mx.array)
    is_added = is_array and mask.dtype != mx.bool_
    is_faster_by_hand = ON_CUDA or activations.is_for(queries)
    by_hand = is_faster_by_hand and mask is not None and sinks is None
    shape = mask.shape[-2:] if is_array else (length, keys.shape[2])
    is_short = length <= BLOCK and not by_hand
    if options or is_added or is_short or shape != (length, length):
        return whole_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks, **options
        )

    def block_of(start: int, q: mx.array, k: mx.array, v: mx.array) -> tuple:
        """The queries of a block, the keys and values that they see, and the mask."""
        end = min(start + BLOCK, length)
        seen = length if mask is None or is_array else end
        block_mask = None if mask is None else mask_of(mask, start, end)
        return q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], block_mask

    def attend(q: mx.array, k: mx.array, v: mx.array, block_mask: mx.array | None) -> mx.array:
        if by_hand:
            return attention_by_hand(q, k, v, block_mask, scale)
        return whole_attention(q, k, v, scale=scale, mask=block_mask, sinks=sinks)

    if length <= BLOCK and ON_CUDA:  # the scores of one block are few; computed again, 4 % slower
        return attend(*block_of(0, queries, keys, values))

    @mx.custom_function
    def in_turn(*inputs: mx.array) -> mx.array:
        blocks = [attend(*block_of(0, *inputs))]
        for start in range(BLOCK, length, BLOCK):
            blocks.append(attend(*block_of(start, *mx.depends(inputs, blocks[-1:]))))
        return mx.concatenate(blocks, axis=2)

    @in_turn.vjp
    def gradients(inputs: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        of_queries, totals, ready = [], [], mx.depends(inputs, [cotangent])
        for start in reversed(range(0, length, BLOCK)):  # the last block is the one to see all keys
            of_block = cotangent[:, :, start : start + BLOCK]
            *block, block_mask = block_of(start, *ready)
            if sinks is None:
                found = block_gradients(*block, block_mask, of_block, scale)
            else:
                found = mx.vjp(partial(attend, block_mask=block_mask), block, [of_block])[1]
            of_queries.insert(0, found[0])
            totals = list(map(add_to_first_keys, totals, found[1:])) if totals else found[1:]
            ready = mx.depends(inputs, [found[0], *totals])
        return [mx.concatenate(of_queries, axis=2), *totals]

    return in_turn(queries, keys, values)


def attention_by_hand(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array, scale: float
) -> mx.array:
    """Attention with products, and the exp that is fast on a Linux CPU; the mask is of booleans."""
    # Not scale * q, which has the factors in the other order than MLX's gradient of it, so that on
    # a GPU there would be two kernels to compile.
    scaled = mx.multiply(scale, q)
    return (probabilities(in_groups(scaled, k), k, mask) @ v).reshape(*q.shape[:-1], -1)


def probabilities(q: mx.array, k: mx.array, mask: mx.array | None) -> mx.array:
    """The softmax of the scores under a mask of booleans; queries are scaled and in groups."""
    scores = q @ k.swapaxes(-1, -2)
    if mask is None:
        return mx.softmax(scores, axis=-1, precise=True)
    by_head = scores.reshape(*scores.shape[:2], -1, *mask.shape[-2:])
    if mask.ndim > 2:
        rows, heads = (1, 1, *mask.shape)[-4:-2]
        mask = mask.reshape(rows, *((1, 1) if heads == 1 else by_head.shape[1:3]), *mask.shape[-2:])
    return activations.masked_softmax(by_head, mask).reshape(scores.shape)


def block_gradients(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None, cotangent: mx.array, scale: float
) -> list[mx.array]:
    """The gradients to queries, keys and values, each of the type of what it is of."""
    grouped, of_output = in_groups(mx.multiply(scale, q), k), in_groups(cotangent, k)
    p = probabilities(grouped, k, mask)
    of_scores = activations.softmax_gradient(p, of_output @ v.swapaxes(-1, -2))
    return [
        mx.multiply(scale, of_scores @ k).reshape(q.shape).astype(q.dtype),
        (of_scores.swapaxes(-1, -2) @ grouped).astype(k.dtype),
        (p.swapaxes(-1, -2) @ of_output).astype(v.dtype),
    ]


def add_to_first_keys(total: mx.array, part: mx.array) -> mx.array:
    """A total (rows, heads, keys, size) with a part added that is of the first keys only."""
    seen, length = part.shape[2], total.shape[2]
    if seen == length:
        return total + part
    return mx.concatenate([total[:, :, :seen] + part, total[:, :, seen:]], axis=2)


def in_groups(x: mx.array, keys: mx.array) -> mx.array:
    """(rows, heads of the keys, queries of a group of heads one behind the other, size)."""
    return x.reshape(*keys.shape[:2], -1, x.shape[-1])


def mask_of(mask: str | mx.array, start: int, end: int) -> mx.array:
    """The mask (..., block, keys) of a block of queries; if causal, for the keys up to its end."""
    if isinstance(mask, mx.array):
        return mask[..., start:end, :]
    blocks = -(-end // BLOCK)
    keys = BLOCK << (blocks - 1).bit_length()  # few sizes, of which each takes its memory
    first = keys - BLOCK - start  # what the last block sees, from here on the block at start does
    return causal_mask(BLOCK, keys)[: end - start, first : first + end]


@cache
def causal_mask(queries: int, keys: int) -> mx.array:
    """Which keys the last queries of a text see: made once, and not for each layer anew."""
    return mx.array(np.tri(queries, keys, keys - queries, dtype=bool))


@contextmanager
def by_blocks() -> Iterator[None]:
    """While it lasts, models attend by blocks."""
    mx.fast.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = whole_attention
