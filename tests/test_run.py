"""What a run leaves behind is never lost, whatever is run after it and however it is named."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import background
import tiny
from conftest import PERPLEXITY, ROOT, Run, one_error
from lora_finetune.run import checkpoint
from test_checkpoint import ITERS, SETTINGS, assert_same_run, entries, losses, wait_for

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

NAMES = ["a.npz", "a.run/state.npz", "a.run/best.npz", "a.run/log.jsonl"]
PREVIOUS = [name.replace("a.", "a.previous-1.", 1) for name in NAMES]


@pytest.fixture(scope="module")
def args(model: Path, data: Path) -> list[object]:
    return ["--model", model, "--data", data, "--adapter-file", "a.npz", *SETTINGS]


@pytest.fixture(scope="module")
def finished(args: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a run of ITERS iterations leaves; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    background.start(folder, *args, "--iters", ITERS).join()
    for name in ("out", "err"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to go on from; the working folder."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path, names: list[str]) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names]


# --- A fresh run over an earlier one ------------------------------------------------------------


def test_a_fresh_run_stopped_early_keeps_the_earlier_one_and_can_go_on(
    args: list[object], finished: Path, copy: Path
) -> None:
    slowly = ["--steps-per-eval", 1, "--val-batches", -1, "--batch-size", 1, "--save-every", 1000]
    process = background.start(copy, *args, *slowly, "--iters", 1000)
    wait_for(copy / "out", "Iter 3: Train", process)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert contents(copy, PREVIOUS) == contents(finished, NAMES)
    *_, line = (copy / "err").read_text().splitlines()
    assert line.endswith("the same command with --resume-adapter-file a.npz goes on")
    stopped = entries(copy / "a.run/log.jsonl")

    resume = ["--resume-adapter-file", "a.npz", "--iters", stopped[-1]["iter"] + 1]
    process = background.start(copy, *args, *slowly, *resume)
    process.join()
    assert process.exitcode == 0
    assert "warning" not in (copy / "err").read_text()
    assert contents(copy, PREVIOUS) == contents(finished, NAMES)


def test_a_fresh_run_that_fails_before_its_first_save_leaves_the_earlier_one_as_it_was(
    call: Run, args: list[object], finished: Path, copy: Path
) -> None:
    ended = call(*args, "--save-every", 1000, "--learning-rate", "1e38")
    assert "not finite" in ended.stderr
    assert contents(copy, NAMES) == contents(finished, NAMES)


def test_the_first_save_of_a_fresh_run_moves_all_of_the_earlier_one_and_says_so(
    call: Run, args: list[object], finished: Path, copy: Path, tmp_path: Path
) -> None:
    ended = call(*args, "--iters", 5, "--seed", 1)
    assert ended.stderr == (
        "warning: the earlier run of a.npz is kept as a.previous-1.npz and a.previous-1.run\n"
    )
    assert contents(copy, PREVIOUS) == contents(finished, NAMES)
    call(*args, "--iters", 5, "--seed", 1, "--adapter-file", tmp_path / "a.npz")
    both = ["a.npz", "a.run/best.npz"]
    assert contents(copy, both) == contents(tmp_path, both)
    assert [entry["iter"] for entry in entries(copy / "a.run/log.jsonl")] == [1, 3, 4, 5, 5]
    ended = call(*args, "--resume-adapter-file", "a.previous-1.npz", "--adapter-file", "c.npz")
    assert ended.returncode == 2 and f"iteration {ITERS} of" in ended.stderr


def test_a_kill_within_the_move_loses_neither_run(
    args: list[object], finished: Path, tmp_path: Path
) -> None:
    """Slowed down, so that the kill comes between any two files."""
    fresh = [*args, "--iters", ITERS, "--seed", 1]
    whole = tmp_path / "whole"
    whole.mkdir()
    background.start(whole, *fresh).join()
    earlier, rng, number, moved = contents(finished, NAMES), random.Random(0), 0, 0
    while moved < 2 or number == moved:
        folder = Path(shutil.copytree(finished, tmp_path / str(number)))
        process = background.start(folder, *fresh, slow=0.03)
        while not (folder / "a.previous-1.run/state.npz").exists():
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.6))
        process.kill()
        process.join()
        assert contents(folder, PREVIOUS[:2]) == earlier[:2]
        state = checkpoint.read_state(folder / "a.npz")
        assert state is not None
        number += 1
        if state.progress.iteration == ITERS:  # the earlier run's
            assert contents(folder, NAMES[:2]) == earlier[:2]
            continue
        moved += 1
        background.start(folder, *fresh, "--resume-adapter-file", "a.npz").join()
        assert contents(folder, PREVIOUS) == earlier
        (folder / "a.previous-1.npz").unlink()
        shutil.rmtree(folder / "a.previous-1.run")
        assert_same_run(folder, whole)


def test_resuming_from_elsewhere_keeps_what_the_adapter_file_held(
    call: Run, args: list[object], finished: Path, copy: Path
) -> None:
    tiny.make_adapter(Path("other.npz"), range(2, 4))
    ended = call(*args, "--iters", 2, "--resume-adapter-file", "other.npz")
    assert ended.returncode == 0
    assert contents(copy, PREVIOUS) == contents(finished, NAMES)


def test_a_run_resumed_from_elsewhere_takes_its_best_adapter_and_log_along(
    call: Run, args: list[object], finished: Path, copy: Path
) -> None:
    """As where a run was begun over it by mistake."""
    call(*args, "--iters", 3, "--seed", 5)
    resume = ["--resume-adapter-file", "a.previous-1.npz", "--val-batches", 1]
    call(*args, "--iters", ITERS + 1, *resume)
    call(*args, "--iters", 3, "--seed", 5)
    resume = ["--resume-adapter-file", "a.previous-1.npz", "--steps-per-eval", 100]
    ended = call(*args, "--iters", ITERS, *resume)
    assert ended.returncode == 0
    assert contents(copy, NAMES[:1] + NAMES[2:3]) == contents(finished, NAMES[:1] + NAMES[2:3])
    assert losses(copy / "a.run/log.jsonl") == losses(finished / "a.run/log.jsonl")


def test_no_earlier_run_is_ever_overwritten(call: Run, args: list[object], copy: Path) -> None:
    whole = {}
    for seed in range(4):
        whole[seed] = contents(copy, NAMES)
        call(*args, "--iters", 2, "--seed", seed)
    for seed in range(4):
        kept = [name.replace("previous-1", f"previous-{seed + 1}") for name in PREVIOUS]
        assert contents(copy, kept) == whole[seed]


def test_an_adapter_that_is_put_back_is_the_one_that_is_resumed(
    call: Run, args: list[object], finished: Path, copy: Path
) -> None:
    """And not the run whose state is beside it, which replaced that adapter."""
    call(*args, "--iters", 2, "--seed", 5)
    shutil.copy("a.previous-1.npz", "a.npz")
    ended = call(*args, "--iters", 3, "--resume-adapter-file", "a.npz", "--learning-rate", 0)
    assert "a.npz has no training state beside it" in ended.stderr
    assert (copy / "a.npz").read_bytes() == (finished / "a.npz").read_bytes()


def test_a_rewound_run_stopped_early_keeps_the_longer_one(
    args: list[object], finished: Path, copy: Path
) -> None:
    more = ["--resume-adapter-file", "a.npz", "--start-iter", 3, "--iters", 1000, "--batch-size", 1]
    slowly = ["--steps-per-eval", 1, "--val-batches", -1, "--save-every", 1000]
    process = background.start(copy, *args, *more, *slowly)
    wait_for(copy / "out", "Iter 6: Train", process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert contents(copy, PREVIOUS) == contents(finished, NAMES)
    *_, line = (copy / "err").read_text().splitlines()
    assert line.endswith("--resume-adapter-file a.npz and without --start-iter goes on")


def test_a_first_run_that_never_saved_is_no_earlier_run(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = background.start(tmp_path, *args, "--save-every", 1000, "--iters", 1000)
    wait_for(tmp_path / "out", "Iter 3: Train", process)
    process.kill()
    process.join()
    assert entries(tmp_path / "a.run/log.jsonl")
    assert call(*args, "--iters", 2).stderr == ""
    assert [entry["iter"] for entry in entries(tmp_path / "a.run/log.jsonl")] == [1, 2, 2]


def test_a_test_between_two_parts_of_a_run_stays_in_the_log(
    call: Run, args: list[object], copy: Path
) -> None:
    call(*args[:6], "--test")
    call(*args, "--iters", ITERS + 1, "--resume-adapter-file", "a.npz")
    found = [entry.get("iter", "test") for entry in losses(Path("a.run/log.jsonl"), "")]
    assert found[-4:] == [ITERS, "test", ITERS + 1, ITERS + 1]


# --- Names --------------------------------------------------------------------------------------


def test_adapters_of_similar_names_share_nothing(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each ends in .npz, which is told where it was not typed."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["v1.5", "v1.7", "b.npz", "b.safetensors"]):
        ended = call(*args, "--iters", 2, "--adapter-file", name, "--seed", seed)
        told = f"warning: adapters are saved as .npz files, so this one is {name}.npz\n"
        assert (ended.returncode, ended.stderr) == (0, "" if name == "b.npz" else told)
    files = {"v1.5.npz", "v1.7.npz", "b.npz", "b.safetensors.npz"}
    folders = {name.replace(".npz", ".run") for name in files}
    assert {file.name for file in tmp_path.iterdir()} == files | folders
    resume = ["--adapter-file", "v1.5", "--resume-adapter-file", "v1.5.npz", "--seed", 0]
    assert call(*args, "--iters", 3, *resume).stderr.count("warning") == 1
    ended = call(*args[:2], "--adapter-file", "v1.7", "--prompt", "a", "--max-tokens", 1)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_one_and_what_it_leads_to_is_written(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if exists:
        call(*args, "--iters", 1, "--adapter-file", tmp_path / "disk/b.npz")
    Path("a.npz").symlink_to("../disk/b.npz")
    assert call(*args, "--iters", 2).returncode == 0
    assert Path("a.npz").is_symlink()
    assert [file.name for file in Path().iterdir()] == ["a.npz"]
    resume = ["--resume-adapter-file", tmp_path / "disk/b.npz"]
    assert call(*args, "--iters", 3, *resume).stderr == ""  # the link and the file are one run
    (process := background.start(Path(), *args, "--iters", 100_000, *resume)).join(0)
    wait_for(Path("out"), "Iter 4: Saved", process)
    one_error(call(*args, "--adapter-file", tmp_path / "disk/b.npz"), "another run is training")
    process.kill()
    process.join()


def test_either_unicode_form_of_a_name_means_the_same_file(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file was made on a Mac, which takes Hangul apart in names."""
    monkeypatch.chdir(tmp_path)
    call(*args, "--iters", 2, "--adapter-file", unicodedata.normalize("NFD", "한글.npz"))
    name = ["--adapter-file", "한글.npz"]
    assert call(*args, "--iters", 3, *name, "--resume-adapter-file", "한글.npz").stderr == ""
    assert call(*args[:2], *name, "--prompt", "a", "--max-tokens", 1).returncode == 0
    names = {unicodedata.normalize("NFC", file.name) for file in tmp_path.iterdir()}
    assert len(names) == len(list(tmp_path.iterdir())) == 2


def test_a_folder_of_mlx_lm_is_taken_with_its_scale(
    call: Run, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of 2 with a B ten times as large is the same adapter."""
    monkeypatch.chdir(tmp_path)
    arrays = {name: mx.array(array) for name, array in tiny.adapter_arrays().items()}
    np.savez("a.npz", **arrays)
    larger = {name: a * (10 if name.endswith("_b") else 1) for name, a in arrays.items()}
    for folder, saved, scale in [("twenty", arrays, 20.0), ("two", larger, 2.0)]:
        Path(folder).mkdir()
        mx.save_safetensors(f"{folder}/adapters.safetensors", saved)
        config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": scale}}
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
    test = [*args[:4], "--test"]
    perplexities = [
        float(PERPLEXITY.search(call(*test, "--adapter-file", file).stdout)[1])
        for file in ("a.npz", "twenty", "two", "two/adapters.safetensors")
    ]
    assert perplexities == pytest.approx(perplexities[:1] * 4, 1e-5)


def test_a_folder_that_is_no_adapter_is_an_error_that_says_what_to_name(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    ended = call(*args[:2], "--prompt", "a", "--adapter-file", tmp_path)
    one_error(ended, "is a folder without adapters.safetensors; name the file of an adapter")


def test_the_best_adapter_of_a_run_is_not_trained_over(
    call: Run, args: list[object], copy: Path
) -> None:
    one_error(call(*args, "--adapter-file", "a.run/best.npz"), "give another --adapter-file")


@pytest.mark.parametrize("name", ["가" * 80 + ".npz", "n" * 240 + ".npz"])
def test_a_name_too_long_for_what_is_beside_it_is_reported_before_training(
    call: Run, args: list[object], tmp_path: Path, name: str
) -> None:
    error = one_error(call(*args, "--adapter-file", tmp_path / name), "File name too long")
    assert error.startswith("error: the adapter file ")


# --- Streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_training_goes_on_when_nobody_reads_a_stream_any_more(
    args: list[object], finished: Path, tmp_path: Path, stream: str
) -> None:
    """As with `| head -1`; what is written there is lost, and nothing else."""
    name = {"stdout": "out", "stderr": "err"}[stream]
    os.mkfifo(tmp_path / name)
    process = background.start(tmp_path, *args, "--iters", ITERS)
    (tmp_path / name).open("rb").close()  # which waits until the process has it open too
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "a.npz").read_bytes() == (finished / "a.npz").read_bytes()
    assert len(losses(tmp_path / "a.run/log.jsonl")) == len(losses(finished / "a.run/log.jsonl"))


def test_a_pipe_that_is_full_and_does_not_wait_does_not_stop_training(
    args: list[object], finished: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 1000)
    command = [sys.executable, ROOT / "train_lora.py", *args, "--iters", ITERS]
    ended = subprocess.run([*map(str, command)], cwd=tmp_path, stdout=writer, check=False)
    os.close(reader), os.close(writer)
    assert ended.returncode == 0
    assert (tmp_path / "a.npz").read_bytes() == (finished / "a.npz").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_lost_on_a_full_disk_is_reported(args: list[object], finished: Path) -> None:
    ask = ["--adapter-file", finished / "a.npz", "--prompt", "a", "--max-tokens", 2]
    command = [sys.executable, ROOT / "train_lora.py", *args[:2], *ask]
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [*map(str, command)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: standard output: No space left on device\n",
    )


# --- The model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed", [False, True])
def test_every_step_is_traced_in_training_mode_and_every_evaluation_is_not(
    call: Run, args: list[object], copy: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """Some layers of mlx-lm choose a kernel by it, and one of the two has no gradient."""
    modes: dict[bool, list[bool]] = {True: [], False: []}  # within a step, and without
    attend, value_and_grad = llama.Attention.__call__, mx.value_and_grad
    in_step = False

    def watched_attention(self: llama.Attention, *inputs: object) -> mx.array:
        modes[in_step].append(self.training)
        return attend(self, *inputs)

    def watched_value_and_grad(*functions: object) -> Callable:
        step = value_and_grad(*functions)

        def watched(*inputs: object) -> object:
            nonlocal in_step
            in_step = True
            try:
                return step(*inputs)
            finally:
                in_step = False

        return watched

    monkeypatch.setattr(llama.Attention, "__call__", watched_attention)
    monkeypatch.setattr(mx, "value_and_grad", watched_value_and_grad)
    adapter = ["--resume-adapter-file", "a.npz"] if resumed else ["--adapter-file", "b.npz"]
    ended = call(*args, *adapter, "--iters", ITERS + 2, "--prompt", "a", "--max-tokens", 2)
    assert ended.returncode == 0
    assert modes[True] and all(modes[True])
    assert modes[False] and not any(modes[False])


def test_a_changed_configuration_or_tokenizer_is_noticed_on_resuming(
    call: Run, args: list[object], copy: Path, model: Path, tmp_path: Path
) -> None:
    for number, (file, old, new) in enumerate(
        [
            ("config.json", '"rope_theta": 10000.0', '"rope_theta": 5'),
            ("tokenizer_config.json", '"model_max_length": 4096', '"model_max_length": 4095'),
        ]
    ):
        folder = Path(shutil.copytree(model, tmp_path / f"model{number}"))
        (folder / file).write_text((folder / file).read_text().replace(old, new))
        more = ["--model", folder, "--iters", 30, "--adapter-file", "b.npz"]
        ended = call(*args, *more, "--resume-adapter-file", "a.npz")
        what = "config.json" if file == "config.json" else "tokenizer"
        assert f"these have changed: the model's {what}\n" in ended.stderr


def test_the_same_model_in_another_folder_is_the_same(
    call: Run, args: list[object], copy: Path, model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "moved"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=3))
    more = ["--model", folder, "--iters", ITERS + 1, "--resume-adapter-file", "a.npz"]
    assert call(*args, *more).stderr == ""


@pytest.mark.parametrize("file", ["a.npz", "a.run/best.npz"])
def test_an_adapter_on_another_model_of_the_same_shape_is_warned_of_once(
    call: Run, args: list[object], copy: Path, tmp_path: Path, file: str
) -> None:
    other = tiny.make_model(tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    weights = {name: array * 1.1 for name, array in weights.items()}
    mx.save_safetensors(str(other / "model.safetensors"), weights, metadata={"format": "mlx"})
    ask = ["--adapter-file", file, "--prompt", "a", "--max-tokens", 1, "--test", "--data", args[3]]
    assert call("--model", args[1], *ask).stderr == ""
    ended = call("--model", other, *ask)
    assert ended.stderr == (f"warning: since {file} was saved, these have changed: the model\n")
