"""Rank and scale, the end of a run, and what it leaves to look at."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from itertools import dropwhile
from pathlib import Path

import tiny
from conftest import ROOT, Run
from lora_finetune.run import checkpoint
from test_errors import one_error

import numpy as np
import pytest


@pytest.fixture
def args(model: Path, data: Path, tmp_path: Path) -> list[object]:
    """Training of tiny.LLAMA, to be given --iters."""
    fixed = ["--model", model, "--data", data, "--train", "--lora-layers", 4, "--batch-size", 2]
    return [*fixed, "--learning-rate", "1e-2", "--adapter-file", tmp_path / "a.npz"]


def arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as archive:
        return dict(archive)


def losses(log: Path, name: str) -> list[float]:
    entries = map(json.loads, log.read_text().splitlines())
    return [entry[name] for entry in entries if name in entry]


# --- Rank and scale -----------------------------------------------------------------------------


def test_the_rank_is_the_one_asked_for(call: Run, args: list[object], tmp_path: Path) -> None:
    assert call(*args, "--iters", 1, "--lora-rank", 3).returncode == 0
    saved = arrays(tmp_path / "a.npz")
    assert {min(array.shape) for array in saved.values()} == {3}
    resume = ["--iters", 2, "--resume-adapter-file", tmp_path / "a.npz"]
    one_error(call(*args, *resume, "--lora-rank", 4), "has rank 3, not --lora-rank 4")
    assert call(*args, *resume).returncode == 0


def test_files_are_for_scale_20_whatever_the_scale_of_training(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    """The loss in the same run is that of a later one, which knows no scale."""
    ended = call(*args, "--iters", 4, "--lora-scale", 2.5, "--test")
    later = call(*args[:4], "--adapter-file", tmp_path / "a.npz", "--test")
    found = [re.findall(r"Test loss ([\d.]+)", e.stdout) for e in (ended, later)]
    assert found[0] == found[1] != []
    other = call(*args, "--iters", 4, "--lora-scale", 20, "--test")
    assert re.findall(r"Test loss ([\d.]+)", other.stdout) != found[0]


def test_a_run_of_another_scale_is_resumed_exactly(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    file = tmp_path / "a.npz"
    call(*args, "--iters", 5, "--lora-scale", 7)
    whole = file.read_bytes()
    call(*args, "--iters", 2, "--lora-scale", 7)
    call(*args, "--iters", 5, "--resume-adapter-file", file)  # the state knows the scale
    assert file.read_bytes() == whole


def test_the_best_adapter_is_resumed_with_the_scale_of_its_run(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    call(*args, "--iters", 3, "--lora-scale", 5)
    best = [
        "--resume-adapter-file",
        tmp_path / "a.run/best.npz",
        "--adapter-file",
        tmp_path / "b.npz",
    ]
    call(*args, *best, "--iters", 4, "--start-iter", 3)
    assert checkpoint.read_state(tmp_path / "b.npz").settings["--lora-scale"] == 5


@pytest.mark.parametrize("scale", ["1e-300", "1e300", "nan", "0", "x"])
def test_a_scale_that_numbers_cannot_be_multiplied_by_is_an_error(
    call: Run, args: list[object], scale: str
) -> None:
    one_error(call(*args, "--iters", 1, "--lora-scale", scale), "--lora-scale")


def test_resumed_with_another_scale_the_model_is_the_same_and_a_warning_says_so(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    call(*args, "--iters", 2)
    log = tmp_path / "a.run/log.jsonl"
    before = losses(log, "val_loss")[-1]
    resume = ["--resume-adapter-file", tmp_path / "a.npz", "--adapter-file", tmp_path / "b.npz"]
    ended = call(*args, *resume, "--iters", 3, "--lora-scale", 5)
    assert "--lora-scale (20.0, now 5.0)" in ended.stderr
    assert losses(tmp_path / "b.run/log.jsonl", "val_loss")[0] == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("flag", ["--lora-rank", "--lora-scale"])
def test_rank_and_scale_are_for_training(call: Run, model: Path, flag: str) -> None:
    one_error(call("--model", model, "--prompt", "a", flag, 4), flag, "is for training")
    one_error(call("--model", model, "--train", flag, 0), flag)


# --- Patience -----------------------------------------------------------------------------------


def test_training_ends_when_validation_does_not_become_better(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    """At a rate of 0 no validation is better than the first."""
    still = [*args, "--learning-rate", 0, "--steps-per-eval", 2, "--patience", 3]
    ended = call(*still, "--iters", 20, "--steps-per-report", 5)
    assert "Iter 6: Training ends, since the validation loss did not improve in 3" in ended.stdout
    assert losses(tmp_path / "a.run/log.jsonl", "iter")[-1] == 6
    assert len(losses(tmp_path / "a.run/log.jsonl", "train_loss")) == 2  # of 5, and of the sixth
    resume = ["--resume-adapter-file", tmp_path / "a.npz"]
    same = call(*still, "--iters", 20, *resume)
    assert same.returncode == 0 and "Train loss" not in same.stdout
    without = call(*args, "--learning-rate", 0, "--iters", 14, *resume)
    assert "Iter 14: Train loss" in without.stdout


def test_more_patience_goes_on_with_the_same_iterations(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    still = [*args, "--learning-rate", 0, "--steps-per-eval", 2, "--iters", 20]
    call(*still, "--patience", 3)
    still += ["--resume-adapter-file", tmp_path / "a.npz"]
    assert "Iter 6: Training ends" in call(*still, "--patience", 3).stdout
    assert "Iter 10: Training ends" in call(*still, "--patience", 5).stdout


def test_a_run_that_becomes_better_does_not_end_early(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    flags = ["--iters", 8, "--steps-per-eval", 2, "--learning-rate", "1e-3"]
    call(*args, *flags, "--patience", 1)
    assert losses(tmp_path / "a.run/log.jsonl", "iter")[-1] == 8
    with_patience = (tmp_path / "a.npz").read_bytes()
    call(*args, *flags)
    assert (tmp_path / "a.npz").read_bytes() == with_patience


# --- The picture --------------------------------------------------------------------------------


def test_the_losses_are_drawn_and_an_earlier_picture_is_kept(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    flags = [*args, "--steps-per-report", 1]
    assert call(*flags, "--iters", 3).stderr == ""
    first = (tmp_path / "a.run/losses.png").read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 10_000
    call(*flags, "--iters", 5, "--resume-adapter-file", tmp_path / "a.npz")
    assert losses(tmp_path / "a.run/log.jsonl", "iter")[-1] == 5
    resumed = (tmp_path / "a.run/losses.png").read_bytes()
    assert resumed != first
    call(*flags, "--iters", 2, "--seed", 1)
    kept = (tmp_path / "a.previous-1.run/losses.png").read_bytes()
    assert kept == resumed != (tmp_path / "a.run/losses.png").read_bytes()


def test_of_one_report_nothing_is_drawn(call: Run, args: list[object], tmp_path: Path) -> None:
    call(*args, "--iters", 2)
    assert not (tmp_path / "a.run/losses.png").exists()


# --- What to do next ----------------------------------------------------------------------------


def test_a_run_ends_with_commands_that_work_as_printed(
    run: Run, call: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder and with names that a shell would take apart."""
    folder = tmp_path / "내 것 $HOME 'x'"
    folder.mkdir()
    flags = ["--model", model, "--data", data, "--train", "--iters", 4, "--batch-size", 2]
    monkeypatch.chdir(folder)
    ended = run(*flags, "--adapter-file", "a b.npz", "--learning-rate", "1e-2")
    told, ask, go_on, out = ended.outcome.splitlines()
    assert re.match(r"Validation loss [\d.]+ before, [\d.]+ after, [\d.]+ at best \(iter", told)
    assert ask.startswith("Ask it:    ")
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}  # BLAS with its threads
    again = subprocess.check_output(ask.removeprefix("Ask it:"), shell=True, env=environment)
    assert b"Generating" in again
    for line, start, expected in [
        (go_on, "Go on:     ", "Iter 8: Saved adapter weights"),
        (out, "Export it: ", "Exported as merged to a b.merged."),
    ]:
        assert line.startswith(start)
        typed = f"printf '%s\\0' {line.removeprefix(start)}"  # as a shell takes it apart
        *words, _ = subprocess.check_output(typed, shell=True, text=True).split("\0")
        assert words[:2] == [sys.executable, str(ROOT / "train_lora.py")]
        assert expected in call(*words[2:]).stdout
    assert (folder / "a b.merged" / "config.json").is_file()


def test_names_that_begin_with_a_dash_are_printed_so_that_they_work(
    call: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-m").symlink_to(model)
    flags = ["--model=-m", "--data", data, "--train", "--iters", 2, "--adapter-file=-a.npz"]
    for folder in ("-a.merged", "-a.merged1"):  # the second time the first is there
        ended = call(*flags)
        for line in ended.outcome.splitlines()[1:]:
            words = shlex.split(line.partition(":")[2])
            assert call(*dropwhile(lambda w: not w.startswith("--"), words)).returncode == 0
        assert (tmp_path / folder).is_dir()


def test_the_best_adapter_is_asked_where_the_last_is_worse(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    """A run that goes on at a rate at which training does harm. Of few texts best is no better."""
    tiny.write_jsonl(tmp_path, "train", ["aaaa"] * 4)
    tiny.write_jsonl(tmp_path, "valid", [f"다른 글 {i}" for i in range(20)])
    args = [*args, "--data", tmp_path, "--batch-size", 2]
    call(*args, "--iters", 4, "--steps-per-eval", 1, "--val-batches", -1)
    resume = ["--resume-adapter-file", tmp_path / "a.npz", "--iters", 6, "--steps-per-eval", 1]
    for batches, is_named in ((10, True), (9, False)):
        saved = tmp_path / f"to/{batches}.npz"
        flags = ["--adapter-file", saved, "--val-batches", batches, "--learning-rate", 5]
        ended = call(*args, *resume, *flags)
        best = str(saved.with_suffix(".run") / "best.npz")
        told, *lines = ended.outcome.splitlines()
        assert [best in line for line in lines] == [is_named, False, is_named]
        assert (f"of {2 * batches} texts that may be chance" in told) != is_named


def test_the_printed_commands_are_short_and_ask_what_the_model_learnt(
    call: Run, model: Path, tmp_path: Path
) -> None:
    """The user's own prompt, else one of the validation texts; nothing that is the default."""
    question = {"text": "### 질문:\n물은?\n\n### 답변:\nH2O"}
    for row, asked in [
        (question, "물은?"),
        ({"prompt": "불은?", "completion": "뜨겁다."}, "불은?"),
        ({"text": "옛날 옛날 한 옛날에 아이가"}, "옛날 옛날 한"),
    ]:
        for split in ("train", "valid"):
            (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        flags = ["--model", model, "--adapter-file", tmp_path / "a.npz"]
        train = ["--train", "--iters", 1, "--lora-layers", 1, "--data", tmp_path]
        ask = call(*flags, *train).outcome.splitlines()[1]
        words = shlex.split(ask.removeprefix("Ask it:"))
        start = words.index("--model")
        assert words[start:] == [*map(str, flags), "--prompt", asked]
    own = ["--temp", "0.0", "--prompt", "달은\u3000👨\u200d👩?"]
    ask = call(*flags, *train, *own, "--max-tokens", 2).outcome.splitlines()[1]
    words = shlex.split(ask.removeprefix("Ask it:"))
    start = words.index("--model")
    assert words[start:] == [*map(str, flags), "--max-tokens", "2", *own]
    ask = call(*flags, *train, "--prompt", "한\n'둘'").outcome.splitlines()[1]
    assert ask.endswith("--prompt $'한\\n\\'둘\\''")
