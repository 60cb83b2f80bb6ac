"""The gated delta rule of hybrids such as Qwen3-Next, Qwen3.5 and Kimi Linear, chunk by chunk.

mlx-lm trains through a loop over tokens, which keeps several states of a layer for each of them:
some MB a token. For a chunk of tokens the rule is a few matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lora_finetune.activations import exp

import mlx.core as mx
from mlx_lm.models import gated_delta

CHUNK = 64  # tokens, a power of two
LEAST_G = 1e-20  # a state of which less is left is gone in float32; below, g is taken for this

token_by_token = gated_delta.gated_delta_ops


def chunk_by_chunk(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """As mlx_lm.models.gated_delta.gated_delta_ops, in float32.

    For each head, S_t = g_t S_{t−1} + u_t k_tᵀ, with u_t = β_t (v_t − g_t S_{t−1} k_t), and
    y_t = S_t q_t. Let G_t be the product of a chunk's g up to t, and S the state before it. Then
    the u of the chunk solve (I + A) U = β V − β G K Sᵀ, where A_ti = β_t k_t·k_i G_t / G_i for
    i < t: once for all states, U = V' − W Sᵀ (the WY form; Yang et al., "Gated Delta Networks",
    2024).

    Args:
        q, k: (rows, length, heads, key size); values can have more heads, a multiple.
        v: (rows, length, value heads, value size).
        g, beta: (rows, length, value heads). Where g has a key size too, or there is a mask, pieces
            of the text are gone through token by token, and again for their gradients.
        state: (rows, value heads, value size, key size).

    Returns:
        (rows, length, value heads, value size) of q's type, and the state after it, float32.
    """
    (rows, length, _, key_size), (heads, value_size) = k.shape, v.shape[-2:]
    if state is None:
        state = mx.zeros((rows, heads, value_size, key_size))
    if g.ndim == 4 or mask is not None:
        return in_pieces(q, k, v, g, beta, state, mask)

    def chunks(x: mx.array) -> mx.array:
        """(rows, value heads, chunks, CHUNK, …) float32; behind the text all is zero."""
        x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -length % CHUNK)] + [(0, 0)] * (x.ndim - 2))
        x = mx.repeat(x, heads // x.shape[2], axis=2) if x.shape[2] < heads else x
        return mx.unflatten(x.swapaxes(1, 2), 2, (-1, CHUNK))

    dtype = q.dtype
    log_g = chunks(mx.log(mx.maximum(g.astype(mx.float32), LEAST_G)))
    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta)[..., None]
    g = exp(mx.cumsum(log_g, axis=-1))[..., None]  # G
    # G_t / G_i, as a sum over what is between: of a quotient or a difference few digits are left.
    between = mx.cumsum(mx.where(mx.tri(CHUNK, k=-1) > 0, log_g[..., None], 0), axis=-2)
    ratio = exp(mx.where(mx.tri(CHUNK) > 0, between, -mx.inf))
    inverse = unit_lower_inverse(mx.tril(beta * (k @ k.swapaxes(-1, -2)) * ratio, -1))
    of_values, of_state = inverse @ (beta * v), inverse @ (beta * g * k)
    scores, q, k = (q @ k.swapaxes(-1, -2)) * ratio, g * q, ratio[..., -1, :, None] * k
    outputs = []
    arrays = (of_values, of_state, q, k, scores, g[..., -1:, :])
    for chunk in zip(*(pieces(x, 1, axis=2) for x in arrays), strict=True):
        of_values, of_state, q, k, scores, g = (x.squeeze(2) for x in chunk)
        before = state.swapaxes(-1, -2)
        u = of_values - of_state @ before
        outputs.append(q @ before + scores @ u)
        state = g * state + u.swapaxes(-1, -2) @ k
    y = mx.concatenate(outputs, axis=2)[:, :, :length].swapaxes(1, 2)
    return y.astype(dtype), state


@mx.custom_function
def unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + a)⁻¹ for strictly lower triangular a (…, CHUNK, CHUNK).

    From D, which has the inverses of the diagonal blocks of one size, those of twice that size are
    D − D M D, where M is what a has in the larger blocks and not in the smaller ones.
    """
    index, inverse = mx.arange(CHUNK), mx.eye(CHUNK)
    for level in range(CHUNK.bit_length() - 1):
        small, large = index >> level, index >> (level + 1)
        is_new = (large[:, None] == large) & (small[:, None] != small)
        inverse = inverse - inverse @ mx.where(is_new, a, 0) @ inverse
    return inverse


@unit_lower_inverse.vjp
def unit_lower_inverse_vjp(_: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    transposed = inverse.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)


def in_pieces(*arrays: mx.array | None) -> tuple[mx.array, mx.array]:
    """token_by_token for a chunk after the other; the gradients need one chunk's states at a time.

    Args:
        arrays: what token_by_token takes, the state as the sixth.
    """
    *sequences, state, mask = arrays
    if mask is not None:
        sequences.append(mask)

    def of_piece(state: mx.array, *piece: mx.array) -> tuple[mx.array, mx.array]:
        return token_by_token(*piece[:5], state, *piece[5:])

    checkpointed = mx.custom_function(of_piece)

    @checkpointed.vjp
    def gradients(inputs: tuple, cotangents: tuple, _: tuple) -> list[mx.array]:
        inputs = mx.depends(list(inputs), list(cotangents))  # else computed while others are
        of_state, *others = mx.vjp(of_piece, inputs, cotangents)[1]
        return [*mx.depends([of_state], others), *others]  # before the piece in front is begun

    outputs = []
    for piece in zip(*(pieces(x, CHUNK, axis=1) for x in sequences), strict=True):
        y, state = checkpointed(state, *piece)
        outputs.append(y)
    return mx.concatenate(outputs, axis=1), state


def pieces(x: mx.array, size: int, axis: int) -> tuple[mx.array, ...]:
    """An array in pieces along an axis; with MLX's gradient each would be as large as the array."""

    @mx.custom_function
    def split(x: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.split(x, list(range(size, x.shape[axis], size)), axis))

    @split.vjp
    def gradient(_: mx.array, cotangents: tuple[mx.array, ...], __: object) -> mx.array:
        return mx.concatenate(cotangents, axis=axis)

    return split(x)


@contextmanager
def by_chunks() -> Iterator[None]:
    """While it lasts, models of mlx-lm with this rule go chunk by chunk."""
    gated_delta.gated_delta_ops = chunk_by_chunk
    try:
        yield
    finally:
        gated_delta.gated_delta_ops = token_by_token
