"""How much memory a run may take on a machine, and what is reported where it was not enough."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import background
import tiny
from conftest import TEXTS, Ended, Run, make_texts, one_error, without_outcome
from lora_finetune.base import memory
from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches.loading import dequantized_bytes
from lora_finetune.model_folder import files
from lora_finetune.training import step as training_step

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import dequantize_model

GB = 10**9
INSTALLED = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

# --- How much there is --------------------------------------------------------------------------

M1 = {
    "device_name": "Apple M1",
    "architecture": "applegpu_g13g",
    "max_buffer_length": 4_294_967_296,
    "max_recommended_working_set_size": 5_726_633_984,
    "memory_size": 8_589_934_592,
    "resource_limit": 499_000,
}
M2_ULTRA = M1 | {
    "device_name": "Apple M2 Ultra",
    "max_recommended_working_set_size": 154_618_822_656,
    "memory_size": 206_158_430_208,
}
H100 = {
    "device_name": "NVIDIA H100 80GB HBM3",
    "compute_capability_major": 9,
    "free_memory": 30 * GB,  # others have taken the rest
    "total_memory": 85 * GB,
}
CPU = {"device_name": "AMD EPYC", "architecture": "x86_64"}


@pytest.mark.parametrize(
    ("device", "machine", "in_use", "limit"),
    [
        (M1, 8_589_934_592, 0, 5_726_633_984),
        (M1, 8_589_934_592, 4 * GB, 5_726_633_984),
        (M2_ULTRA, 206_158_430_208, 0, 154_618_822_656),
        (H100, 1000 * GB, 0, 30 * GB),
        (H100, 1000 * GB, 5 * GB, 35 * GB),
        (H100 | {"free_memory": 0}, 1000 * GB, 5 * GB, 5 * GB),
        (CPU, 24 * GB, 1 * GB, 24 * GB),
    ],
)
def test_a_run_may_take_what_the_device_recommends_or_has_free(
    device: dict, machine: int, in_use: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: device)
    monkeypatch.setattr(mx, "get_active_memory", lambda: in_use)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    monkeypatch.setattr(memory, "machine_memory", lambda: machine)
    assert memory.available() == limit


NO_LIMIT = "9223372036854771712"  # as version 1 of control groups writes it
V1 = "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n1:name=systemd:/docker/ab\n0::/\n"
CONTAINERS = {
    "no control groups": (None, {}, INSTALLED),
    "version 2, no limit": ("0::/\n", {"memory.max": "max"}, INSTALLED),
    "version 2": ("0::/\n", {"memory.max": "512000000"}, 512_000_000),
    "version 2, throttled": (
        "0::/\n",
        {"memory.max": "max", "memory.high": "256000000"},
        256_000_000,
    ),
    "version 2, nested": (
        "0::/user.slice/job/step\n",
        {
            "user.slice/memory.max": "max",
            "user.slice/job/memory.max": "300000000",
            "user.slice/job/step/memory.max": "400000000",
        },
        300_000_000,
    ),
    "version 2, the host's path": ("0::/docker/ab\n", {"memory.max": "512000000"}, 512_000_000),
    "version 1": (V1, {"memory/docker/ab/memory.limit_in_bytes": "512000000"}, 512_000_000),
    "version 1, the host's path": (V1, {"memory/memory.limit_in_bytes": "128000000"}, 128_000_000),
    "version 1, no limit": (V1, {"memory/docker/ab/memory.limit_in_bytes": NO_LIMIT}, INSTALLED),
    "both versions": (
        "4:memory:/job\n0::/job\n",
        {"memory/job/memory.limit_in_bytes": "200000000", "unified/job/cgroup.procs": ""},
        200_000_000,
    ),
    "no memory controller": ("3:cpuset:/a\n0::/a\n", {"a/cgroup.procs": "1"}, INSTALLED),
    "more than is installed": ("0::/\n", {"memory.max": str(10**18)}, INSTALLED),
}


@pytest.mark.parametrize(("groups", "files", "limit"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_the_memory_limit_of_a_container_counts(
    tmp_path: Path, groups: str | None, files: dict[str, str], limit: int
) -> None:
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    assert memory.machine_memory(tmp_path) == limit


def test_weights_beyond_the_memory_are_an_error_before_they_are_loaded(
    call: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mx.get_memory_limit()
    small = M1 | {"max_recommended_working_set_size": 100_000}
    monkeypatch.setattr(mx, "device_info", lambda: small)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: None)
    tiny.make_adapter(tmp_path / "a.npz")
    args = ["--model", model, "--adapter-file", tmp_path / "a.npz", "--prompt", "a"]
    try:
        one_error(call(*args), str(model), "and there are 0.0001 GB of memory; take a smaller")
    finally:
        mx.set_memory_limit(before)
        mx.set_cache_limit(2**25)


@pytest.mark.parametrize(
    ("mode", "bits", "dtype"),
    [("affine", 3, mx.float16), ("affine", 4, mx.float32), ("affine", 8, mx.float32)]
    + [("mxfp4", 4, mx.float32)],
)
def test_what_quantized_weights_take_dequantized_is_known_before(
    mode: str, bits: int, dtype: mx.Dtype
) -> None:
    model = tiny.build_model(tiny.LLAMA)
    assert dequantized_bytes(model) == 0
    model.set_dtype(dtype)
    nn.quantize(model, 32, bits, mode=mode)
    size = dequantized_bytes(model)
    whole = dequantize_model(model).parameters()
    assert size == sum(a.nbytes for n, a in tree_flatten(whole) if a.ndim == 2)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"),
        RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
        Exception("safetensors: Cannot allocate memory (os error 12)"),
    ],
)
def test_memory_that_lacks_in_loading_is_not_taken_for_a_damaged_file(
    model: Path, error: Exception
) -> None:
    with pytest.raises(UserError, match="take a smaller or a quantized model"):
        files.check_memory(model, error)
    files.check_memory(model, ValueError("Missing 1 parameters: a"))


LONG = [f"{i} " + "물은 H2O. " * 20 for i in range(8)]  # 8 texts of 243 tokens


BOUNDED = ["--train", "--lora-layers", 4, "--batch-size", 8, "--iters", 3]


def write_long(folder: Path) -> list[object]:
    """Write LONG as data; returns the arguments for it."""
    for split in ("train", "valid"):
        tiny.write_jsonl(folder, split, LONG)
    return ["--data", folder]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose batches are computed at once."""
    folder = tmp_path_factory.mktemp("whole")
    args = ["--model", model, *write_long(folder), *BOUNDED, "--adapter-file", "a.npz"]
    background.start(folder, *args).join()
    return folder


def whole_peak(folder: Path) -> float:
    """The gigabytes that it took."""
    return max(e["peak_mem_gb"] for e in read_log(folder / "a.run") if "peak_mem_gb" in e)


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def bounded(
    call: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Ended]]:
    """Training on LONG, on a machine with so much memory."""
    before = mx.get_memory_limit()
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: None)
    fixed = ["--model", model, *write_long(tmp_path), *BOUNDED]

    def bounded(limit: float, adapter: str, *args: object) -> Ended:
        gc.collect()  # models of earlier tests would count as this one's memory
        device = M1 | {"max_recommended_working_set_size": int(limit)}
        monkeypatch.setattr(mx, "device_info", lambda: device)
        return call(*fixed, "--adapter-file", tmp_path / adapter, *args)

    yield bounded
    mx.set_memory_limit(before)
    mx.set_cache_limit(2**25)


@pytest.fixture
def forked(model: Path, tmp_path: Path) -> Callable[..., Ended]:
    """The same in a process of its own, in which no other test has left anything."""
    fixed = ["--model", model, *write_long(tmp_path), *BOUNDED]

    def forked(limit: float, adapter: str, *args: object) -> Ended:
        options = {"device_memory": int(limit)}
        process = background.start(tmp_path, *fixed, "--adapter-file", adapter, *args, **options)
        process.join()
        said = [(tmp_path / name).read_bytes() for name in ("out", "err")]
        return without_outcome(Ended(args, process.exitcode, *said))

    return forked


def peak_gb(ended: Ended) -> float:
    assert ended.returncode == 0, ended.stderr
    return float(re.search(r"Peak mem ([\d.]+) GB", ended.stdout)[1])


def assert_same_adapter(one: Path, other: Path) -> None:
    """To rounding: Adam divides by gradients, so that a few of the smallest may turn."""
    with np.load(one) as expected, np.load(other) as found:
        for name in expected:
            assert np.abs(found[name] - expected[name]).mean() < 1e-3 * 6e-5  # a step is 2e-5


def test_a_batch_of_four_times_the_memory_is_computed_in_micro_batches_with_the_same_result(
    forked: Callable[..., Ended], whole: Path, tmp_path: Path
) -> None:
    limit = whole_peak(whole) / 4
    ended = forked(limit * GB, "parts.npz")
    assert peak_gb(ended) < 1.1 * limit
    assert re.fullmatch(
        r"warning: 8 texts of up to 243 tokens do not fit into the memory, so each batch is "
        r"computed in \d micro-batches, with the same result\n", ended.stderr
    )  # fmt: skip
    assert_same_adapter(whole / "a.npz", tmp_path / "parts.npz")
    logs = read_log(whole / "a.run"), read_log(tmp_path / "parts.run")
    for name in ("val_loss", "train_loss"):
        expected, found = ([entry[name] for entry in log if name in entry] for log in logs)
        assert found == pytest.approx(expected, 1e-5)


def test_a_run_in_micro_batches_is_resumed_in_as_many_where_there_is_more_memory(
    forked: Callable[..., Ended], whole: Path, tmp_path: Path
) -> None:
    """Bit for bit."""
    limit = whole_peak(whole) / 4
    assert forked(limit * GB, "a.npz", "--iters", 2).returncode == 0
    shutil.copyfile(tmp_path / "a.npz", tmp_path / "b.npz")
    shutil.copytree(tmp_path / "a.run", tmp_path / "b.run")
    for name, memory_gb in (("a.npz", 2 * limit), ("b.npz", 100)):
        more = ["--resume-adapter-file", tmp_path / name]
        assert forked(memory_gb * GB, name, *more).returncode == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_text_beyond_the_memory_is_trained_on_with_layers_computed_twice(
    forked: Callable[..., Ended], tmp_path: Path
) -> None:
    deep = tiny.make_model(tmp_path / "deep", num_hidden_layers=8, intermediate_size=1024)
    args = ["--model", deep, "--lora-layers", 8, "--batch-size", 1, "--iters", 2]
    one = peak_gb(forked(100 * GB, "one.npz", *args))
    ended = forked(0.7 * one * GB, "twice.npz", *args)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("warning: a text of 243 tokens takes too much memory, so ")
    assert_same_adapter(tmp_path / "one.npz", tmp_path / "twice.npz")


def test_a_text_beyond_the_memory_even_so_is_an_error_before_training(
    forked: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = forked(4_000_000, "a.npz")
    assert ended.returncode == 2
    assert "Iter" not in ended.stdout
    *_, error = ended.stderr.splitlines()
    assert error.startswith("error: a text of 243 tokens takes more memory than the 0.004 GB ")
    assert not (tmp_path / "a.npz").exists()


def test_the_bound_of_a_run_is_that_of_what_mlx_takes_keeps_and_wires(
    bounded: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    wired = []
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    bounded(GB, "a.npz", "--iters", 1)
    assert wired == [GB]
    assert mx.get_memory_limit() == GB
    if mx.default_device() == mx.gpu:
        assert mx.set_cache_limit(0) == GB // 8


# --- Where the device fails ---------------------------------------------------------------------

METAL = (
    "[METAL] Command buffer execution failed: {} (0000000{}:kIOGPUCommandBufferCallbackError{})."
)
SMALLER = "lower --batch-size"
MEMORY = ["out of memory", SMALLER, "close other programs"]
DISPLAY = ["kept the display waiting", SMALLER, "caffeinate -s"]
OTHER = ["failed", "try again", SMALLER]


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (METAL.format("Insufficient Memory", 8, "OutOfMemory"), MEMORY),
        ("[metal::malloc] Attempting to allocate 9 bytes which is greater than …", MEMORY),
        ("[metal::malloc] Resource limit (499000) exceeded.", MEMORY),
        ("[malloc] Unable to allocate 123 bytes.", MEMORY),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", MEMORY),
        ("cudaGraphInstantiate(&handle_, graph) failed: out of memory", MEMORY),
        (METAL.format("Impacting Interactivity", "e", "ImpactingInteractivity"), DISPLAY),
        (METAL.format("Caused GPU Timeout Error", 2, "Timeout"), DISPLAY),
        (METAL.format("Caused GPU Hang Error", 3, "Hang"), DISPLAY),
        ("cudaStreamSynchronize(s) failed: the launch timed out and was terminated", DISPLAY),
        (METAL.format("Discarded (victim of GPU error/recovery)", 5, "InnocentVictim"), OTHER),
        ("cudaEventSynchronize(e) failed: an illegal memory access was encountered", OTHER),
    ],
)
def test_what_metal_and_cuda_raise_becomes_a_cause_and_ways_out(
    words: str, mentions: list[str]
) -> None:
    with pytest.raises(memory.DeviceError) as error, memory.device_errors(SMALLER):
        raise RuntimeError(words + "\nmore lines")
    assert all(mention in str(error.value) for mention in [*mentions, words])
    assert "more lines" not in str(error.value)


def test_memory_that_python_does_not_get_is_the_same_cause() -> None:
    with pytest.raises(memory.DeviceError, match="out of memory"), memory.device_errors(SMALLER):
        raise MemoryError


class Failing(llama.Model):
    """A Llama whose device fails, in the middle of the computation, on a batch that holds a Z.

    As Metal and CUDA do: what is asked for looks done, and reading it raises RuntimeError.
    """

    fails = True

    def __call__(self, inputs: mx.array, cache: list | None = None) -> mx.array:
        z = (inputs == ord("Z")).any() if self.fails else mx.array(False)
        one = mx.linalg.inv((1.0 - z)[None, None], stream=mx.cpu)  # of 0 there is none
        return super().__call__((inputs * one[0, 0]).astype(inputs.dtype), cache)


REASON = "the computation failed ([Inverse::eval_cpu] LU factorization failed with error code 1)"
SETTINGS = ["--train", "--lora-layers", 2, "--batch-size", 1, "--learning-rate", "1e-2"]
SETTINGS += ["--iters", 30, "--val-batches", 2, "--steps-per-eval", 4, "--steps-per-report", 3]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The arguments for a model of that kind and some data; from the folder `tmp_path`."""
    module = types.ModuleType("mlx_lm.models.failing")
    module.Model, module.ModelArgs = Failing, llama.ModelArgs
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert importlib.import_module(module.__name__) is module
    monkeypatch.chdir(tmp_path)
    folder = tiny.make_model(tmp_path / "model", model_type="failing")
    for split, texts in TEXTS.items():
        tiny.write_jsonl(tmp_path / "data", split, texts)
    return ["--model", folder, "--data", "data", "--adapter-file", "a.npz"]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_device_that_fails_within_a_step_costs_that_step_alone(
    call: Run, failing: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """The iteration before it is saved, and the run resumed ends as if nothing had happened."""
    monkeypatch.setattr(training_step, "AHEAD", ahead)
    tiny.write_jsonl(tmp_path / "data", "train", [*make_texts(29, 0), "Z"])
    error = one_error(call(*failing, *SETTINGS), REASON, "--lora-layers", "is saved")
    iteration = int(error.partition("; iteration ")[2].split()[0])
    assert 3 < iteration < 29, "this run shows nothing"
    assert error.endswith(
        f"; iteration {iteration} is saved; the same command with "
        "--resume-adapter-file a.npz goes on"
    )
    monkeypatch.setattr(Failing, "fails", False)
    resumed = call(*failing, *SETTINGS, "--resume-adapter-file", "a.npz")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert f"Iter {iteration - iteration % 3 + 3}: Train" in resumed.stdout
    assert "Iter 1:" not in resumed.stdout
    assert call(*failing, *SETTINGS, "--adapter-file", "b.npz").returncode == 0
    for name in ("a.npz", "a.run/best.npz"):
        assert Path(name).read_bytes() == Path(name.replace("a.", "b.", 1)).read_bytes()


def test_a_failed_device_and_a_save_that_fails_too_are_both_reported(
    call: Run, failing: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tiny.write_jsonl(tmp_path / "data", "train", [*make_texts(29, 0), "Z"])
    monkeypatch.setattr(os, "fsync", full)
    why = "could not be saved: a.run/state.npz cannot be written: No space left on device"
    one_error(call(*failing, *SETTINGS), REASON, why)


def test_a_device_that_fails_within_a_validation_leaves_the_iteration_saved(
    call: Run, failing: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_jsonl(tmp_path / "data", "valid", ["Z"])
    error = one_error(call(*failing, *SETTINGS), REASON)
    assert error.endswith("; nothing new was saved")
    assert not list(tmp_path.glob("*.npz"))
    monkeypatch.setattr(Failing, "fails", False)
    assert call(*failing, *SETTINGS, "--iters", 2).returncode == 0
    monkeypatch.setattr(Failing, "fails", True)
    more = ["--iters", 9, "--resume-adapter-file", "a.npz"]
    error = one_error(call(*failing, *SETTINGS, *more), REASON)
    assert "; iteration 4 is saved; " in error


def test_a_device_that_fails_within_a_test_or_a_generation_is_reported(
    call: Run, failing: list[object], tmp_path: Path
) -> None:
    tiny.write_jsonl(tmp_path / "data", "test", ["Z"])
    tiny.make_adapter(tmp_path / "a.npz")
    one_error(call(*failing, "--test"), REASON, "lower --batch-size or --max-seq-length")
    one_error(call(*failing, "--prompt", "Z"), REASON, "shorten the prompt or lower --max-tokens")
