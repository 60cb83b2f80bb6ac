"""SwiGLU that keeps little, and exp on a Linux CPU, where MLX's takes 40 multiplications' time."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import activations

# Of x = k · log 2 + r, with |r| at most half of log 2, e^x is 2^k · e^r. Log 2 is in two parts, the
# first of so few bits that its product with k is exact (Cody and Waite). The polynomial for e^r is
# the minimax one of the Cephes library.
LOG2_HIGH, LOG2_LOW = 0.693359375, -2.12194440e-4
POLYNOMIAL = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0),
)
LEAST, MOST = -87.0, 88.0  # beyond them 2^k is no normal float32
ROUND = 1.5 * 2**23  # added and taken away again, it leaves the nearest integer


in_place = False  # whether `put_in_place` has put this exp in the place of MLX's


@mx.compile
def exp(x: mx.array) -> mx.array:
    """e^x; in place, that of float32 is made of multiplications and additions, to 1e-7.

    Below −87 and above 88 it stays what it is there, 1.6e-38 and 1.7e38.
    """
    if x.dtype != mx.float32 or not in_place:
        return mx.exp(x)
    x = mx.clip(x, LEAST, MOST)
    k = (x * 1.44269504 + ROUND) - ROUND
    r = x - k * LOG2_HIGH - k * LOG2_LOW
    e_r = POLYNOMIAL[0]
    for coefficient in POLYNOMIAL[1:]:
        e_r = e_r * r + coefficient
    exponent = (k.astype(mx.int32) + 127) * 2**23  # as float32 has it
    return e_r * exponent.view(mx.float32)


@mx.compile
def log_sum_exp(x: mx.array) -> mx.array:
    """log Σ e^x over the last axis."""
    if not in_place:
        return mx.logsumexp(x, axis=-1)
    most = mx.max(x, axis=-1, keepdims=True)
    return most[..., 0] + mx.log(exp(x - most).sum(axis=-1))


def sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + exp(-x)) if in_place else mx.sigmoid(x)


@mx.custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SiLU(gate) · x, with the gate's sigmoid computed again for the gradients and not kept."""
    return gate * sigmoid(gate) * x


@swiglu.vjp
def swiglu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    gate, x = primals
    part = sigmoid(gate)
    silu = gate * part
    return cotangent * x * (part + silu * (1 - part)), cotangent * silu


def put_in_place(slow_exp: bool) -> None:
    """Let models use this SwiGLU, before mlx-lm imports a model's own module.

    Args:
        slow_exp: whether MLX's exp is the slow one of a Linux CPU. Where MLX does not compile, it
            is none the less faster than this one.
    """
    global in_place
    in_place = slow_exp
    activations.swiglu = swiglu
