"""The program in a process that a test can send signals to, and that starts without delay."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

import models  # noqa: F401  before mlx, since it loads a fast BLAS
from lora_finetune.training import distributed

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent

# What a run imports where it comes to it, once for all runs here.
LATER = ["matplotlib.figure", "matplotlib.backends.backend_agg", "mlx_lm.models.llama"]
LATER += ["transformers.models.llama.configuration_llama"]

# Processes are forked from one that has imported the program, which takes two seconds, once. Not
# on a GPU, which a process does not share with one that it is forked from.
CONTEXT = multiprocessing.get_context("spawn" if mx.default_device() == mx.gpu else "forkserver")
CONTEXT.set_forkserver_preload(["background", "train_lora", *LATER])


def start(folder: Path, *args: object, **options: object) -> multiprocessing.Process:
    """Start the command line in a folder; `run` has the options."""
    process = CONTEXT.Process(target=run, args=(folder, [*map(str, args)]), kwargs=options)
    process.start()
    return process


def run(
    folder: Path,
    args: list[str],
    slow: float = 0.0,
    largest_file: int | None = None,
    env: dict[str, str] | None = None,
    suffix: str = "",
    device_memory: int | None = None,
    wait_at_end: float | None = None,
) -> None:
    """Be the command line in a folder; `out` and `err` in it take what it prints.

    Args:
        slow: seconds that each step of a save takes longer.
        largest_file: bytes beyond which no file may grow.
        env: is added to the environment.
        suffix: of the names `out` and `err`.
        device_memory: bytes, for the GPU that this is then taken to be.
        wait_at_end: seconds to wait for the other processes of a run that is to end.
    """
    os.chdir(folder)
    os.environ.update(env or {})
    if device_memory:
        mx.device_info = lambda: {"max_recommended_working_set_size": device_memory}
        mx.set_wired_limit = lambda limit: None
        # MLX 0.32.4 itself was seen to wait for ever on a CPU where more is held than its limit.
        mx.set_memory_limit = lambda limit: limit
    for number, name in [(1, "out"), (2, "err")]:
        os.dup2(os.open(name + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    if largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # for an error in its place
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if slow:
        slow_down(slow)
    if wait_at_end:
        distributed.WAIT_AT_END = wait_at_end
    sys.argv = [str(ROOT / "train_lora.py"), *args]
    sys.exit(run_script(sys.argv[0]))


def run_script(file: str) -> int:
    """Run a script as Python does, which gives to `sys.excepthook` what ends it."""
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as ended:
        return ended.code or 0
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as ended:
            return ended.code
        return 1
    return 0


def slow_down(seconds: float) -> None:
    """Make each save linger half-written, and between its two files."""
    fsync, replace = os.fsync, Path.replace

    def slow_fsync(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    def slow_replace(self: Path, target: Path) -> Path:
        time.sleep(seconds)
        replaced = replace(self, target)
        time.sleep(seconds)
        return replaced

    os.fsync, Path.replace = slow_fsync, slow_replace
