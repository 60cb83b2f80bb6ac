"""Attention that keeps queries, keys and values for its gradients, and no scores of a long text."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import cache, partial
from typing import NamedTuple

from lora_finetune.mlx_patches import activations
from lora_finetune.mlx_patches.activations import scaled_product
from lora_finetune.mlx_patches.transforms import in_turn

import mlx.core as mx
import numpy as np

ON_CUDA = mx.cuda.is_available()

# MLX's kernels for attention and its gradients, cuDNN's, are the fastest on CUDA, but their
# gradients differ in the last bits from run to run; the attention itself does not. Without them
# (MLX_CUDA_USE_CUDNN_SDPA=0, MLX's own setting) and where a kernel lacks something, it copies keys
# and values for each head of a group that shares them. Here the queries of a group stand one behind
# the other.
USES_CUDNN = ON_CUDA and os.environ.get("MLX_CUDA_USE_CUDNN_SDPA") != "0"
# The kernel for gradients takes lengths that are multiples of 128 (MLX 0.32.4,
# ScaledDotProductAttentionVJP::use_fallback); up to 128 it is no faster.
KERNEL_MULTIPLE, LEAST_FOR_KERNELS = 128, 256

# Queries per block. Half as many take little less memory, and on a GPU more time. Of texts beyond
# LONG, blocks of twice as many are 4 to 18 % faster on CUDA, in 1 % more memory.
BLOCK = 256
LONG = 1024 if ON_CUDA else math.inf

whole_attention = mx.fast.scaled_dot_product_attention


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float,
    mask: str | mx.array | None = None, sinks: mx.array | None = None, **options: object,
) -> mx.array:  # fmt: skip
    """As mx.fast.scaled_dot_product_attention, one block of queries after another.

    For the gradients the scores of a block are computed again. Under a causal mask, keys after the
    block are left out. A mask other than "causal" or booleans (length, length) is left to MLX; one
    that is added may have gradients of its own. What MLX has kernels of cuDNN for is left to them:
    all, or all but the gradients.

    Args:
        queries, keys, values: (rows, heads, length, size); the heads of keys and values can be
            fewer, and the size of values another.
    """
    length, scale = queries.shape[2], float(scale)
    whole = partial(whole_attention, scale=scale, mask=mask, sinks=sinks, **options)
    is_fused = not isinstance(mask, mx.array) and has_kernel(queries, keys, values)
    if is_fused and length >= LEAST_FOR_KERNELS and length % KERNEL_MULTIPLE == 0:
        return whole(queries, keys, values)
    by_hand = sinks is None and (ON_CUDA or activations.uses_fast_exp(queries))
    is_known = mask is not None and keys.shape[2] == length
    if isinstance(mask, mx.array):
        is_known = mask.dtype == mx.bool_ and mask.shape == (length, length)
    size = BLOCK if length <= LONG else 2 * BLOCK
    if options or not is_known or (length <= size and not by_hand):
        return whole(queries, keys, values)
    blocks = Blocks(size, scale, mask, sinks, by_hand)
    inputs = queries, keys, mx.contiguous(values)  # which each product would copy otherwise
    if length <= size and ON_CUDA:  # the scores of one block are few; computed again, 4 % slower
        return keeping_probabilities(*blocks.block(inputs, 0), scale)
    function = mx.custom_function(whole if is_fused else blocks.forward)
    function.vjp(blocks.gradients)
    return function(*inputs)


def repeats() -> str | None:
    """What to say on CUDA of whether runs repeat to the last bit; None elsewhere, where they do."""
    if not ON_CUDA:
        return None
    if USES_CUDNN:
        return (
            "attention is cuDNN's, whose gradients differ in the last bits from run to run; "
            "MLX_CUDA_USE_CUDNN_SDPA=0 in the environment repeats them, which takes longer"
        )
    return "attention is without cuDNN (MLX_CUDA_USE_CUDNN_SDPA=0), so runs repeat to the last bit"


def has_kernel(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether MLX has a kernel for attention of such types and sizes, but for its gradients."""
    if not USES_CUDNN:
        return False
    try:
        whole_attention(queries, keys, values, scale=1.0, force_fused=True)
    except ValueError:
        return False
    return True


class Blocks(NamedTuple):
    """One call of attention, by blocks of queries."""

    size: int  # queries per block
    scale: float
    mask: str | mx.array
    sinks: mx.array | None
    by_hand: bool

    def block(self, inputs: Iterable[mx.array], start: int) -> list[mx.array]:
        """The queries of a block, the keys and values that they see, and the mask as a bias."""
        q, k, v = inputs
        length = q.shape[2]
        end = min(start + self.size, length)
        seen = end if isinstance(self.mask, str) else length
        bias = bias_of(self.mask, start, end, self.size, mx.result_type(q, k))
        if length > self.size:
            # Else, compiled, what is made of the masks would be kept for all layers.
            (bias,) = mx.depends([bias], [q])
        return [q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], bias]

    def attend(self, q: mx.array, k: mx.array, v: mx.array, bias: mx.array) -> mx.array:
        if self.by_hand:
            return (probabilities(q, k, bias, self.scale) @ v).reshape(*q.shape[:-1], -1)
        return whole_attention(q, k, v, scale=self.scale, mask=bias, sinks=self.sinks)

    def forward(self, *inputs: mx.array) -> mx.array:
        starts = range(0, inputs[0].shape[2], self.size)
        return mx.concatenate(in_turn(self.attend, (self.block(inputs, s) for s in starts)), axis=2)

    def gradients(
        self, inputs: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> list[mx.array]:
        inputs = mx.depends(inputs, [cotangent])  # computed again, as in `recompute`
        of_queries, totals = [], []
        for start in range(0, cotangent.shape[2], self.size)[::-1]:  # the last block sees all keys
            block = [cotangent[:, :, start : start + self.size], *self.block(inputs, start)]
            if totals:
                block = mx.depends(block, [of_queries[-1], *totals])  # one block at a time
            found, *others = self.gradients_of_block(*block)
            totals = list(map(add_to_first_keys, totals, others)) if totals else others
            of_queries.append(found)
        return [mx.concatenate(of_queries[::-1], axis=2), *totals]

    def gradients_of_block(
        self, cotangent: mx.array, q: mx.array, k: mx.array, v: mx.array, bias: mx.array
    ) -> list[mx.array]:
        if self.sinks is None:
            p = probabilities(q, k, bias, self.scale)
            return gradients_by_hand(p, q, k, v, cotangent, self.scale)
        return mx.vjp(lambda *qkv: self.attend(*qkv, bias), [q, k, v], [cotangent])[1]


def keeping_probabilities(
    q: mx.array, k: mx.array, v: mx.array, bias: mx.array, scale: float
) -> mx.array:
    """Attention by hand whose softmax is kept for the gradients."""

    @mx.custom_function
    def forward(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        p = probabilities(q, k, bias, scale)
        return (p @ v).reshape(*q.shape[:-1], -1), p

    @forward.vjp
    def gradients(inputs: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        return gradients_by_hand(outputs[1], *inputs, cotangents[0], scale)

    return forward(q, k, v)[0]


def probabilities(q: mx.array, k: mx.array, bias: mx.array, scale: float) -> mx.array:
    """The softmax of the scores (rows, heads of the keys, queries `in_groups`, keys)."""
    bias = mx.contiguous(mx.tile(bias, (q.shape[1] // k.shape[1], 1)))  # as MLX's product wants it
    return activations.softmax(scaled_product(in_groups(q, k), k.swapaxes(-1, -2), scale, bias))


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


def bias_of(mask: str | mx.array, start: int, end: int, size: int, dtype: mx.Dtype) -> mx.array:
    """What is added to the scores of a block (queries, keys): −∞ for keys not seen, else 0."""
    if isinstance(mask, mx.array):
        return mx.where(mask[start:end], mx.array(0, dtype), mx.array(-mx.inf, dtype))
    blocks = -(-end // size)
    keys = size << (blocks - 1).bit_length()  # few sizes, since each takes memory
    first = keys - size - start  # what the last block sees, the block at start sees from here on
    return causal_bias(size, keys, dtype)[: end - start, first : first + end]


@cache
def causal_bias(queries: int, keys: int, dtype: mx.Dtype) -> mx.array:
    """`bias_of` the last queries of a text: made once, and not for each layer anew."""
    return mx.array(np.where(np.tri(queries, keys, keys - queries), 0, -np.inf), dtype)
