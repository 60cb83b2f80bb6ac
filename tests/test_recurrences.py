"""Hybrids go through a text chunk by chunk as they do token by token, with a fraction of memory."""

import math

from lora_finetune.mlx_patches import patches, recurrences
from lora_finetune.mlx_patches.recurrences import gated_delta_by_chunks, gated_delta_by_tokens
from test_models import build

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import bailing_hybrid, bailing_moe_linear, jamba, recurrent_gemma, ssm
from mlx_lm.models import gated_delta as gated_delta_module

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
    if case == "keys that are all the same, and beta is 2":
        k, beta = mx.broadcast_to(k[:, :1], k.shape), mx.full(beta.shape, 2.0)
    state = mx.random.normal((ROWS, HEADS, value_size, size))
    return [q / math.sqrt(size), k, v, log_g, beta, state]


def results(function, inputs: Inputs) -> list[np.ndarray]:
    """What a recurrence puts out, its last state, and the gradients to all inputs."""
    y, state = function(*inputs)
    mx.random.seed(1)
    cotangents = [mx.random.normal(array.shape).astype(array.dtype) for array in (y, state)]
    gradients = mx.vjp(function, inputs, cotangents)[1]
    return [np.array(array.astype(mx.float32)) for array in (y, state, *gradients)]


def assert_same(function, other, inputs: Inputs, most: float = 1e-5) -> None:
    for found, expected in zip(results(function, inputs), results(other, inputs), strict=True):
        assert np.abs(found - expected).max() <= most * np.abs(expected).max()


def gated_delta(rule, mask: mx.array | None = None):
    """A form of the gated delta rule, of the logarithm of g."""
    return lambda q, k, v, log_g, *others: rule(q, k, v, mx.exp(log_g), *others, mask)


def assert_chunks_are_tokens(
    inputs: Inputs, mask: mx.array | None = None, most: float = 1e-5
) -> None:
    forms = (gated_delta(rule, mask) for rule in (gated_delta_by_chunks, gated_delta_by_tokens))
    assert_same(*forms, inputs, most)


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 150])
def test_chunks_and_their_gradients_are_those_of_the_loop_over_tokens(length: int):
    assert_chunks_are_tokens(make_inputs(length))


@pytest.mark.parametrize(
    "case",
    ["keys that are all the same", "no decay", "decays down to nothing", "a decay for each key"],
)
def test_so_they_are_where_a_shortcut_would_lose_its_digits(case: str):
    assert_chunks_are_tokens(make_inputs(150, case))


def test_where_that_cannot_be_helped_three_digits_are_left():
    case = "keys that are all the same, and beta is 2"
    assert_chunks_are_tokens(make_inputs(150, case), most=1e-3)


def test_tokens_that_a_mask_hides_are_passed_over():
    assert_chunks_are_tokens(make_inputs(150), mx.arange(150)[None] < mx.array([[150], [90]]))


def test_in_bfloat16_they_differ_by_its_rounding():
    inputs = [x.astype(mx.bfloat16) for x in make_inputs(150)[:5]]
    assert_chunks_are_tokens([*inputs, make_inputs(150)[5]], most=2e-2)


def test_without_a_state_they_begin_with_none():
    *inputs, _ = make_inputs(70)
    inputs[3] = mx.exp(inputs[3])
    for found, expected in zip(
        gated_delta_by_chunks(*inputs), gated_delta_by_tokens(*inputs), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("case", ["", "a decay for each key"])
def test_memory_for_the_gradients_of_a_long_text_is_a_fraction_of_what_the_loop_takes(case: str):
    def peak(rule, length: int) -> int:
        inputs = make_inputs(length, case, size=64, value_size=64)
        mx.eval(inputs)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        results(gated_delta(rule), inputs)
        return mx.get_peak_memory() - before

    assert peak(gated_delta_by_chunks, 256) < peak(gated_delta_by_tokens, 256) / 3
    # And it grows with the length, not with its square.
    assert peak(gated_delta_by_chunks, 512) < 3 * peak(gated_delta_by_chunks, 256)


@pytest.mark.parametrize("length", [1, 128, 129, 300])
@pytest.mark.parametrize("has_state", [True, False])
def test_mamba_2_in_chunks_and_its_gradients_are_those_of_mlx_lm(length: int, has_state: bool):
    mx.random.seed(0)
    normal = mx.random.normal
    a_log, d, dt_bias = (normal((4,)) for _ in range(3))
    inputs = [normal((ROWS, length, *size)) for size in ((4, 8), (2, 16), (2, 16), (4,))]
    inputs += [normal((ROWS, 4, 8, 16))] * has_state
    forms = (
        lambda x, b, c, dt, *state, form=form: form(x, a_log, b, c, d, dt, dt_bias, *state)
        for form in (recurrences.ssm_in_chunks, recurrences.whole_ssm)
    )
    assert_same(*forms, inputs)


def test_lightning_attention_by_chunks_is_that_of_the_loop_over_tokens():
    """mlx-lm has both, for two of its architectures."""
    mx.random.seed(0)
    g = -mx.random.uniform(0.01, 0.5, (4,))
    forms = (
        lambda q, k, v, module=module: module.recurrent_gla(q=q, k=k, v=v, g=g, scale=0.25)
        for module in (bailing_hybrid, bailing_moe_linear)
    )
    assert_same(*forms, [mx.random.normal((ROWS, 4, 150, 16)) for _ in range(3)])


@pytest.mark.parametrize("length", [2, 64, 65, 150])
@pytest.mark.parametrize("has_state", [True, False])
def test_the_scan_of_recurrent_gemma_is_that_of_the_loop(length: int, has_state: bool):
    mx.random.seed(0)
    inputs = [mx.random.normal((ROWS, length, 8)), mx.random.uniform(shape=(ROWS, length, 8))]
    inputs += [mx.random.normal((ROWS, 8))] * has_state
    forms = (
        lambda x, a, h0=None, form=form: form(x, a, h0)
        for form in (recurrences.rnn_scan_in_chunks, recurrent_gemma.rnn_scan)
    )
    assert_same(*forms, inputs)


@pytest.mark.parametrize("length", [1, 16, 17, 60])
@pytest.mark.parametrize("has_state", [True, False])
def test_the_scan_of_jamba_is_that_of_the_loop(length: int, has_state: bool):
    mixer = next(m for m in build("jamba").modules() if isinstance(m, jamba.JambaMambaMixer))
    mx.random.seed(0)
    channels, states = mixer.A_log.shape
    inputs = [mx.random.normal((ROWS, length, channels))]
    inputs += [mx.random.normal((ROWS, channels, states))] * has_state
    forms = (
        lambda x, *state, form=form: form(mixer, x, -mx.exp(mixer.A_log), *state)
        for form in (recurrences.jamba_ssm_in_chunks, jamba.JambaMambaMixer.ssm_step)
    )
    assert_same(*forms, inputs)


@pytest.mark.parametrize(
    "name",
    [
        "jamba",
        "recurrent_gemma",
        "falcon_h1",
        "nemotron_h",
        "bailing_moe_linear",
        "qwen3_next",
        "qwen3_5",
        "olmo_hybrid",
        "kimi_linear",
    ],
)
def test_a_model_of_this_kind_is_the_same_and_the_loop_is_back_afterwards(name: str):
    model = build(name)
    model.train()
    tokens = (mx.arange(70)[None] * 7) % 90
    expected = model(tokens)
    with patches.applied():
        found = model(tokens)
        mx.eval(found)
    np.testing.assert_allclose(found, expected, atol=1e-4 * mx.abs(expected).max().item())
    assert gated_delta_module.gated_delta_ops is gated_delta_by_tokens
    assert ssm.ssm_attn is recurrences.whole_ssm
