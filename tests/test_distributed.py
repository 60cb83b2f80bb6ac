"""One run by several processes, as mlx.launch starts them: what comes out, and how they end."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import background
import tiny
from conftest import Run
from lora_finetune.adapters import loading, npz
from lora_finetune.run import checkpoint
from lora_finetune.texts import batching
from test_checkpoint import RHYTHM, entries, losses, wait_for

import mlx.core as mx
import numpy as np
import pytest

Processes = list[multiprocessing.Process]

RECIPE = ["--warmup", 3, "--max-grad-norm", 1, "--optimizer", "adamw", "--targets", "attention"]
SETTINGS = ["--lora-layers", 2, "--batch-size", 4, "--learning-rate", "1e-3", *RHYTHM]


@pytest.fixture(scope="module")
def args(model: Path, data: Path) -> list[object]:
    common = ["--train", "--model", model, "--data", data, "--adapter-file", "a.npz"]
    return [*common, *SETTINGS, *RECIPE]


def launch(
    folder: Path, size: int, *args: object, of: dict[int, dict] | None = None, **options: object
) -> Processes:
    """Start processes as mlx.launch does on one machine; `of` has options of single ones."""
    folder.mkdir(exist_ok=True)
    write_hosts(folder, size)
    environments = [{"MLX_RANK": str(rank), "MLX_HOSTFILE": "hosts"} for rank in range(size)]
    return [
        background.start(
            folder, *args, suffix=f".{rank}", env=env, **options, **(of or {}).get(rank, {})
        )
        for rank, env in enumerate(environments)
    ]


def write_hosts(folder: Path, size: int) -> None:
    """Write the file that tells each process where the others listen, on ports that are free."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(size)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    (folder / "hosts").write_text(json.dumps(hosts))


# Seconds within which all have ended if none waits for another that has gone; on a GPU they may
# have kernels to compile first.
SOON = 30 if mx.default_device() == mx.cpu else 60


def join(processes: Processes, seconds: float = 180) -> list[int]:
    """The exit statuses of processes, which have so many seconds to end."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not alive, f"processes {alive} were still there after {seconds} s"
    return [process.exitcode for process in processes]


def printed(folder: Path, name: str) -> list[list[str]]:
    """The lines in `out` or `err` of the processes of a run, but MLX's and that they wait."""
    files = sorted(folder.glob(f"{name}.*"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    others = ("[ring]", "hint: waiting for the other")
    return [[line for line in text.splitlines() if not line.startswith(others)] for text in texts]


def assert_equal_to_rounding(folder: Path, other: Path) -> None:
    found, expected = (npz.read_arrays(path / "a.npz") for path in (folder, other))
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)
    logs = [losses(path / "a.run/log.jsonl", "") for path in (folder, other)]
    for entry, other_entry in zip(*logs, strict=True):
        answers = entry.pop("answers", None), other_entry.pop("answers", None)
        assert None in answers or answers[0] == answers[1]
        assert entry == pytest.approx(other_entry, rel=1e-5)


@pytest.fixture(scope="module")
def alone(args: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 13 iterations by a single process."""
    folder = tmp_path_factory.mktemp("alone")
    process = background.start(folder, *args, "--test", "--iters", 13)
    process.join()
    assert process.exitcode == 0
    return folder


def test_two_processes_do_what_one_does(args: list[object], alone: Path, tmp_path: Path) -> None:
    """The last batch of an epoch, the tenth, has one text, so that one of them has none of it."""
    assert join(launch(tmp_path, 2, *args, "--test", "--iters", 13)) == [0] * 2
    assert_equal_to_rounding(tmp_path, alone)
    out, err = printed(tmp_path, "out"), printed(tmp_path, "err")
    assert [line.split(",")[0] for line in out[0]] == [
        line.split(",")[0] for line in (alone / "out").read_text().splitlines()
    ]
    assert not any([*out[1:], *err[1:]]), "only the first process prints"


def test_a_run_goes_on_with_another_number_of_processes(
    args: list[object], alone: Path, tmp_path: Path
) -> None:
    resume = ["--resume-adapter-file", "a.npz", "--test"]
    assert join(launch(tmp_path, 4, *args, "--iters", 10)) == [0] * 4
    process = background.start(tmp_path, *args, *resume[:2], "--iters", 11)
    process.join()
    assert process.exitcode == 0
    assert join(launch(tmp_path, 2, *args, *resume, "--iters", 13)) == [0] * 2
    found, expected = (npz.read_arrays(path / "a.npz") for path in (tmp_path, alone))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)
    trained = [entries(path / "a.run/log.jsonl", "test_loss") for path in (tmp_path, alone)]
    assert trained[0] == [pytest.approx(entry, rel=1e-5) for entry in trained[1]]


def test_a_launcher_of_one_process_starts_a_run_like_any_other(
    args: list[object], tmp_path: Path
) -> None:
    """mlx.launch -n 1 leaves the file of hosts empty, which MLX itself cannot read."""
    (tmp_path / "hosts").write_text("\n")
    env = {"MLX_RANK": "0", "MLX_HOSTFILE": "hosts"}
    process = background.start(tmp_path, *args, "--iters", 2, env=env)
    process.join()
    assert process.exitcode == 0, (tmp_path / "err").read_text()


# --- Shares -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8])
def test_each_text_is_in_one_share_and_shares_differ_by_a_text_at_most(size: int) -> None:
    lengths = np.random.default_rng(size).integers(2, 500, 39)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    first_of_its_text = np.isin(np.arange(starts[-1]), starts)
    examples = batching.Examples(np.arange(starts[-1], dtype=np.int32), starts, first_of_its_text)
    shares = [
        next(batching.training_batches(examples, 39, 0, 0, 1, rank, size)) for rank in range(size)
    ]
    first_tokens = [tokens[:, 0].tolist() for [(tokens, _)] in shares]
    assert sorted(sum(first_tokens, [])) == starts[:-1].tolist()
    assert max(map(len, first_tokens)) - min(map(len, first_tokens)) <= 1


# --- Together to the end ------------------------------------------------------------------------

LONG = ["--iters", 100_000]


def wait_for_iteration(folder: Path, processes: Processes, rng: random.Random) -> None:
    """Wait until a first save and some more, so that a stop comes at any moment of an iteration."""
    wait_for(folder / "out.0", "Iter 4: Saved", processes[0])
    time.sleep(rng.uniform(0, 0.3))


def assert_saved_whole(folder: Path) -> int:
    """Check that the state belongs to the adapter; returns the iteration."""
    state = checkpoint.read_state(folder / "a.npz")
    assert state is not None
    loading.read_adapter(folder / "a.npz")
    return state.progress.iteration


@pytest.mark.parametrize("number", range(int(os.environ.get("STOPS", 1))))
@pytest.mark.parametrize("kind", ["one", "all"])
@pytest.mark.parametrize(("signal_number", "size"), [(signal.SIGINT, 2), (signal.SIGTERM, 4)])
def test_a_signal_to_one_or_all_stops_all_and_the_first_saves(
    args: list[object], tmp_path: Path, signal_number: int, size: int, kind: str, number: int
) -> None:
    rng = random.Random(number)
    processes = launch(tmp_path, size, *args, *LONG)
    wait_for_iteration(tmp_path, processes, rng)
    for process in processes if kind == "all" else [rng.choice(processes)]:
        os.kill(process.pid, signal_number)
    assert join(processes, SOON) == [128 + signal_number] * size
    out, err = printed(tmp_path, "out"), printed(tmp_path, "err")
    iteration = assert_saved_whole(tmp_path)
    assert f"interrupted: iteration {iteration} is saved" in err[0][-1]
    assert not any([*out[1:], *err[1:]])


@pytest.mark.parametrize("number", range(int(os.environ.get("STOPS", 2))))
def test_where_one_is_killed_the_others_end_and_what_was_saved_is_whole(
    args: list[object], tmp_path: Path, number: int
) -> None:
    rng = random.Random(number)
    processes = launch(tmp_path, 4, *args, *LONG)
    wait_for_iteration(tmp_path, processes, rng)
    dead = (0, 2, 1, 3)[number % 4]
    processes[dead].kill()
    codes = join(processes, SOON)
    assert codes == [-signal.SIGKILL if rank == dead else 2 for rank in range(4)]
    iteration = assert_saved_whole(tmp_path)
    for rank, lines in enumerate(printed(tmp_path, "err")):
        if rank != dead:
            assert len(lines) == 1
            assert "another process" in lines[0]
            assert (f"iteration {iteration} is saved" in lines[0]) == (rank == 0)
            assert (f"process {rank} (on " in lines[0]) == (rank > 0)


def test_where_one_answers_no_more_a_stop_ends_the_first_which_saves(
    args: list[object], tmp_path: Path
) -> None:
    """As on connections of which MLX does not notice that the other end has gone."""
    processes = launch(tmp_path, 2, *args, *LONG, wait_at_end=2.0)
    wait_for_iteration(tmp_path, processes, random.Random(0))
    os.kill(processes[1].pid, signal.SIGSTOP)
    os.kill(processes[0].pid, signal.SIGTERM)
    processes[0].join(SOON)
    processes[1].kill()
    assert processes[0].exitcode == 2
    line = printed(tmp_path, "err")[0][-1]
    # It may have heard of the stop from both, and lost the other when it waited for its end.
    lost = "error: the connection to another process was lost (TimeoutError)"
    assert line.startswith((lost, "interrupted: ")) and "is saved" in line
    assert f"iteration {assert_saved_whole(tmp_path)} is saved" in line


def test_a_loss_that_is_not_finite_ends_all_with_one_line(
    args: list[object], tmp_path: Path
) -> None:
    codes = join(launch(tmp_path, 3, *args, *LONG, "--learning-rate", "1e38"), SOON)
    assert codes == [2] * 3
    err = printed(tmp_path, "err")
    assert "is not finite" in err[0][-1]
    assert not any(err[1:])


def test_a_full_disk_ends_all(args: list[object], tmp_path: Path) -> None:
    sizes = {0: {"largest_file": 20_000}}
    assert join(launch(tmp_path, 3, *args, *LONG, of=sizes), SOON) == [2] * 3
    err = printed(tmp_path, "err")
    assert err[0][-1].startswith("error: a.")
    assert "File too large" in err[0][-1]
    assert not any(err[1:])


@pytest.fixture
def long_texts(tmp_path: Path) -> list[object]:
    """The arguments of a run on texts of 243 tokens, whose memory is more than the model's."""
    for split in ("train", "valid"):
        tiny.write_jsonl(tmp_path, split, [f"{i} " + "물은 H2O. " * 20 for i in range(8)])
    return ["--data", tmp_path, "--batch-size", 8, "--iters", 3, "--learning-rate", "1e-3"]


def test_where_the_memory_of_one_does_not_do_all_end(
    args: list[object], long_texts: list[object], tmp_path: Path
) -> None:
    little = {1: {"device_memory": 4_000_000}}
    assert join(launch(tmp_path, 2, *args, *long_texts, of=little), SOON) == [2, 2]
    [first, other] = printed(tmp_path, "err")
    assert len(other) == 1
    assert re.match(r"error: process 1 \(on .*\): a text of 243 tokens takes more memory", other[0])
    assert re.match(r"error: process 1 \(on .*\) has failed or was interrupted", first[-1])
    assert not (tmp_path / "a.npz").exists()


def test_where_the_memory_of_one_is_small_all_compute_in_as_many_parts(
    args: list[object], long_texts: list[object], tmp_path: Path
) -> None:
    folders = [tmp_path / "plenty", tmp_path / "little"]
    assert join(launch(folders[0], 2, *args, *long_texts)) == [0, 0]
    peak = float(re.search(r"Peak mem ([\d.]+) GB", (folders[0] / "out.0").read_text())[1])
    little = {1: {"device_memory": int(peak * 2e9 / 2)}}  # two processes share it
    assert join(launch(folders[1], 2, *args, *long_texts, of=little)) == [0, 0]
    assert checkpoint.read_state(folders[0] / "a.npz").progress.micro_batches == 1
    assert checkpoint.read_state(folders[1] / "a.npz").progress.micro_batches > 1
    assert_equal_to_rounding(*folders)


# --- The same thing -----------------------------------------------------------------------------


def test_another_data_file_in_one_process_is_an_error_that_names_it(
    model: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "valid"):
        (other / f"{split}.jsonl").write_bytes((data / f"{split}.jsonl").read_bytes())
    with (other / "train.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"text": "하나 더"}\n')
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, texts in zip(folders, (data, other), strict=True):
        folder.mkdir()
        (folder / "texts").symlink_to(texts)
    args = ["--train", "--model", model, "--data", "texts", "--lora-layers", 2]
    args += ["--adapter-file", "a.npz"]
    processes = launch_each(folders, args, args)
    assert join(processes, SOON) == [2, 2]
    [_, line] = (folders[0] / "err").read_text().splitlines()  # after what it waits for
    assert line.startswith("error: process 1 (on ")
    assert "train.jsonl" in line
    assert "valid.jsonl" not in line
    assert not (folders[1] / "err").read_text()
    assert not (folders[0] / "a.npz").exists()


def launch_each(folders: list[Path], *args: list[object]) -> Processes:
    """Start a process in each folder with arguments of its own."""
    hosts = folders[0].parent
    write_hosts(hosts, len(folders))
    env = {"MLX_HOSTFILE": str(hosts / "hosts")}
    return [
        background.start(folder, *own, env={**env, "MLX_RANK": str(rank)})
        for rank, (folder, own) in enumerate(zip(folders, args, strict=True))
    ]


def test_flags_that_differ_are_named_too(
    model: Path, data: Path, alone: Path, tmp_path: Path
) -> None:
    """Where others would only wait for batches that never come."""
    folders = [Path(shutil.copytree(alone, tmp_path / str(rank))) for rank in range(2)]
    args = ["--test", "--model", model, "--data", data, "--adapter-file", "a.npz"]
    processes = launch_each(folders, [*args, "--test-batches", 3], args)
    assert join(processes, SOON) == [2, 2]
    line = (folders[0] / "err").read_text().splitlines()[-1]
    assert "differs from process 0" in line
    assert "--test-batches (500, not 3); make that the same" in line
    assert not (folders[1] / "err").read_text()


def test_moments_of_adam_that_differ_are_an_error(
    args: list[object], alone: Path, tmp_path: Path
) -> None:
    folders = [Path(shutil.copytree(alone, tmp_path / str(rank))) for rank in range(2)]
    state = folders[1] / "a.run/state.npz"
    with np.load(state) as saved:
        arrays = {n: a * 2 if n.endswith(".v") else a for n, a in saved.items()}
    np.savez(state, **arrays)
    args = [*args, "--iters", 60, "--resume-adapter-file", "a.npz"]
    assert join(launch_each(folders, args, args), SOON) == [2, 2]
    line = (folders[0] / "err").read_text().splitlines()[-1]
    assert "in Adam's moments to start from (" in line


def test_what_one_does_is_done_by_one_alone(model: Path, data: Path, tmp_path: Path) -> None:
    """Nobody waits for another to generate or to export."""
    args = ["--model", model, "--data", data, "--train", "--iters", 1, "--adapter-file", "a.npz"]
    args += ["--prompt", "질문: 1?", "--max-tokens", 5, "--export", "mlx-lm", "exported"]
    assert join(launch(tmp_path, 2, *args)) == [0, 0]
    assert "==========" in printed(tmp_path, "out")[0][-2]
    assert not printed(tmp_path, "out")[1]
    assert (tmp_path / "exported" / "adapters.safetensors").is_file()


def test_a_process_that_cannot_join_says_so(args: list[object], tmp_path: Path) -> None:
    env = {"MLX_RANK": "1", "MLX_HOSTFILE": "nowhere"}
    process = background.start(tmp_path, *args, "--iters", 2, env=env)
    process.join()
    assert process.exitcode == 2
    [line] = (tmp_path / "err").read_text().splitlines()
    assert re.match(r"error: process 1 \(on .*\): the other processes were not found", line)


def test_without_a_launcher_the_distributed_engine_is_never_touched(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(mx, "distributed")
    assert call(*args, "--iters", 2).returncode == 0
