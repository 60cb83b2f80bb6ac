"""Recipes of training, against numbers made by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import tiny
from conftest import Run as CommandLine
from lora_finetune.training import losses
from lora_finetune.training.optimizer import Optimizer
from test_errors import one_error
from test_step import batches, make_trainer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten


@pytest.fixture
def args(model: Path, data: Path, tmp_path: Path) -> list[object]:
    """Training of tiny.LLAMA, to be given --iters."""
    fixed = ["--model", model, "--data", data, "--train", "--lora-layers", 1, "--batch-size", 2]
    return [*fixed, "--val-batches", 1, "--adapter-file", tmp_path / "a.npz"]


def reports(folder: Path) -> list[dict]:
    """The training reports of the run a.npz in a folder."""
    entries = map(json.loads, (folder / "a.run/log.jsonl").read_text().splitlines())
    return [entry for entry in entries if "train_loss" in entry]


# --- The learning rate --------------------------------------------------------------------------

ROOT_5 = math.sqrt(5)
RATES = {  # of 6 iterations, two of them warmup, as parts of the highest rate
    "constant": [1 / 2, 1, 1, 1, 1, 1],
    "linear": [1 / 2, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5],
    # cos 36° is (1 + √5) / 4, and cos 72° (√5 − 1) / 4
    "cosine": [1 / 2, 1, (5 + ROOT_5) / 8, (3 + ROOT_5) / 8, (5 - ROOT_5) / 8, (3 - ROOT_5) / 8],
}


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("warmup", ["2", "33.3%", "17%"])  # a share is rounded up
def test_the_rate_rises_to_its_peak_once_and_falls_to_the_end(schedule: str, warmup: str) -> None:
    optimizer = Optimizer(8.0, 6, schedule, warmup)
    rates = [optimizer.rate(iteration) for iteration in range(1, 7)]
    assert rates == pytest.approx([8 * part for part in RATES[schedule]], abs=1e-12)


def test_without_warmup_the_first_iteration_has_the_whole_rate() -> None:
    assert [Optimizer(8.0, 4).rate(k) for k in (1, 4)] == [8, 8]
    assert [Optimizer(8.0, 4, "linear").rate(k) for k in (1, 2, 3, 4)] == [8, 6, 4, 2]
    assert Optimizer(8.0, 1, "cosine").rate(1) == 8


def test_a_rate_is_reported_and_a_longer_run_goes_on_by_its_own_schedule(
    call: CommandLine, args: list[object], tmp_path: Path
) -> None:
    args = [*args, "--learning-rate", "8e-3", "--steps-per-report", 1]
    args += ["--lr-schedule", "linear", "--warmup", "2"]
    ended = call(*args, "--iters", 4)
    assert re.findall(r"Peak mem [\d.]+ GB, Learning rate (.*)", ended.stdout) == [
        "4.000e-03", "8.000e-03", "5.333e-03", "2.667e-03",
    ]  # fmt: skip
    ended = call(*args, "--iters", 6, "--resume-adapter-file", tmp_path / "a.npz")
    assert ended.stderr == "hint: the learning rate is now that of a run of 6 iterations, not 4\n"
    rates = [entry["learning_rate"] for entry in reports(tmp_path)]
    assert rates == pytest.approx([4e-3, 8e-3, 16e-3 / 3, 8e-3 / 3, 3.2e-3, 1.6e-3])
    assert "--lr-schedule linear --warmup 2 " in ended.outcome  # the command to go on


@pytest.mark.parametrize("warmup", ["-1", "101%", "x%", "2.5", "nan%"])
def test_a_warmup_is_iterations_or_a_share(call: CommandLine, warmup: str) -> None:
    one_error(call("--train", f"--warmup={warmup}"), "--warmup")


# --- The gradient -------------------------------------------------------------------------------


def start(size: int) -> dict:
    """Moments before the first step."""
    return {"m": mx.zeros(size), "v": mx.zeros(size), "iteration": 0, "steps": 0}


def update(optimizer: Optimizer, gradient: list[float]) -> tuple[list[float], float]:
    """The first update of parameters that are 1, and the norm of the gradient."""
    found, _, norm = optimizer.update(mx.array(gradient), mx.ones(2), start(2))
    return found.tolist(), norm.item()


def test_a_gradient_is_clipped_to_its_largest_norm_and_a_smaller_one_stays() -> None:
    # Adam's first step is as large whatever the gradient, but for the eps of 1e-8.
    limited, free = Optimizer(1.0, max_grad_norm=5e-9), Optimizer(1.0)
    for given, clipped in [((3.0, 4.0), (3e-9, 4e-9)), ((3e-9, 0.0), (3e-9, 0.0))]:
        found, norm = update(limited, given)
        assert found == pytest.approx(update(free, clipped)[0], rel=1e-6)
        assert norm == pytest.approx(math.hypot(*given))
    assert update(limited, [3e-9, 0.0]) == update(free, [3e-9, 0.0])
    assert update(limited, [0.0, 0.0]) == ([1.0, 1.0], 0.0)


def test_the_norm_is_of_the_mean_loss_over_all_micro_batches() -> None:
    trainer, [[first], [second]] = make_trainer(), list(batches(2))
    second[1][:, 5:] = False  # other targets than the first's, so that a mean of means is another
    gradient = {}
    for tokens, is_target in (first, second):
        of_sum = nn.value_and_grad(trainer.model, lambda *b: losses.loss(trainer.model, *b)[0])
        for name, array in tree_flatten(of_sum(mx.array(tokens), mx.array(is_target))[1]):
            gradient[name] = gradient.get(name, 0) + np.array(array, np.float64)
    targets = first[1][:, 1:].sum() + second[1][:, 1:].sum()
    expected = math.sqrt(sum((array**2).sum() for array in gradient.values())) / targets
    [(*_, norm)] = trainer.steps(iter([[first, second]]), ahead=lambda: False)
    assert norm == pytest.approx(expected, rel=1e-5)


def test_a_text_unlike_the_others_is_named_by_its_line(
    call: CommandLine, args: list[object], tmp_path: Path
) -> None:
    """After an empty line, which counts; of its two epochs the second tells for sure."""
    texts = ["a" * 40] * 20
    texts[12] = "다른 글 x7"
    for split in ("train", "valid"):
        file = tiny.write_jsonl(tmp_path / "data", split, texts)
        file.write_text("\n" + file.read_text("utf-8"), "utf-8")
    args = [*args, "--data", tmp_path / "data", "--batch-size", 1, "--learning-rate", "3e-3"]
    ended = call(*args, "--epochs", 3, "--lora-layers", 4, "--steps-per-report", 1)
    *_, last = ended.stderr.splitlines()
    found = re.fullmatch(
        r"warning: iteration (\d+): the gradient's norm \((.*)\) is \d+ times the median of those "
        r"before; look at train.jsonl, lines 14", last,
    )  # fmt: skip
    assert found and ended.stderr.count("warning") <= 2
    norms = {entry["iter"]: entry["grad_norm"] for entry in reports(tmp_path)}
    assert norms[int(found[1])] == pytest.approx(float(found[2]), rel=1e-2)


# --- Adam as PyTorch has it ---------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_bias_correction_it_is_the_adam_of_the_papers(decay: float) -> None:
    """In float64, step by step (Kingma and Ba, 2015; decay as Loshchilov and Hutter, 2019)."""
    rng = np.random.default_rng(0)
    optimizer = Optimizer(1e-2, 50, "cosine", "10%", weight_decay=decay, bias_correction=True)
    weights = rng.normal(size=64).astype(np.float32)
    found, moments = mx.array(weights), start(64)
    w, m, v = weights.astype(np.float64), 0, 0
    sizes = 10.0 ** rng.integers(-9, 2, 64)  # some as small as epsilon
    for t in range(1, 51):
        g = (rng.normal(size=64) * sizes).astype(np.float32)
        found, moments, _ = optimizer.update(mx.array(g), found, moments)
        g, rate = g.astype(np.float64), optimizer.rate(t)
        w = w - rate * decay * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert np.abs(w - weights).max() > 0.05
    np.testing.assert_allclose(found, w, rtol=0, atol=1e-6)


def test_without_it_the_first_step_is_over_three_times_as_large() -> None:
    """0.1 g / √(0.001 g²) in place of g / |g|; and AdamW's decay is apart from the gradient."""
    for flags, moved in [({}, 10**0.5), ({"bias_correction": True}, 1.0)]:
        assert update(Optimizer(0.1, **flags), [2.0, 3.0])[0] == pytest.approx(
            [1 - 0.1 * moved] * 2
        )
    assert update(Optimizer(0.1, weight_decay=0.5), [0.0, 0.0])[0] == pytest.approx([0.95] * 2)


def test_weight_decay_is_for_adamw_and_a_change_of_it_is_told(
    call: CommandLine, args: list[object], tmp_path: Path
) -> None:
    one_error(call(*args, "--weight-decay", 0.1), "--weight-decay", "--optimizer adamw")
    call(*args, "--iters", 1, "--optimizer", "adamw", "--weight-decay", 0.1)
    resume = ["--iters", 2, "--resume-adapter-file", tmp_path / "a.npz", "--optimizer", "adamw"]
    assert "--weight-decay (0.1, now 0.01)\n" in call(*args, *resume).stderr
