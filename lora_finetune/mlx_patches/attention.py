"""Attention that keeps queries, keys and values for its gradients, and no scores of a long text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

from lora_finetune.mlx_patches import activations
from lora_finetune.mlx_patches.activations import scaled_product

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
    is_faster_by_hand = ON_CUDA or activations.uses_fast_exp(queries)
    by_hand = is_faster_by_hand and mask is not None and sinks is None
    shape = mask.shape[-2:] if is_array else (length, keys.shape[2])
    is_short = length <= BLOCK and not by_hand
    if options or is_added or is_short or shape != (length, length):
        return whole_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks, **options
        )

    added = mx.result_type(queries, keys)  # of what a mask adds to the scores
    values = mx.contiguous(values)  # which are turned, so that each product would copy them

    def block_of(start: int, q: mx.array, k: mx.array, v: mx.array, dtype: mx.Dtype) -> tuple:
        """The queries of a block, the keys and values that they see, and the mask."""
        end = min(start + BLOCK, length)
        seen = length if mask is None or is_array else end
        block_mask = None if mask is None else mask_of(mask, start, end, dtype)
        if block_mask is not None and length > BLOCK:
            # Else, compiled, what is made of the masks of all blocks would be kept for all layers.
            (block_mask,) = mx.depends([block_mask], [q])
        return q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], block_mask

    def attend(q: mx.array, k: mx.array, v: mx.array, block_mask: mx.array | None) -> mx.array:
        if by_hand:
            return attention_by_hand(q, k, v, block_mask, scale)
        return whole_attention(q, k, v, scale=scale, mask=block_mask, sinks=sinks)

    forward_block = partial(block_of, dtype=added if by_hand else mx.bool_)
    if length <= BLOCK and ON_CUDA:  # the scores of one block are few; computed again, 4 % slower
        return attend(*forward_block(0, queries, keys, values))

    @mx.custom_function
    def in_turn(*inputs: mx.array) -> mx.array:
        blocks = [attend(*forward_block(0, *inputs))]
        for start in range(BLOCK, length, BLOCK):
            blocks.append(attend(*forward_block(start, *mx.depends(inputs, blocks[-1:]))))
        return mx.concatenate(blocks, axis=2)

    @in_turn.vjp
    def gradients(inputs: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        of_queries, totals, ready = [], [], mx.depends(inputs, [cotangent])
        for start in reversed(range(0, length, BLOCK)):  # the last block is the one to see all keys
            of_block = cotangent[:, :, start : start + BLOCK]
            if sinks is None:
                *block, bias = block_of(start, *ready, dtype=added)
                p = probabilities(*block[:2], bias, scale)
                found = gradients_by_hand(p, *block, of_block, scale)
            else:
                *block, block_mask = forward_block(start, *ready)
                found = mx.vjp(partial(attend, block_mask=block_mask), block, [of_block])[1]
            of_queries.insert(0, found[0])
            totals = list(map(add_to_first_keys, totals, found[1:])) if totals else found[1:]
            ready = mx.depends(inputs, [found[0], *totals])
        return [mx.concatenate(of_queries, axis=2), *totals]

    return in_turn(queries, keys, values)


def attention_by_hand(
    q: mx.array, k: mx.array, v: mx.array, bias: mx.array | None, scale: float
) -> mx.array:
    """Attention with products, and the exp that is fast on a Linux CPU; the softmax is kept."""

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        p = probabilities(q, k, bias, scale)
        return (p @ v).reshape(*q.shape[:-1], -1), p

    @forward.vjp
    def gradients(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        return gradients_by_hand(outputs[1], *inputs, cotangents[0], scale)

    return forward(q, k, v)[0]


def probabilities(q: mx.array, k: mx.array, bias: mx.array | None, scale: float) -> mx.array:
    """The softmax of the scores, of queries in groups; the bias is what a mask adds to them."""
    added = None if bias is None else for_groups(bias, q, k)
    scores = scaled_product(in_groups(q, k), k.swapaxes(-1, -2), scale, added)
    return activations.softmax(scores)


def gradients_by_hand(
    p: mx.array, q: mx.array, k: mx.array, v: mx.array, cotangent: mx.array, scale: float
) -> list[mx.array]:
    """The gradients to queries, keys and values, each of the type of what it is of."""
    of_output = mx.contiguous(in_groups(cotangent, k))
    of_scores = activations.softmax_gradient(p, of_output @ v.swapaxes(-1, -2))
    return [
        scaled_product(of_scores, k, scale).reshape(q.shape).astype(q.dtype),
        scaled_product(of_scores.swapaxes(-1, -2), in_groups(q, k), scale).astype(k.dtype),
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


def for_groups(bias: mx.array, q: mx.array, k: mx.array) -> mx.array:
    """A bias (..., queries, keys) for queries in groups, contiguous, as MLX's product wants it."""
    rows, heads, *of_head = (1, 1, *bias.shape)[-4:]
    if heads == 1:
        group = q.shape[1] // k.shape[1]
        bias = mx.broadcast_to(bias.reshape(rows, 1, 1, *of_head), (rows, 1, group, *of_head))
    heads = min(heads, k.shape[1])
    return mx.contiguous(bias.reshape(rows, heads, -1, of_head[1]))


def mask_of(mask: str | mx.array, start: int, end: int, dtype: mx.Dtype) -> mx.array:
    """The mask (..., block, keys) of a block of queries; if causal, for the keys up to its end.

    Args:
        dtype: of booleans, or of what is added to the scores.
    """
    if isinstance(mask, mx.array):
        mask = mask[..., start:end, :]
        if dtype == mx.bool_:
            return mask
        return mx.where(mask, mx.array(0, dtype), mx.array(-mx.inf, dtype))
    blocks = -(-end // BLOCK)
    keys = BLOCK << (blocks - 1).bit_length()  # few sizes, of which each takes its memory
    first = keys - BLOCK - start  # what the last block sees, from here on the block at start does
    return causal_mask(BLOCK, keys, dtype)[: end - start, first : first + end]


@cache
def causal_mask(queries: int, keys: int, dtype: mx.Dtype) -> mx.array:
    """Which keys the last queries of a text see: made once, and not for each layer anew."""
    seen = np.tri(queries, keys, keys - queries, dtype=bool)
    return mx.array(seen if dtype == mx.bool_ else np.where(seen, 0, -np.inf), dtype)


@contextmanager
def by_blocks() -> Iterator[None]:
    """While it lasts, models attend by blocks."""
    mx.fast.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = whole_attention
