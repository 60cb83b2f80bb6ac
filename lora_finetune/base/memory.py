"""How much memory a run may take, and how errors of the device are reported."""

from __future__ import annotations

import errno
import math
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_finetune.base.errors import UserError, first_line

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit

# --- How much there is --------------------------------------------------------------------------


# How many processes of this run share the memory of this machine.
processes_here = 1


def available() -> int:
    """Bytes that a run may take on MLX's default device, what it holds already included."""
    in_use = mx.get_active_memory() + mx.get_cache_memory()
    return device_limit(mx.device_info(), machine_memory(), in_use, processes_here)


def device_limit(
    device: Mapping[str, str | int], machine: int, in_use: int, processes: int = 1
) -> int:
    """Bytes that a run may take on a device.

    With Metal that is the recommended working set: beyond it a Mac swaps, and dies instead of
    raising an error. With CUDA it is what is free, not what is installed.

    Args:
        device: what `mx.device_info` says of it.
        machine: bytes that the process may take of the machine's memory, which a CPU shares.
        in_use: bytes that MLX holds already; CUDA does not count them as free.
        processes: how many share a memory that is the machine's; each has a GPU with CUDA.
    """
    recommended = device.get("max_recommended_working_set_size")
    if not recommended and "free_memory" in device:
        return device["free_memory"] + in_use
    return (recommended or machine) // processes


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may take of the machine's memory: all, or what its container may."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *cgroup_limits(root)])


def cgroup_limits(root: Path) -> Iterator[int]:
    """The memory limits, in bytes, of this process's cgroups (v1 and v2) and their ancestors.

    In a container, what is mounted may begin at its own group,
    so that the path in /proc/self/cgroup leads nowhere, and the limit is at the top.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "", "/")
        if not controllers:  # version 2
            folder, names = root / "sys/fs/cgroup", ("memory.max", "memory.high")
        elif "memory" in controllers.split(","):  # version 1
            folder, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes",)
        else:
            continue
        group = Path(path.lstrip("/"))
        for file in (folder / g / name for g in (group, *group.parents) for name in names):
            try:
                yield int(file.read_text())
            except (OSError, ValueError):  # no such group here, or no limit: "max"
                continue


SMALL_CACHE = 32 * 2**20  # bytes, MLX's own default on a CPU


def set_limits(limit: int) -> None:
    """Set MLX's memory, cache and (Metal) wired limits, in bytes."""
    mx.set_memory_limit(min(limit, mx.get_memory_limit()))
    # MLX keeps freed buffers to use again; over batches of many shapes they would fill the memory.
    # On a CPU the C library does that, of any size, and better.
    on_cpu = mx.default_device() == mx.cpu
    mx.set_cache_limit(min(limit // 8, SMALL_CACHE) if on_cpu else limit // 8)
    maybe_set_recommended_wired_limit()  # where there is Metal, weights then stay in memory


def number_that_fits(step: Callable[[int], None], most: int, limit: int) -> int:
    """How many texts a step can take at once in `limit` bytes, up to `most`; 0 if not even one.

    Some systems kill a process that runs out of memory. So before several texts are tried, their
    memory is extrapolated from one, and where that might be too much from one and two.

    Args:
        step: does a step on so many of the longest texts.
    """
    base = mx.get_active_memory()

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
        return mx.get_peak_memory()

    if (one := peak(1)) > limit:
        return 0
    if base + (one - base) * most <= limit / 2:  # far from the limit, the time is saved
        return most
    number = most
    if most > 1 and base + (one - base) * most > limit:
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
    r"insufficient memory|out ?of ?memory|(unable|attempting) to allocate|resource limit", re.I
)
# macOS ends a computation that keeps the display waiting; so does the driver of NVIDIA's.
TOO_LONG = re.compile(r"impacting ?interactivity|time(d )?out|gpu hang", re.I)


def is_lacking(error: BaseException) -> bool:
    """Whether an error tells that memory could not be had."""
    errnos = (errno.ENOMEM, errno.EAGAIN)
    is_errno = isinstance(error, OSError) and error.errno in errnos
    is_said = NO_MEMORY.search(str(error)) or any(os.strerror(n) in str(error) for n in errnos)
    return isinstance(error, MemoryError) or is_errno or bool(is_said)


@contextmanager
def device_errors(advice: str) -> Iterator[None]:
    """Turn an error of MLX or its device in the middle of a computation into a DeviceError.

    Args:
        advice: what the user can do for a smaller computation.
    """
    try:
        yield
    except FAILURES as error:
        release(error)
        raise DeviceError(explain(error, advice)) from error


def release(error: Exception) -> None:
    """Give back the memory that a failed computation has taken, which its frames hold."""
    traceback.clear_frames(error.__traceback__)
    with suppress(*FAILURES):
        mx.clear_cache()


def explain(error: Exception, advice: str) -> str:
    """Why a computation failed, and the ways out."""
    why = f"({first_line(error):.200})"
    if is_lacking(error):
        return f"out of memory {why}; {advice}, or close other programs"
    if TOO_LONG.search(str(error)):
        return (
            f"the system stopped a computation that kept the display waiting {why}; {advice}, or "
            "leave the display off meanwhile (on a Mac, under caffeinate -s)"
        )
    return f"the computation failed {why}; try again, and if it fails again, {advice}"
