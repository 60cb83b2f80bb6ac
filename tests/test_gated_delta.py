"""Hybrids go through a text chunk by chunk as they do token by token, with a fraction of memory."""

import math

from lora_finetune import attention, gated_delta
from test_architectures import build

import mlx.core as mx
import numpy as np
import pytest

ROWS, KEY_HEADS, HEADS, KEY_SIZE = 2, 2, 4, 16
Inputs = list[mx.array]


def make_inputs(length: int, case: str = "", size: int = KEY_SIZE, value_size: int = 8) -> Inputs:
    """q, k, v, the logarithm of g, beta and a state; in some cases unusual ones."""
    mx.random.seed(0)
    q, k = (mx.random.normal((ROWS, length, KEY_HEADS, size)) for _ in range(2))
    if case == "keys that are all the same":
        k = mx.broadcast_to(k[:, :1], k.shape)
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = mx.random.normal((ROWS, length, HEADS, value_size))
    shape = (ROWS, length, HEADS, *[size] * (case == "a decay for each key"))
    log_g = -mx.exp(mx.random.normal(shape) * (4 if case == "decays down to nothing" else 1) - 2)
    if case in ("keys that are all the same", "no decay"):
        log_g = mx.zeros(shape)
    beta = mx.sigmoid(mx.random.normal((ROWS, length, HEADS)))
    if case == "keys that are all the same":
        beta = mx.ones_like(beta)
    state = mx.random.normal((ROWS, HEADS, value_size, size))
    return [q / math.sqrt(size), k, v, log_g, beta, state]


def results(rule, inputs: Inputs, mask: mx.array | None = None) -> list[np.ndarray]:
    """What a form of the rule puts out, its last state, and the gradients to all inputs."""

    def function(q, k, v, log_g, *others: mx.array) -> tuple[mx.array, mx.array]:
        return rule(q, k, v, mx.exp(log_g), *others, mask)

    y, state = function(*inputs)
    mx.random.seed(1)
    cotangents = [mx.random.normal(y.shape), mx.random.normal(state.shape)]
    gradients = mx.vjp(function, inputs, [c.astype(y.dtype) for c in cotangents])[1]
    return [np.array(array.astype(mx.float32)) for array in (y, state, *gradients)]


def assert_same(inputs: Inputs, mask: mx.array | None = None, most: float = 1e-5) -> None:
    expected = results(gated_delta.token_by_token, inputs, mask)
    for found, array in zip(
        results(gated_delta.chunk_by_chunk, inputs, mask), expected, strict=True
    ):
        assert np.abs(found - array).max() <= most * np.abs(array).max()


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 150])
def test_chunks_and_their_gradients_are_those_of_the_loop_over_tokens(length: int):
    assert_same(make_inputs(length))


@pytest.mark.parametrize(
    "case",
    ["keys that are all the same", "no decay", "decays down to nothing", "a decay for each key"],
)
def test_so_they_are_where_a_shortcut_would_lose_its_digits(case: str):
    assert_same(make_inputs(150, case))


def test_tokens_that_a_mask_hides_are_passed_over():
    assert_same(make_inputs(150), mx.arange(150)[None] < mx.array([[150], [90]]))


def test_in_bfloat16_they_differ_by_its_rounding():
    inputs = [x.astype(mx.bfloat16) for x in make_inputs(150)[:5]]
    assert_same([*inputs, make_inputs(150)[5]], most=2e-2)


def test_without_a_state_they_begin_with_none():
    *inputs, _ = make_inputs(70)
    inputs[3] = mx.exp(inputs[3])
    for found, expected in zip(
        gated_delta.chunk_by_chunk(*inputs), gated_delta.token_by_token(*inputs), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("case", ["", "a decay for each key"])
def test_memory_for_the_gradients_of_a_long_text_is_a_fraction_of_what_the_loop_takes(case: str):
    def peak(rule, length: int) -> int:
        inputs = make_inputs(length, case, size=64, value_size=64)
        mx.eval(inputs)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        results(rule, inputs)
        return mx.get_peak_memory() - before

    assert peak(gated_delta.chunk_by_chunk, 256) < peak(gated_delta.token_by_token, 256) / 3
    # And it grows with the length, not with its square.
    assert peak(gated_delta.chunk_by_chunk, 1024) < 3 * peak(gated_delta.chunk_by_chunk, 512)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"])
def test_a_model_of_this_kind_is_the_same_and_the_loop_is_back_afterwards(name: str):
    model = build(name)
    model.train()
    tokens = (mx.arange(70)[None] * 7) % 90
    expected = model(tokens)
    with attention.by_blocks(), gated_delta.by_chunks():
        found = model(tokens)
        mx.eval(found)
    np.testing.assert_allclose(found, expected, atol=1e-4 * mx.abs(expected).max().item())
    assert gated_delta.gated_delta.gated_delta_ops is gated_delta.token_by_token
