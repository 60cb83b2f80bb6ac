"""The program in a process that a test can send signals to, and that starts without delay."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from types import CodeType

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
    killed_at: int | None = None,
    largest_file: int | None = None,
    env: dict[str, str] | None = None,
    suffix: str = "",
    device_memory: int | None = None,
    wait_at_end: float | None = None,
) -> None:
    """Be the command line in a folder; `out` and `err` in it take what it prints.

    Args:
        slow: seconds that each step of a save takes longer.
        killed_at: the step of its saves at which it is killed.
        largest_file: bytes beyond which no file may grow.
        env: is added to the environment.
        suffix: of the names `out` and `err`.
        device_memory: bytes, for the GPU that this is then taken to be.
        wait_at_end: seconds to wait for the other processes of a run that is to end.
    """
    gc.freeze()  # no search for garbage goes through, and copies, what was imported before the fork
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
        at_each_step_of_a_save(lambda: time.sleep(slow))
    if killed_at:
        kill_at(killed_at)
    if wait_at_end:
        distributed.WAIT_AT_END = wait_at_end
    sys.argv = [str(ROOT / "train_lora.py"), *args]
    sys.exit(run_script(sys.argv[0]))


def run_script(file: str) -> int:
    """Run a script as Python does, which gives to `sys.excepthook` what ends it."""
    try:
        exec(compiled(file), {"__name__": "__main__", "__file__": file})
    except SystemExit as ended:
        return ended.code or 0
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as ended:
            return ended.code
        return 1
    return 0


@cache
def compiled(file: str) -> CodeType:
    return compile(Path(file).read_bytes(), file, "exec")


def at_each_step_of_a_save(act: Callable[[], object]) -> None:
    """Call something with each file half-written, whole but not in its place, and in its place."""
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        act()
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        act()
        replaced = replace(self, target)
        act()
        return replaced

    os.fsync, Path.replace = watched_fsync, watched_replace


def kill_at(step: int) -> None:
    """Kill this process at one of the steps of its saves, counted from 1."""
    steps = count(1)
    at_each_step_of_a_save(lambda: next(steps) == step and os.kill(os.getpid(), signal.SIGKILL))
