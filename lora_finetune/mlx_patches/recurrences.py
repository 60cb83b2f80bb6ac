"""The recurrences of hybrids such as Qwen3.5 and Falcon-H1, one chunk of a text after another.

All but Mamba 2 are loops over tokens in mlx-lm, which in training keep several states for each
token; and the gradient of each token's slice is as large as the text's.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from lora_finetune.mlx_patches.activations import exp
from lora_finetune.mlx_patches.transforms import recompute

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.gated_delta import gated_delta_ops as gated_delta_by_tokens
from mlx_lm.models.ssm import ssm_attn as whole_ssm

Result = tuple[mx.array, mx.array]  # a recurrence's output and its state after it

CHUNK = 64  # tokens, a power of two
LEAST_G = 1e-20  # a smaller g is taken for this, and has no gradient: in float32 all is forgotten

# For each token of a chunk (rows) and each other (columns): 1 where that is before it, and −∞ where
# it is after it, else 0. Made by NumPy, since what MLX makes them with is a kernel each, and CUDA
# takes 3 s to compile one.
BEFORE = mx.array(np.tri(CHUNK, k=-1, dtype=np.float32))
MINUS_INFINITY_AFTER = mx.array(np.where(np.tri(CHUNK), 0, -np.inf).astype(np.float32))

# --- Chunk after chunk --------------------------------------------------------------------------


def in_chunks(
    function: Callable[..., Result], size: int, state: mx.array | None, sequences: list[mx.array]
) -> Result:
    """A recurrence over a text, which keeps the states between chunks and computes others again.

    Args:
        function: takes a chunk of each sequence, and the state if there is one. What else it uses
            gets no gradient.
        size: tokens of a chunk.
        sequences: (rows, length, …).
    """
    outputs, states = [], [] if state is None else [state]
    for chunk in zip(*(split(x, size, axis=1) for x in sequences), strict=True):
        y, *states = recompute(function)(*chunk, *states)
        outputs.append(y)
    return mx.concatenate(outputs, axis=1), *states


def split(x: mx.array, size: int, axis: int) -> tuple[mx.array, ...]:
    """An array in chunks along an axis, whose gradients are joined.

    MLX's gradient of a slice is as large as the array, with zeros around it.
    """

    @mx.custom_function
    def chunks(x: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.split(x, list(range(size, x.shape[axis], size)), axis))

    @chunks.vjp
    def gradient(_: mx.array, cotangents: tuple[mx.array, ...], __: object) -> mx.array:
        return mx.concatenate(cotangents, axis=axis)

    return chunks(x)


# --- The gated delta rule -----------------------------------------------------------------------


def gated_delta_by_chunks(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array,
    state: mx.array | None = None, mask: mx.array | None = None,
) -> Result:  # fmt: skip
    """As mlx_lm.models.gated_delta.gated_delta_ops, to float32 rounding.

    Only to 1e-3 where β is near 2 and keys repeat (OLMo hybrids let it), or where a Mac takes its
    float32 products in TF32; that is still less than bfloat16 rounds q, k and v. Where g has a key
    size too, it is mlx-lm's in chunks.

    Args:
        q, k: (rows, length, heads, key size); values can have more heads, a multiple.
        v: (rows, length, value heads, value size); g, beta: (rows, length, value heads).
        state: (rows, value heads, value size, key size), float32.
    """
    if mask is not None:  # in training there is none
        return gated_delta_by_tokens(q, k, v, g, beta, state, mask)
    if g.ndim == 4:
        return in_chunks(gated_delta_by_tokens, CHUNK, state, [q, k, v, g, beta])
    (rows, length, _, key_size), (heads, value_size) = k.shape, v.shape[-2:]
    state = mx.zeros((rows, heads, value_size, key_size)) if state is None else state

    def chunked(x: mx.array) -> mx.array:
        """(rows, value heads, chunks, CHUNK, …) float32; behind the text all is zero."""
        x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -length % CHUNK)] + [(0, 0)] * (x.ndim - 2))
        x = mx.repeat(x, heads // x.shape[2], axis=2) if x.shape[2] < heads else x
        return mx.unflatten(x.swapaxes(1, 2), 2, (-1, CHUNK))

    log_g = chunked(mx.log(mx.maximum(g.astype(mx.float32), LEAST_G)))
    arrays = without_state(chunked(q), chunked(k), chunked(v), log_g, chunked(beta)[..., None])
    outputs = []
    for chunk in zip(*(split(x, 1, axis=2) for x in arrays), strict=True):
        of_values, of_state, scores, gq, decayed_k, g = (x.squeeze(2) for x in chunk)
        before = state.swapaxes(-1, -2)
        u = of_values - of_state @ before
        outputs.append(gq @ before + scores @ u)
        state = g * state + u.swapaxes(-1, -2) @ decayed_k
    y = mx.concatenate(outputs, axis=2)[:, :, :length].swapaxes(1, 2)
    return y.astype(q.dtype), state


def without_state(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array
) -> tuple[mx.array, ...]:
    """All that needs no state in the gated delta rule, for all chunks at once.

    For each head, S_t = g_t S_{t−1} + u_t k_tᵀ, with u_t = β_t (v_t − g_t S_{t−1} k_t), and
    y_t = S_t q_t. Let G_t be the product of a chunk's g up to t, and S the state before it. Then
    the u of the chunk solve (I + A) U = β V − β G K Sᵀ, where A_ti = β_t k_t·k_i G_t / G_i for
    i < t. With (I + A)⁻¹ β V and (I + A)⁻¹ β G K at hand, what is left to do in turn is a few
    products a chunk (the WY form; Yang et al., "Gated Delta Networks", 2024).

    Args:
        q, k, v: (…, CHUNK, size); log_g: (…, CHUNK); beta: (…, CHUNK, 1).

    Returns:
        (I + A)⁻¹ β V; (I + A)⁻¹ β G K; q_t·k_i G_t / G_i for i ≤ t; G Q; K times the decay to the
        end of the chunk; and the G of its last token.
    """
    g = exp(mx.cumsum(log_g, axis=-1))[..., None]  # G
    # G_t / G_i, as a sum over what is between: of a quotient or a difference few digits are left.
    ratio = exp(mx.cumsum(log_g[..., None] * BEFORE, axis=-2) + MINUS_INFINITY_AFTER)
    inverse = unit_lower_inverse(beta * (k @ k.swapaxes(-1, -2)) * ratio * BEFORE)
    scores = (q @ k.swapaxes(-1, -2)) * ratio
    of_values, of_state = inverse @ (beta * v), inverse @ (beta * g * k)
    return of_values, of_state, scores, g * q, ratio[..., -1, :, None] * k, g[..., -1:, :]


# (CHUNK, CHUNK), 1 in the diagonal blocks of 1, 2, 4, … CHUNK, and what each has that the one
# before it has not.
BLOCKS = [np.kron(np.eye(CHUNK // n), np.ones((n, n))) for n in 2 ** np.arange(CHUNK.bit_length())]
ADDED = [mx.array(large - small, mx.float32) for small, large in pairwise(BLOCKS)]
IDENTITY = mx.array(BLOCKS[0], mx.float32)


@mx.custom_function
def unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + a)⁻¹ for strictly lower triangular a (…, CHUNK, CHUNK).

    From D, which has the inverses of the diagonal blocks of one size, those of twice that size are
    D − D M D, where M is what a has in the larger blocks and not in the smaller ones.
    """
    inverse = IDENTITY
    for added in ADDED:
        inverse = inverse - inverse @ (a * added) @ inverse
    return inverse


@unit_lower_inverse.vjp
def unit_lower_inverse_vjp(_: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    transposed = inverse.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)


# --- State space models and elementwise scans ---------------------------------------------------


def ssm_in_chunks(
    x: mx.array, a_log: mx.array, b: mx.array, c: mx.array, d: mx.array, dt: mx.array,
    dt_bias: mx.array, state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None, lengths: mx.array | None = None,
) -> Result:  # fmt: skip
    """As mlx_lm.models.ssm.ssm_attn, the state space model of Mamba 2."""

    def of_chunk(
        x: mx.array, b: mx.array, c: mx.array, dt: mx.array, state: mx.array | None = None
    ) -> Result:
        return whole_ssm(x, a_log, b, c, d, dt, dt_bias, state, time_step_limit, mask, lengths)

    if mask is not None or lengths is not None:  # in training there are none
        return of_chunk(x, b, c, dt, state)
    # Chunks of half of mlx-lm's size, since arrays in them are as large as its square.
    return in_chunks(of_chunk, 128, state, [x, b, c, dt])


def linear_scan(a: mx.array, b: mx.array, state: mx.array | None) -> mx.array:
    """h_t = a_t h_{t−1} + b_t for all t of axis 1, by doubling what is summed up.

    Args:
        a, b: (rows, length, …), of one shape.
        state: h_{−1} (rows, …), 0 if None.
    """
    reach = 1
    while reach < b.shape[1]:
        earlier = [(0, 0), (reach, 0)] + [(0, 0)] * (b.ndim - 2)
        b = b + a * mx.pad(b[:, :-reach], earlier)
        a = a * mx.pad(a[:, :-reach], earlier, constant_values=1)
        reach *= 2
    return b if state is None else b + a * state[:, None]


def rnn_scan_in_chunks(x: mx.array, a: mx.array, h0: mx.array | None) -> Result:
    """As mlx_lm.models.recurrent_gemma.rnn_scan, summed in float32."""

    def of_chunk(x: mx.array, a: mx.array, state: mx.array | None = None) -> Result:
        h = linear_scan(a.astype(mx.float32), x.astype(mx.float32), state)
        return h.astype(x.dtype), h[:, -1]

    y, state = in_chunks(of_chunk, CHUNK, h0, [x, a])
    return y, state.astype(x.dtype)


def jamba_ssm_in_chunks(
    self: nn.Module, x: mx.array, a: mx.array, state: mx.array | None = None
) -> Result:
    """As the method ssm_step of Jamba's mixer: the state space model of Mamba, in float32.

    With h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ, each of (channels, states), y_t = h_t C_t + D x_t.
    """

    def of_chunk(
        x: mx.array, delta: mx.array, b: mx.array, c: mx.array, state: mx.array | None = None
    ) -> Result:
        inputs = (delta * x)[..., None] * b[..., None, :]
        h = linear_scan(exp(delta[..., None] * a), inputs, state)
        return (h @ c[..., None]).squeeze(-1), h[:, -1]

    rank, states = self.time_step_rank, self.ssm_state_size
    delta, b, c = mx.split(self.x_proj(x), [rank, rank + states], axis=-1)
    delta = nn.softplus(self.dt_proj(self.dt_layernorm(delta)))
    sequences = [x, delta, self.b_layernorm(b), self.c_layernorm(c)]
    *sequences, a = (array.astype(mx.float32) for array in (*sequences, a))
    # Fewer tokens, since each has as many numbers as a state.
    y, state = in_chunks(of_chunk, CHUNK // 4, state, sequences)
    return y.astype(x.dtype) + self.D * x, state
