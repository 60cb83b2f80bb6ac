"""The process: its standard streams, its rank among others, and the signals that stop it."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lora_finetune.base.errors import Interrupted

from tqdm import tqdm


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


@contextmanager
def raising_signals(outcome: str) -> Iterator[None]:
    """Raise Interrupted at SIGTERM and SIGHUP, so that what is half done is undone."""

    def interrupt(number: int, _: object) -> NoReturn:
        raise Interrupted(number, outcome)

    handlers = handle([signal.SIGTERM, signal.SIGHUP], interrupt)
    try:
        yield
    finally:
        restore(handlers)


def handle(numbers: Iterable[int], handler: Callable) -> dict[int, Any]:
    """Handle those signals that are not ignored, as under nohup; returns the earlier handlers."""
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


class StopSignals:
    """A context in which SIGINT, SIGTERM and SIGHUP request a stop; a second SIGINT exits at once.

    A thread waits for them, since MLX keeps the main one busy for as long as a step takes.
    """

    signal: int | None = None

    def __enter__(self) -> StopSignals:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        self.handlers = handle(numbers, lambda *_: None)
        signal.set_wakeup_fd(self.writer)
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        restore(self.handlers)
        os.close(self.writer)

    def watch(self) -> None:
        while received := os.read(self.reader, 1):
            if received[0] not in self.handlers:
                continue
            if self.signal and received[0] == signal.SIGINT:
                print("\ninterrupted", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGINT)
            if not self.signal:
                self.signal = received[0]
                words = "stopping after this iteration; Ctrl-C again stops at once"
                tqdm.write(words, file=sys.stderr)
        os.close(self.reader)
