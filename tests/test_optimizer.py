"""Recipes of training: learning rates by the iteration, against numbers made by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from conftest import Run as CommandLine
from lora_finetune.training.optimizer import Optimizer
from test_errors import one_error

import pytest


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

RATES = {  # of 6 iterations, two of them warmup, as parts of the highest rate
    "constant": [1 / 2, 1, 1, 1, 1, 1],
    "linear": [1 / 2, 1, 3 / 4, 1 / 2, 1 / 4, 0],
    "cosine": [1 / 2, 1, (2 + math.sqrt(2)) / 4, 1 / 2, (2 - math.sqrt(2)) / 4, 0],
}


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("warmup", ["2", "33.3%", "17%"])  # a share is rounded up
def test_the_rate_rises_to_its_peak_once_and_falls_to_zero_at_the_end(
    schedule: str, warmup: str
) -> None:
    optimizer = Optimizer(8.0, 6, schedule, warmup)
    rates = [optimizer.rate(iteration) for iteration in range(1, 7)]
    assert rates == pytest.approx([8 * part for part in RATES[schedule]], abs=1e-12)


def test_without_warmup_the_first_iteration_has_the_whole_rate_or_the_first_part() -> None:
    assert [Optimizer(8.0, 4).rate(k) for k in (1, 4)] == [8, 8]
    assert [Optimizer(8.0, 4, "linear").rate(k) for k in (1, 2, 3, 4)] == [6, 4, 2, 0]


def test_a_rate_is_reported_and_a_longer_run_goes_on_by_its_own_schedule(
    call: CommandLine, args: list[object], tmp_path: Path
) -> None:
    args = [*args, "--learning-rate", "8e-3", "--steps-per-report", 1]
    args += ["--lr-schedule", "linear", "--warmup", "2"]
    ended = call(*args, "--iters", 4)
    assert re.findall(r"Peak mem [\d.]+ GB, Learning rate (.*)", ended.stdout) == [
        "4.000e-03", "8.000e-03", "4.000e-03", "0.000e+00",
    ]  # fmt: skip
    ended = call(*args, "--iters", 6, "--resume-adapter-file", tmp_path / "a.npz")
    assert ended.stderr == "hint: the learning rate is now that of a run of 6 iterations, not 4\n"
    rates = [entry["learning_rate"] for entry in reports(tmp_path)]
    assert rates == pytest.approx([4e-3, 8e-3, 4e-3, 0, 2e-3, 0])
    assert "--lr-schedule linear --warmup 2 " in ended.outcome  # the command to go on


@pytest.mark.parametrize("warmup", ["-1", "101%", "x%", "2.5", "nan%"])
def test_a_warmup_is_iterations_or_a_share(call: CommandLine, warmup: str) -> None:
    one_error(call("--train", f"--warmup={warmup}"), "--warmup")
