"""How much memory a run may take, and how errors of the device are reported."""

from __future__ import annotations

import math
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_finetune.base.errors import UserError, first_line

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit

processes, processes_here = 1, 1  # of this run, and those that share this machine's memory
num_parts = 1  # of the weights, of which a process holds one


def available() -> int:
    """Bytes that a run may take on MLX's default device, what it holds already included.

    With Metal that is the recommended working set: beyond it a Mac swaps, and dies instead of
    raising an error. With CUDA each process has a GPU of its own.
    """
    device = mx.device_info()
    recommended = device.get("max_recommended_working_set_size")
    if not recommended and "free_memory" in device:
        return device["free_memory"] + mx.get_active_memory() + mx.get_cache_memory()
    return (recommended or machine_memory()) // processes_here


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory, or what a container (cgroups v1 and v2) may take of it.

    In a container, what is mounted may begin at its own group, so that the limit is at the top.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    own, mounted = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    for line in own.read_text(errors="replace").splitlines() if own.exists() else []:
        group = Path(line.rpartition(":")[2].lstrip("/"))
        for folder in (group, *group.parents):
            v1 = mounted / "memory" / folder / "memory.limit_in_bytes"
            for file in (v1, mounted / folder / "memory.max", mounted / folder / "memory.high"):
                with suppress(OSError, ValueError):  # no such group here, or no limit: "max"
                    limits.append(int(file.read_text()))
    return min(limits)


def set_limits(limit: int) -> None:
    """Set MLX's memory, cache and (Metal) wired limits, in bytes."""
    mx.set_memory_limit(min(limit, mx.get_memory_limit()))
    # A GPU's freed buffers are kept to use again; over batches of many shapes they would fill the
    # memory. On a CPU MLX keeps 32 MB, and the C library more, of any size.
    if mx.default_device() == mx.gpu:
        mx.set_cache_limit(limit // 8)
    maybe_set_recommended_wired_limit()  # where there is Metal, weights then stay in memory


def number_that_fits(
    step: Callable[[int], None], most: int, limit: int,
    agreed: Callable[[float], float] = lambda peak: peak,
) -> int:  # fmt: skip
    """How many texts a step can take at once in `limit` bytes, up to `most`; 0 if not even one.

    Some systems kill a process that runs out of memory. So before many texts are tried, their
    memory is extrapolated from one and two. `step` does a step on so many of the longest texts.
    `agreed` gives the same number of bytes to all processes that do these steps together.
    """
    base = agreed(mx.get_active_memory())

    def peak(number: int) -> float:
        """Bytes that a step takes, infinite where it cannot get them."""
        mx.reset_peak_memory()
        try:
            step(number)
        except FAILURES as error:
            if not is_lacking(error):
                raise
            release(error)
            return math.inf
        return agreed(mx.get_peak_memory())

    if (one := peak(1)) > limit:
        return 0
    if most == 1 or base + (one - base) * most <= limit / 2:  # far from the limit, time is saved
        return most
    if (two := peak(2)) > limit:
        return 1
    number = min(most, 2 + int((limit - two) // max(1, two - one)))
    while number > 2 and peak(number) > limit:
        number -= -(-number // 8)
    return number


# --- Where the device fails ---------------------------------------------------------------------


class DeviceError(UserError):
    """MLX or its device failed in the middle of a computation; the message says why."""


FAILURES = (RuntimeError, MemoryError)  # what MLX raises then, with the words of Metal or CUDA

NO_MEMORY = re.compile(
    r"insufficient memory|out ?of ?memory|(unable|attempting) to allocate|cannot allocate memory|"
    "resource limit|resource temporarily unavailable",
    re.I,
)
# macOS ends a computation that keeps the display waiting; so does the driver of NVIDIA's.
TOO_LONG = re.compile(r"impacting ?interactivity|time(d )?out|gpu hang", re.I)


def is_lacking(error: BaseException) -> bool:
    """Whether an error of MLX, Python or the system says that there is not enough memory."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


@contextmanager
def device_errors(advice: str) -> Iterator[None]:
    """Turn an error of MLX or its device into a DeviceError, with advice for less computation."""
    try:
        yield
    except FAILURES as error:
        release(error)
        why = f"({first_line(error):.200})"
        if is_lacking(error):
            message = f"out of memory {why}; {advice}, or close other programs"
        elif TOO_LONG.search(str(error)):
            message = (
                f"the system stopped a computation that kept the display waiting {why}; {advice}, "
                "or leave the display off meanwhile (on a Mac, under caffeinate -s)"
            )
        else:
            message = f"the computation failed {why}; try again, and if it fails again, {advice}"
        raise DeviceError(message) from error


def release(error: Exception) -> None:
    """Give back the memory that a failed computation has taken, which its frames hold."""
    traceback.clear_frames(error.__traceback__)
    with suppress(*FAILURES):
        mx.clear_cache()
