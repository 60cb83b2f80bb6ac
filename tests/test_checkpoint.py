"""Runs that are killed, interrupted or starved, and what is left of them."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import background
import tiny
from conftest import ROOT, Run, make_texts
from lora_finetune.adapters import loading
from lora_finetune.base import signals
from lora_finetune.run import checkpoint

import mlx.core as mx
import numpy as np
import pytest

# A run in which reports, validations, saves and epochs (of 10) end at different iterations.
RHYTHM = ["--steps-per-report", 3, "--steps-per-eval", 4, "--save-every", 2, "--val-batches", 2]
SETTINGS = ["--train", "--lora-layers", 2, "--batch-size", 4, "--learning-rate", "1e-2", *RHYTHM]
ITERS = 13


@pytest.fixture(scope="module")
def args(model: Path, data: Path) -> list[object]:
    return ["--model", model, "--data", data, "--adapter-file", "a.npz", *SETTINGS]


@pytest.fixture(scope="module")
def uninterrupted(args: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = background.start(folder, *args, "--iters", ITERS)
    process.join()
    assert process.exitcode == 0
    return folder


@pytest.fixture
def copy(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the uninterrupted run, to go on from; the working folder."""
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "copy"))
    monkeypatch.chdir(folder)
    return folder


def losses(log: Path, key: str = "iter") -> list[dict[str, float]]:
    """The entries of a log without the times, which differ from run to run."""
    timed = {"it_per_sec", "tokens_per_sec", "peak_mem_gb"}
    return [{name: e[name] for name in e.keys() - timed} for e in entries(log, key)]


def entries(log: Path, key: str = "iter") -> list[dict[str, float]]:
    """The entries of a log that have a key."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [entry for entry in map(json.loads, lines) if not key or key in entry]


def assert_same_run(folder: Path, other: Path) -> None:
    for name in ("a.npz", "a.run/best.npz"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert losses(folder / "a.run/log.jsonl") == losses(other / "a.run/log.jsonl")
    assert {file.name for file in folder.iterdir()} == {file.name for file in other.iterdir()}
    last = [(path / "out").read_text().splitlines()[-1] for path in (folder, other)]
    assert last[0] == last[1]


def wait_for(file: Path, words: str, process: multiprocessing.Process) -> None:
    """Wait until a process has written some words to a file."""
    while not (file.exists() and words in file.read_text(encoding="utf-8", errors="replace")):
        assert process.is_alive(), file.with_name("err").read_text()
        time.sleep(0.005)


# --- Killed -------------------------------------------------------------------------------------


def test_a_run_killed_again_and_again_ends_as_one_that_never_was(
    args: list[object], uninterrupted: Path, tmp_path: Path
) -> None:
    """At each step of a save, of which it has nine with a best adapter, and at other moments."""
    rng = random.Random(0)
    for number, moments in enumerate([range(1, 10), range(10, 0, -1), [None] * 4]):
        folder = tmp_path / str(number)
        folder.mkdir()
        resume: list[object] = []
        for step in moments:
            process = background.start(folder, *args, *resume, "--iters", ITERS, killed_at=step)
            process.join(None if step else rng.uniform(0.2, 1.0))
            process.kill()
            process.join()
            if process.exitcode == 0:  # it was done before
                break
            assert process.exitcode == -signal.SIGKILL, (folder / "err").read_text()
            if (folder / "a.run/state.npz").exists():
                state = checkpoint.read_state(folder / "a.npz")
                assert state is not None, "what is saved does not belong together"
                if (folder / "a.npz").exists():
                    loading.read_adapter(folder / "a.npz")
                resume = ["--resume-adapter-file", "a.npz"]
        else:
            background.start(folder, *args, *resume, "--iters", ITERS).join()
        assert_same_run(folder, uninterrupted)


RECIPE = [
    "--lr-schedule",
    "cosine",
    "--warmup",
    "30%",
    "--max-grad-norm",
    2,
    "--optimizer",
    "adamw",
]
RECIPE += ["--weight-decay", 0.1, "--bias-correction", "--targets", "all"]


def test_a_run_with_all_that_is_off_by_default_goes_on_the_same(
    args: list[object], uninterrupted: Path, tmp_path: Path
) -> None:
    """Rates and Adam's correction are of the iteration, also where the run was killed twice."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, kills in [(whole, []), (cut, [9, 20])]:
        folder.mkdir()
        resume: list[object] = []
        for step in [*kills, None]:
            more = [*args, *RECIPE, "--iters", ITERS, *resume]
            background.start(folder, *more, killed_at=step).join()
            resume = ["--resume-adapter-file", "a.npz"]
    assert_same_run(cut, whole)
    log = entries(whole / "a.run/log.jsonl", "learning_rate")
    # Of iterations 3 and 13; cos(9/10 · 180°) is −0.9510565163.
    rates = log[0]["learning_rate"], log[-1]["learning_rate"]
    assert rates == pytest.approx((7.5e-3, 1e-2 * (1 - 0.9510565163) / 2))
    assert (whole / "a.npz").read_bytes() != (uninterrupted / "a.npz").read_bytes()
    assert int(checkpoint.read_state(cut / "a.npz").optimizer["steps"][0]) == ITERS


def test_a_state_that_is_a_save_ahead_of_its_adapter_is_used(
    args: list[object], uninterrupted: Path, tmp_path: Path
) -> None:
    """The process died between the two files of a save; the state holds the adapter too."""
    process = background.start(tmp_path, *args, "--iters", ITERS, slow=0.2)
    wait_for(tmp_path / "out", "Iter 2: Saved", process)
    first = (tmp_path / "a.npz").read_bytes()
    state = (tmp_path / "a.run/state.npz").stat().st_ino
    while (tmp_path / "a.run/state.npz").stat().st_ino == state:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert (tmp_path / "a.npz").read_bytes() == first
    assert checkpoint.read_state(tmp_path / "a.npz").progress.iteration == 4
    resume = ["--resume-adapter-file", "a.npz"]
    process = background.start(tmp_path, *args, "--iters", ITERS, *resume)
    process.join()
    assert "Iter 4:" not in (tmp_path / "out").read_text()  # as it would from iteration 2
    assert_same_run(tmp_path, uninterrupted)


# --- Interrupted --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "Iter 3: Train"),
        (signal.SIGTERM, "Iter 8: Val"),
        (signal.SIGHUP, "Iter 10: Saved"),
    ],
)
def test_a_signal_ends_the_run_after_its_iteration_and_resuming_goes_on(
    args: list[object], uninterrupted: Path, tmp_path: Path, number: int, moment: str
) -> None:
    process = background.start(tmp_path, *args, "--iters", ITERS, slow=0.03)
    wait_for(tmp_path / "out", moment, process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    *_, last = (tmp_path / "err").read_text().splitlines()
    *_, saved = (tmp_path / "out").read_text().splitlines()
    iteration = int(saved.split(":")[0].removeprefix("Iter "))
    assert saved == f"Iter {iteration}: Saved adapter weights to a.npz."
    assert last == (
        f"interrupted: iteration {iteration} is saved; the same command with "
        "--resume-adapter-file a.npz goes on"
    )
    resume = ["--resume-adapter-file", "a.npz"]
    process = background.start(tmp_path, *args, "--iters", ITERS, *resume)
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "err").read_text().startswith("Validation loss")  # no warning before it
    assert_same_run(tmp_path, uninterrupted)


def test_a_signal_within_a_validation_does_not_wait_for_its_end(
    args: list[object], uninterrupted: Path, tmp_path: Path
) -> None:
    often = ["--steps-per-eval", 1, "--val-batches", -1, "--batch-size", 1, "--iters", 23]
    process = background.start(tmp_path, *args, *often)
    wait_for(tmp_path / "out", "Iter 3: Val", process)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    resume = ["--resume-adapter-file", "a.npz"]
    background.start(tmp_path, *args, *often, *resume).join()
    other = tmp_path / "other"
    other.mkdir()
    background.start(other, *args, *often).join()
    other = other.rename(tmp_path.with_name("other"))
    assert_same_run(tmp_path, other)


def test_a_second_ctrl_c_stops_at_once(args: list[object], tmp_path: Path) -> None:
    """In the middle of a save, which lasts here; it leaves the save before."""
    process = background.start(tmp_path, *args, "--iters", ITERS, slow=0.5)
    wait_for(tmp_path / "out", "Iter 2: Saved", process)
    before = (tmp_path / "a.npz").read_bytes()
    os.kill(process.pid, signal.SIGINT)
    wait_for(tmp_path / "err", "Ctrl-C", process)
    os.kill(process.pid, signal.SIGINT)
    process.join(0.9)
    assert process.exitcode == 130
    assert (tmp_path / "a.npz").read_bytes() == before


def test_a_signal_before_the_first_iteration_saves_nothing(
    args: list[object], tmp_path: Path
) -> None:
    long = ["--val-batches", -1, "--batch-size", 1]
    process = background.start(tmp_path, *args, *long, "--data", make_data(tmp_path, valid=1500))
    wait_for(tmp_path / "out", "Training: ", process)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert (tmp_path / "err").read_text().endswith("\ninterrupted: nothing new was saved\n")
    assert not list(tmp_path.glob("*.npz"))


def test_a_signal_that_was_ignored_stays_so() -> None:
    """As nohup has it."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.hearing_stops() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, old)


def test_ctrl_c_while_the_program_starts_ends_it_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "train_lora.py"), "--train"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "numpy" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in rest
    assert rest.endswith("\ninterrupted\n")


def test_a_terminal_that_goes_away_ends_the_run_with_a_save(
    args: list[object], tmp_path: Path
) -> None:
    """As where a connection is lost: nothing can be printed any more, and SIGHUP comes."""
    terminal, end = os.openpty()
    for name in ("out", "err"):
        (tmp_path / name).symlink_to(os.ttyname(end))
    process = background.start(tmp_path, *args, "--iters", 100_000)
    printed = b""
    while b"Iter 2: Saved" not in printed:
        printed += os.read(terminal, 1000)
    os.close(end)
    os.close(terminal)
    os.kill(process.pid, signal.SIGHUP)
    process.join()
    assert process.exitcode == 128 + signal.SIGHUP
    reported = [entry["iter"] for entry in entries(tmp_path / "a.run/log.jsonl")]
    assert checkpoint.read_state(tmp_path / "a.npz").progress.iteration >= max(2, *reported)


# --- Starved ------------------------------------------------------------------------------------


def make_data(folder: Path, **numbers: int) -> Path:
    """A data folder of texts, as many in each split as asked for, or four."""
    for split in ("train", "valid", "test"):
        tiny.write_jsonl(folder / "data", split, make_texts(numbers.get(split, 4), 0))
    return folder / "data"


def test_a_full_disk_is_reported_and_leaves_the_last_save(
    args: list[object], uninterrupted: Path, tmp_path: Path
) -> None:
    """Files may not grow beyond what the adapter takes, so the state cannot be written."""
    background.start(tmp_path, *args, "--iters", 4).join()
    before = {file.name: file.read_bytes() for file in tmp_path.glob("a*.npz")}
    process = background.start(
        tmp_path, *args, "--iters", ITERS, "--resume-adapter-file", "a.npz", largest_file=20_000
    )
    process.join()
    assert process.exitcode == 2
    assert (
        tmp_path / "err"
    ).read_text() == "error: a.run/state.npz cannot be written: File too large\n"
    assert {file.name: file.read_bytes() for file in tmp_path.glob("a*.npz*")} == before
    background.start(tmp_path, *args, "--iters", ITERS, "--resume-adapter-file", "a.npz").join()
    assert (tmp_path / "a.npz").read_bytes() == (uninterrupted / "a.npz").read_bytes()


def test_a_folder_that_goes_away_is_reported(args: list[object], tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    more = ["--adapter-file", "below/a.npz", "--iters", 1000, "--steps-per-eval", 1000]
    process = background.start(tmp_path, *args, *more)
    wait_for(tmp_path / "out", "Iter 2: Saved", process)
    (tmp_path / "below").rename(tmp_path / "elsewhere")
    process.join()
    assert process.exitcode == 2
    *_, last = (tmp_path / "err").read_text().splitlines()
    assert last.startswith("error: below/a.") and "No such file or directory" in last
    assert checkpoint.read_state(tmp_path / "elsewhere" / "a.npz")


# --- Diverged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["1e38", "1e300"])  # with 1e30 all logits are 0, which is finite
def test_a_run_that_diverges_stops_and_keeps_what_was_good(
    call: Run, args: list[object], tmp_path: Path, rate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call(*args, "--iters", 4)
    ended = call(*args, "--learning-rate", rate, "--save-every", 1, "--iters", 9)
    assert ended.returncode == 2
    assert re.search(
        r"error: .* is not finite \((nan|inf)\) after iteration \d+; .*--learning-rate",
        ended.stderr,
    )
    for file in tmp_path.glob("*.npz"):
        for name, array in np.load(file).items():
            assert np.isfinite(array).all(), (file, name)


def test_a_tokenizer_of_another_model_is_reported_before_training(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that makes tokens which the model does not know."""
    folder = tiny.make_model(tmp_path / "model", vocab_size=200)
    monkeypatch.chdir(tmp_path)
    for phase in ("--train", "--prompt", "--test"):
        tiny.make_adapter(Path("a.npz"))
        more = ["가"] if phase == "--prompt" else []
        ended = call("--model", folder, "--data", args[3], "--adapter-file", "a.npz", phase, *more)
        assert "Iter" not in ended.stdout
        *_, error = ended.stderr.splitlines()
        assert error.startswith("error: token ")
        assert "is outside the model's vocabulary of 200" in error


def test_a_model_whose_loss_is_not_finite_is_reported_before_the_first_iteration(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make_model(tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] *= math.nan
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    monkeypatch.chdir(tmp_path)
    ended = call(*args, "--model", folder)
    assert ended.returncode == 2
    assert re.fullmatch(r"error: the validation loss is not finite .*\n", ended.stderr)
    assert not list(tmp_path.glob("a*.npz"))


# --- Two runs -----------------------------------------------------------------------------------


def test_a_second_run_on_the_same_adapter_is_refused(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = background.start(tmp_path, *args, "--iters", 100_000)
    wait_for(tmp_path / "out", "Iter 2: Saved", process)
    ended = call(*args)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: another run is training")
    assert ended.stderr.count("\n") == 1
    assert process.is_alive()
    process.kill()
    process.join()
    ended = call(*args, "--iters", 1)  # the lock of a dead process does not count
    assert ended.returncode == 0


def test_a_second_signal_within_the_last_save_does_not_cut_it_short(
    args: list[object], tmp_path: Path
) -> None:
    """As where a terminal is closed: the shell and the system both send one."""
    process = background.start(tmp_path, *args, "--save-every", 1000, "--iters", 1000, slow=0.3)
    wait_for(tmp_path / "out", "Iter 3: Train", process)
    os.kill(process.pid, signal.SIGTERM)
    while not list(tmp_path.glob("a.run/*.part")):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert "is saved; the same command with" in (tmp_path / "err").read_text()
    assert checkpoint.read_state(tmp_path / "a.npz") is not None


def test_a_report_is_in_the_log_once_however_often_a_run_is_cut(
    args: list[object], tmp_path: Path
) -> None:
    """Here after the save of a stop, at whose iteration a report was due still."""
    more = [*args, "--steps-per-report", 1, "--save-every", 1000, "--iters", 1000]
    process = background.start(tmp_path, *more)
    wait_for(tmp_path / "out", "Iter 3: Train", process)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    for _ in range(2):
        process = background.start(tmp_path, *more, "--resume-adapter-file", "a.npz")
        wait_for(tmp_path / "out", "Train", process)
        process.kill()
        process.join()
    more = [*args, "--steps-per-report", 1, "--iters", 30, "--resume-adapter-file", "a.npz"]
    background.start(tmp_path, *more).join()
    reported = [entry["iter"] for entry in entries(tmp_path / "a.run/log.jsonl", "train_loss")]
    assert reported == sorted(set(reported))


# --- Resumed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1], [5, 11], list(range(1, ITERS))])
def test_a_run_cut_anywhere_ends_in_the_same_adapter(
    call: Run,
    args: list[object],
    uninterrupted: Path,
    tmp_path: Path,
    cuts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the start, more than once, and after every iteration, of which the tenth ends an epoch."""
    monkeypatch.chdir(tmp_path)
    resume: list[object] = []
    for iters in [*cuts, ITERS]:
        ended = call(*args, *resume, "--iters", iters)
        assert (ended.returncode, ended.stderr) == (0, "")
        resume = ["--resume-adapter-file", "a.npz"]
    assert (tmp_path / "a.npz").read_bytes() == (uninterrupted / "a.npz").read_bytes()


def test_resuming_what_is_done_goes_on_to_the_next_phase(
    call: Run, args: list[object], copy: Path
) -> None:
    ended = call(*args, "--iters", ITERS, "--resume-adapter-file", "a.npz", "--test")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\nTest loss" in ended.stdout
    assert "Train loss" not in ended.stdout
    ended = call(*args, "--iters", ITERS - 1, "--resume-adapter-file", "a.npz")
    assert ended.returncode == 2


def test_an_adapter_from_elsewhere_starts_with_fresh_moments_and_says_so(
    call: Run, args: list[object], copy: Path
) -> None:
    """Also where it took the place of the one that the state belongs to."""
    tiny.make_adapter(Path("other.npz"), range(2, 4))
    shutil.copy("other.npz", "a.npz")
    for name in ("other.npz", "a.npz"):
        adapter = ["--resume-adapter-file", name, "--adapter-file", f"after-{name}"]
        ended = call(*args, "--iters", 2, *adapter)
        assert ended.stderr == (
            f"warning: {name} has no training state beside it, so Adam starts with fresh moments\n"
        )
        assert ended.stdout.count("Iter 1: ") == 1


def test_an_explicit_start_wins_over_the_state(call: Run, args: list[object], copy: Path) -> None:
    resume = ["--resume-adapter-file", "a.npz", "--adapter-file", "b.npz"]
    ended = call(*args, *resume, "--start-iter", 5, "--iters", 7)
    assert re.findall(r"Iter (\d+): (\w+)", ended.stdout) == [
        ("6", "Val"),
        ("6", "Train"),
        ("6", "Saved"),
        ("7", "Train"),
        ("7", "Val"),
        ("7", "Saved"),
    ]
    # Adam's moments are those of the state all the same.
    before, after = (checkpoint.read_state(Path(name)).optimizer for name in ("a.npz", "b.npz"))
    assert all((after[n] >= 0.99 * before[n]).all() for n in before if n.endswith(".v"))


def test_what_has_changed_since_is_reported_in_one_line(
    call: Run, args: list[object], copy: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    tiny.write_jsonl(tmp_path / "data", "train", make_texts(40, 7))
    changes = [
        "--data",
        tmp_path / "data",
        "--batch-size",
        8,
        "--model",
        tiny.make_model(tmp_path / "m", use_cache=False, rope_theta=5.0),
    ]
    ended = call(*args, *changes, "--iters", 30, "--resume-adapter-file", "a.npz")
    assert ended.returncode == 0
    assert ended.stderr == (
        "warning: since a.npz was saved, these have changed: --batch-size (4, now 8), train.jsonl, "
        "the model's config.json\n"
        "warning: the earlier run of a.npz is kept as a.previous-1.npz and a.previous-1.run\n"
    )
    assert f"Iter {ITERS + 1}: Val loss" in ended.stdout


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "an adapter"])
def test_a_damaged_state_is_reported_with_a_remedy(
    call: Run, args: list[object], copy: Path, damage: str
) -> None:
    state = Path("a.run/state.npz")
    whole = state.read_bytes()
    contents = {
        "cut": whole[:-100],
        "empty": b"",
        "text": b"a",
        "an adapter": Path("a.npz").read_bytes(),
    }
    state.write_bytes(contents[damage])
    ended = call(*args, "--iters", 30, "--resume-adapter-file", "a.npz")
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: a.run/state.npz is damaged; delete it to resume with fresh Adam moments\n"
    )


# --- The best -----------------------------------------------------------------------------------


def test_the_adapter_with_the_lowest_validation_loss_is_kept(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the one that a run up to that iteration ends in."""
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "data", "train", ["a" * 40] * 4)
    tiny.write_jsonl(tmp_path / "data", "valid", ["a" * 40, "b" * 40])
    args = [*args, "--data", "data", "--lora-layers", 4, "--steps-per-eval", 1, "--seed", 1]
    args += ["--learning-rate", "5e-2"]
    ended = call(*args, "--iters", 45)
    validations = entries(tmp_path / "a.run/log.jsonl", "val_loss")
    best = min(validations, key=lambda entry: entry["val_loss"])
    assert ended.stdout.splitlines()[-1].endswith(
        f"The best is of iteration {best['iter']} (validation {best['val_loss']:.3f}), "
        "in a.run/best.npz."
    )
    assert 1 < best["iter"] < 45, "this run shows nothing"
    kept = Path("a.run/best.npz").read_bytes()
    call(*args, "--iters", best["iter"], "--adapter-file", "b.npz")
    assert Path("b.npz").read_bytes() == kept


# --- Long ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_does_not_grow_over_a_long_run_of_varied_lengths(
    model: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    for split in ("train", "valid"):
        lengths = [min(400, int(rng.lognormvariate(3, 1)) + 2) for _ in range(300)]
        tiny.write_jsonl(tmp_path / "data", split, ["a" * length for length in lengths])
    args = ["--model", model, "--data", tmp_path / "data", "--adapter-file", "a.npz", "--train"]
    args += ["--lora-layers", 1, "--batch-size", 2, "--iters", 1200, "--val-batches", 10]
    args += ["--steps-per-report", 15, "--steps-per-eval", 500, "--save-every", 100]
    process = background.start(tmp_path, *args)
    resident, peak = [], []  # bytes, at each report
    while process.is_alive():
        time.sleep(0.05)
        reports = entries(tmp_path / "a.run/log.jsonl", "train_loss")
        if len(reports) > len(resident) and (pages := resident_pages(process.pid)):
            resident.append(pages)
            peak.append(reports[-1]["peak_mem_gb"])
    assert process.exitcode == 0
    assert len(resident) > 50
    for name, numbers in [("resident", resident), ("MLX's peak", peak)]:
        first, _, last = np.array_split(numbers, 3)
        assert np.median(last) <= 1.05 * first.max(), name


def resident_pages(process: int) -> int:
    """Pages of memory that a process holds; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
