"""The process: its standard streams, its rank among others, and the signals that stop it."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lora_finetune.base.errors import Interrupted, print_line


class LastingStream(io.FileIO):
    """Standard output or error that may lose its reader: `| head`, a terminal that goes away."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data) or len(data)  # None: a pipe that is full and does not wait
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise OSError(error.errno, error.strerror, "standard output") from None
            return len(data)


def begin_process() -> None:
    """Make the standard streams last, and print nothing where another process prints for all.

    What is to be seen all the same goes to `sys.__stderr__`.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        raw = io.BufferedWriter(LastingStream(stream.fileno(), "w", closefd=False))
        lasting = io.TextIOWrapper(raw, stream.encoding, errors="replace", line_buffering=True)
        setattr(sys, name, lasting)
    sys.__stderr__ = sys.stderr
    if process_rank() > 0:
        sys.stdout = sys.stderr = Path(os.devnull).open("w", errors="replace")  # noqa: SIM115


# How a process is told its rank by mlx.launch and by the kinds of MPI.
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def process_rank() -> int:
    """The rank of this process among those of a launcher; 0 without one."""
    numbers = (os.environ.get(rank, "") for rank in RANKS)
    return next((int(number) for number in numbers if number.isdecimal()), 0)


STOPS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handled(numbers: tuple[int, ...], handler: Callable) -> Iterator[None]:
    """Handle those signals that are not ignored, as under nohup."""
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    earlier = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


@contextmanager
def raising_signals(outcome: str) -> Iterator[None]:
    """Raise Interrupted at SIGTERM and SIGHUP, so that what is half done is undone."""

    def interrupt(number: int, _: object) -> NoReturn:
        raise Interrupted(number, outcome)

    with handled(STOPS, interrupt):
        yield


class Stop:
    """Whether a signal has asked for a stop, and which."""

    signal: int | None = None


@contextmanager
def hearing_stops() -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGHUP ask for a stop; a second SIGINT exits at once.

    A thread waits for them, since MLX keeps the main one busy for as long as a step takes.
    """
    stop, numbers, (reader, writer) = Stop(), (signal.SIGINT, *STOPS), os.pipe()

    def watch() -> None:
        while received := os.read(reader, 1):
            if stop.signal and received[0] == signal.SIGINT:
                print("\ninterrupted", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGINT)
            if not stop.signal and received[0] in numbers:
                stop.signal = received[0]
                print_line("stopping after this iteration; Ctrl-C again stops at once", sys.stderr)
        os.close(reader)

    os.set_blocking(writer, False)  # as set_wakeup_fd wants it
    threading.Thread(target=watch, daemon=True).start()
    with handled(numbers, lambda *_: None):
        signal.set_wakeup_fd(writer)
        try:
            yield stop
        finally:
            signal.set_wakeup_fd(-1)
            os.close(writer)
