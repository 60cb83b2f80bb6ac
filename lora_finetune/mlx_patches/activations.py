"""Activations and softmax that keep little, and an exp for Linux CPUs, where MLX's is slow."""

from __future__ import annotations

import math
from functools import cache

from lora_finetune.base import linux_cpu
from lora_finetune.mlx_patches.transforms import recompute

import mlx.core as mx
import numpy as np

# With x = k · log 2 + r and |r| at most half of log 2, e^x is 2^k · e^r. Log 2 is in two terms, the
# first of so few bits that its product with k is exact (Cody and Waite). The polynomial for e^r,
# from the constant up, was fitted for the least relative error, 1.9e-9.
LOG2_HIGH, LOG2_LOW = 0.693359375, -2.12194440e-4
POLYNOMIAL = (
    *(1.0, 1.000000036, 0.4999999208, 0.1666642015),
    *(0.04166822584, 0.008374817281, 0.001383683518),
)
LEAST, MOST = -88.0, 88.0  # at the first k is −127, and with that exponent the float32 is 0
ROUND, ROUND_BITS = 1.5 * 2**23, 0x4B400000  # added, it leaves the nearest integer as last bits


@cache
def has_slow_exp() -> bool:
    """Whether MLX's exp is the slow one of a Linux CPU.

    Where MLX cannot compile, which this turns off then, it is nevertheless faster than ours.
    """
    return mx.default_device() == mx.cpu and linux_cpu.can_compile()


def uses_fast_exp(x: mx.array) -> bool:
    return has_slow_exp() and x.dtype == mx.float32


@mx.custom_function
@mx.compile
def exp(x: mx.array) -> mx.array:
    """e^x; on a Linux CPU and in float32 by multiplications and additions, to 2e-7.

    Below −87.7 it is 0, and above 88 it stays what it is there, 1.7e38. The polynomial is taken in
    pairs and not term after term, so that MLX fuses all but the exponent into one loop.
    """
    if not uses_fast_exp(x):
        return mx.exp(x)
    x = mx.clip(x, LEAST, MOST)
    rounded = x * 1.44269504 + ROUND
    exponent = (rounded.view(mx.int32) - ROUND_BITS + 127) * 2**23  # as float32 has it
    k = rounded - ROUND
    r = x - k * LOG2_HIGH - k * LOG2_LOW
    c, r2 = POLYNOMIAL, r * r
    low, middle = c[0] + c[1] * r, c[2] + c[3] * r
    high = (c[4] + c[5] * r) + c[6] * r2
    return (low + r2 * middle + (r2 * r2) * high) * exponent.view(mx.float32)


@exp.vjp
def exp_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


@mx.compile
def log_sum_exp(x: mx.array) -> mx.array:
    """log Σ e^x over the last axis."""
    if not uses_fast_exp(x):
        return mx.logsumexp(x, axis=-1)
    most = mx.max(x, axis=-1, keepdims=True)
    return most[..., 0] + mx.log(exp(x - most).sum(axis=-1))


def softmax(x: mx.array) -> mx.array:
    """e^x over its sum on the last axis."""
    if not uses_fast_exp(x):
        return mx.softmax(x, axis=-1, precise=True)
    powers = exp(x - mx.max(x, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@mx.compile
def weighted_rest(p: mx.array, dp: mx.array, *sums: mx.array) -> mx.array:
    """p · (dp − all sums), in float32 and then of the type of p."""
    rest = dp.astype(mx.float32)
    for each in sums:  # one by one: their sum would be rounded, and what is left can be less
        rest = rest - each
    return (p * rest).astype(p.dtype)


def softmax_gradient(p: mx.array, dp: mx.array) -> mx.array:
    """The gradient p · (dp − Σ p · dp) to the input of a softmax p (..., rows, columns).

    In a row with nearly all in one place next to nothing is left, so Σ p · dp has to be right for
    this p, rounded as it is and with a sum that is not quite 1. A first sum is rounded to the type
    of p; a second one, of what the first leaves of dp, makes up for that: in the one place dp and
    the first sum are so close that their difference is exact. The sums are products with ones, and
    what is summed is computed as the gradient is: one kernel for CUDA to compile.
    """
    # Each of another shape: mx.compile would take equal arrays for one, and make a kernel for that.
    sums = [mx.zeros((1,)), mx.zeros((1, 1))]
    for i in range(2):
        found = (weighted_rest(p, dp, *sums) @ ones(p.shape[-1], p.dtype)).astype(mx.float32)
        # Else, compiled, dp in float32 would be kept for all sums, and the kernel for the gradient
        # would be another one, with the cast of the last sum in it.
        p, dp, sums[i] = mx.depends([p, dp, found], [found])
    return weighted_rest(p, dp, *sums)


@cache
def ones(length: int, dtype: mx.Dtype) -> mx.array:
    """(length, 1), made once."""
    return mx.array(np.ones((length, 1)), dtype)


def scaled_product(
    a: mx.array, b: mx.array, scale: float, added: mx.array | None = None
) -> mx.array:
    """scale · (a b) + added in one pass, and one kernel for CUDA to compile."""
    if added is None:
        added = mx.zeros(b.shape[-1], b.dtype)  # mx.addmm cannot do without
    return mx.addmm(added, a, b, alpha=scale)


def sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + exp(-x)) if uses_fast_exp(x) else mx.sigmoid(x)


@recompute
def silu(x: mx.array) -> mx.array:
    return x * sigmoid(x)


@recompute
def gelu_approx(x: mx.array) -> mx.array:
    """GELU with tanh, in float32: (1 + tanh u) / 2 is the sigmoid of 2 u."""
    wide = x.astype(mx.float32)
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (wide * sigmoid(2 * u)).astype(x.dtype)


@mx.custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SiLU(gate) · x; its gradients by hand have fewer passes than `recompute` makes."""
    return gate * sigmoid(gate) * x


@swiglu.vjp
def swiglu_vjp(inputs: tuple, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, x = inputs
    (gate,) = mx.depends([gate], [cotangent])  # computed again, as in `recompute`
    s = sigmoid(gate)
    silu = gate * s
    of_gate = cotangent * x * (s + silu * (1 - s))
    if mx.default_device() == mx.gpu:
        # Two gradients of one expression are two kernels and what is between them in memory; of two
        # expressions they are one kernel each, and the second is that of the forward pass.
        (gate,) = mx.depends([gate], [of_gate])
        silu = gate * sigmoid(gate)
    return of_gate, silu * cotangent
