"""The fast ways to compute are the plain ones, to rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import train_lora
from lora_finetune import fast_exp, losses
from lora_finetune.losses import Loss
from test_architectures import ADAPTED, IS_TARGET, TOKENS, adapt, build

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import activations

# --- exp ----------------------------------------------------------------------------------------


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast exp, for this test alone."""
    for place, name in ((fast_exp, "in_place"), (activations, "swiglu")):
        monkeypatch.setattr(place, name, getattr(place, name))
    fast_exp.put_in_place(slow_exp=True)


def test_exp_is_right_to_two_parts_in_ten_million(in_place: None) -> None:
    x = np.linspace(-87, 88, 2_000_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(np.array(fast_exp.exp(mx.array(x)), np.float64) / exact - 1).max() < 2e-7


def test_exp_of_what_float32_cannot_hold_is_next_to_nothing_or_huge(in_place: None) -> None:
    x = mx.array([-math.inf, -1e30, -100, 0, 100, 1e30, math.inf, math.nan])
    found = fast_exp.exp(x).tolist()
    assert all(0 <= value < 2e-38 for value in found[:3])
    assert found[3] == 1
    assert all(value > 1e38 for value in found[4:7])
    assert math.isnan(found[7])


def test_the_log_sum_exp_is_that_of_mlx(in_place: None) -> None:
    x = mx.random.normal((50, 3000)) * 10
    x[0, 0] = 1e4
    expected = mx.logsumexp(x, axis=-1)
    np.testing.assert_allclose(fast_exp.log_sum_exp(x), expected, rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("slow_exp", [True, False])
def test_the_gated_unit_and_its_gradients_are_those_of_mlx(
    in_place: None, monkeypatch: pytest.MonkeyPatch, slow_exp: bool
) -> None:
    monkeypatch.setattr(fast_exp, "in_place", slow_exp)
    gate, x, weight = (mx.random.normal((40, 30)) * 4 for _ in range(3))

    def plain(gate: mx.array, x: mx.array) -> mx.array:
        return (gate * mx.sigmoid(gate) * x * weight).sum()

    def fast(gate: mx.array, x: mx.array) -> mx.array:
        return (fast_exp.swiglu(gate, x) * weight).sum()

    expected = mx.value_and_grad(plain, argnums=(0, 1))(gate, x)
    found = mx.value_and_grad(fast, argnums=(0, 1))(gate, x)
    for (_, a), (_, b) in zip(tree_flatten(expected), tree_flatten(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-6, atol=2e-5)


# --- The loss by pieces -------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces of 16 tokens, and no compiling, which would take most of the time."""
    monkeypatch.setattr(losses, "PIECE_LOGITS", dict.fromkeys(losses.PIECE_LOGITS, 1))
    mx.disable_compile()
    yield
    mx.enable_compile()


def gradients(model: nn.Module, loss: Loss) -> tuple[float, int, dict[str, mx.array]]:
    function = nn.value_and_grad(model, lambda *batch: loss(model, *batch))
    tokens, is_target = (mx.concatenate([array] * 2, axis=1) for array in (TOKENS, IS_TARGET))
    (total, number), found = function(tokens, is_target)
    return total.item(), number.item(), dict(tree_flatten(found))


@pytest.mark.parametrize("name", [name for name in ADAPTED if name != "deepseek_v41"])
def test_by_pieces_every_architecture_has_the_loss_and_gradients_of_the_whole(
    small_pieces: None, name: str
) -> None:
    model = build(name)
    loss = losses.make_loss(model)
    assert (loss is losses.loss) == (name == "talkie")  # whose head is no module
    adapt(model)
    for set_mode in (model.eval, model.train):
        set_mode()
        expected, found = gradients(model, losses.loss), gradients(model, loss)
        assert found[0] == pytest.approx(expected[0], 1e-5)
        assert found[1] == expected[1]
        for path, gradient in expected[2].items():
            error = mx.abs(found[2][path] - gradient).max().item()
            assert error <= 1e-4 * mx.abs(gradient).max().item() + 1e-9, path


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_next"]
)
def test_by_pieces_fifty_steps_end_where_the_plain_ones_do(small_pieces: None, name: str) -> None:
    ends = []
    for make_loss in (lambda model: losses.loss, losses.make_loss):
        model = build(name)
        loss = make_loss(model)
        adapt(model)
        model.train()
        step = train_lora.make_step(model, loss, train_lora.make_optimizer(model, 1e-3, {}))
        batch = [(np.array(TOKENS), np.array(IS_TARGET))]
        ends.append([step(batch)[0] for _ in range(50)])
    assert ends[1] == pytest.approx(ends[0], 1e-3)
    assert ends[0][-1] < 0.9 * ends[0][0]


def test_no_array_of_all_tokens_and_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of memory says so: it is a fraction of what the logits of all tokens take."""
    monkeypatch.setattr(losses, "PIECE_LOGITS", dict.fromkeys(losses.PIECE_LOGITS, 2**19))
    rows, width, num_logits = 2, 257, 40_000
    model = build("llama")
    model.lm_head = nn.Linear(model.lm_head.weight.shape[1], num_logits, bias=False)
    adapt(model)
    tokens = mx.broadcast_to(mx.arange(width)[None] % 100, (rows, width))
    batch, peaks = (tokens, mx.ones((rows, width), mx.bool_)), []
    for loss in (losses.loss, losses.make_loss(model)):
        model.train()
        function = nn.value_and_grad(model, lambda *batch, loss=loss: loss(model, *batch))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(function(*batch))
        peaks.append(mx.get_peak_memory() - before)
    all_logits = rows * (width - 1) * num_logits * 4
    assert peaks[1] < 0.7 * all_logits < 1.4 * all_logits < peaks[0]
