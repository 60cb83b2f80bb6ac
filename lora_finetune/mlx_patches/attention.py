"""Attention that keeps queries, keys and values for its gradients, and no scores of a long text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from lora_finetune.mlx_patches import activations
from lora_finetune.mlx_patches.activations import scaled_product
from lora_finetune.mlx_patches.low_memory import in_turn

import mlx.core as mx
import numpy as np

# Queries per block. Half as many take little less memory, and on a GPU more time.
BLOCK = 256

# On CUDA, with cuDNN off, MLX has no kernel for attention, and copies keys and values for each head
# of a group that shares them; by hand the queries of a group stand one behind the other.
ON_CUDA = mx.cuda.is_available()

whole_attention = mx.fast.scaled_dot_product_attention


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float,
    mask: str | mx.array | None = None, sinks: mx.array | None = None, **options: object,
) -> mx.array:  # fmt: skip
    """As mx.fast.scaled_dot_product_attention, one block of queries after another.

    For the gradients the scores of a block are computed again. Under a causal mask, keys after the
    block are left out.

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
    blocks = Blocks(scale, mask, sinks, by_hand, mx.result_type(queries, keys))
    inputs = queries, keys, mx.contiguous(values)  # which each product would copy otherwise
    if length <= BLOCK and ON_CUDA:  # the scores of one block are few; computed again, 4 % slower
        [(q, k, v, bias)] = blocks.of(inputs, (0,), blocks.added)
        return keeping_probabilities(q, k, v, bias, scale)
    function = mx.custom_function(blocks.forward)
    function.vjp(blocks.gradients)
    return function(*inputs)


class Blocks(NamedTuple):
    """One call of attention, by blocks of queries.

    Attributes:
        added: the type of what a mask adds to the scores.
    """

    scale: float
    mask: str | mx.array | None
    sinks: mx.array | None
    by_hand: bool
    added: mx.Dtype

    def forward(self, *inputs: mx.array) -> mx.array:
        starts = range(0, inputs[0].shape[2], BLOCK)
        blocks = self.of(inputs, starts, self.added if self.by_hand else mx.bool_)
        return mx.concatenate(in_turn(self.attend, blocks), axis=2)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
    ) -> mx.array:
        if self.by_hand:
            return weighted_values(probabilities(q, k, self.scale, mask), v, q)
        return whole_attention(q, k, v, scale=self.scale, mask=mask, sinks=self.sinks)

    def gradients(
        self, inputs: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> list[mx.array]:
        totals: list[mx.array] = []

        def of_block(of_output: mx.array, *block: mx.array) -> list[mx.array]:
            nonlocal totals
            q, k, v, *mask = block
            if self.sinks is None:
                p = probabilities(q, k, self.scale, *mask)
                found = gradients_by_hand(p, q, k, v, of_output, self.scale)
            else:
                found = mx.vjp(lambda *qkv: self.attend(*qkv, *mask), [q, k, v], [of_output])[1]
            of_queries, *others = found
            totals = list(map(add_to_first_keys, totals, others)) if totals else others
            return [of_queries, *totals]

        ready = mx.depends(inputs, [cotangent])  # computed again, as in `recompute`
        last_first = range(0, cotangent.shape[2], BLOCK)[::-1]  # the last block sees all keys
        blocks = self.of(ready, last_first, self.added if self.sinks is None else mx.bool_)
        of_outputs = (cotangent[:, :, start : start + BLOCK] for start in last_first)
        chunks = ([of_output, *block] for of_output, block in zip(of_outputs, blocks, strict=True))
        of_queries = [result[0] for result in in_turn(of_block, chunks)]
        return [mx.concatenate(of_queries[::-1], axis=2), *totals]

    def of(
        self, inputs: Iterable[mx.array], starts: Iterable[int], dtype: mx.Dtype
    ) -> Iterator[list[mx.array]]:
        """The queries of each block, the keys and values that they see, and the mask if any."""
        q, k, v = inputs
        length = q.shape[2]
        for start in starts:
            end = min(start + BLOCK, length)
            seen = end if isinstance(self.mask, str) else length
            mask = [] if self.mask is None else [mask_of(self.mask, start, end, dtype)]
            if mask and length > BLOCK:
                # Else, compiled, what is made of the masks would be kept for all layers.
                mask = mx.depends(mask, [q])
            yield [q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], *mask]


def keeping_probabilities(
    q: mx.array, k: mx.array, v: mx.array, bias: mx.array, scale: float
) -> mx.array:
    """Attention by hand whose softmax is kept for the gradients."""

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        p = probabilities(q, k, scale, bias)
        return weighted_values(p, v, q), p

    @forward.vjp
    def gradients(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        return gradients_by_hand(outputs[1], *inputs, cotangents[0], scale)

    return forward(q, k, v)[0]


def probabilities(q: mx.array, k: mx.array, scale: float, bias: mx.array | None = None) -> mx.array:
    """The softmax of the scores, for queries in groups; the bias is what a mask adds to them."""
    added = None if bias is None else for_groups(bias, q, k)
    return activations.softmax(scaled_product(in_groups(q, k), k.swapaxes(-1, -2), scale, added))


def weighted_values(p: mx.array, v: mx.array, q: mx.array) -> mx.array:
    """(rows, heads of the queries, queries, size)."""
    return (p @ v).reshape(*q.shape[:-1], -1)


def gradients_by_hand(
    p: mx.array, q: mx.array, k: mx.array, v: mx.array, cotangent: mx.array, scale: float
) -> list[mx.array]:
    """The gradients to queries, keys and values, each of its input's type."""
    of_output = mx.contiguous(in_groups(cotangent, k))
    of_scores = activations.softmax_gradient(p, of_output @ v.swapaxes(-1, -2))
    return [
        scaled_product(of_scores, k, scale).reshape(q.shape).astype(q.dtype),
        scaled_product(of_scores.swapaxes(-1, -2), in_groups(q, k), scale).astype(k.dtype),
        (p.swapaxes(-1, -2) @ of_output).astype(v.dtype),
    ]


def add_to_first_keys(total: mx.array, first: mx.array) -> mx.array:
    """The sum of totals (rows, heads, keys, size) and what is added to the first keys only."""
    seen = first.shape[2]
    if seen == total.shape[2]:
        return total + first
    return mx.concatenate([total[:, :, :seen] + first, total[:, :, seen:]], axis=2)


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
    keys = BLOCK << (blocks - 1).bit_length()  # few sizes, since each takes memory
    first = keys - BLOCK - start  # what the last block sees, the block at start sees from here on
    return causal_mask(BLOCK, keys, dtype)[: end - start, first : first + end]


@cache
def causal_mask(queries: int, keys: int, dtype: mx.Dtype) -> mx.array:
    """Which keys the last queries of a text see: made once, and not for each layer anew."""
    seen = np.tri(queries, keys, keys - queries, dtype=bool)
    return mx.array(seen if dtype == mx.bool_ else np.where(seen, 0, -np.inf), dtype)
