"""The process: its standard streams, its rank among others, and the signals that stop it."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from lora_finetune.base.errors import Interrupted


class StandardStream(io.FileIO):
    """Standard output or error; what nobody reads any more is dropped, and the program goes on."""

    error: OSError | None = None  # the first that was met

    def write(self, data: bytes) -> int:
        try:
            return super().write(data) or len(data)  # None: a pipe that is full and does not wait
        except OSError as error:  # a pipe that was closed, a terminal that has gone, a full disk
            self.error = self.error or error
            return len(data)


def tolerant_stream(stream: TextIO | None, number: int) -> TextIO:
    """A standard stream like the given one, in which no writing fails."""
    raw = StandardStream(stream.fileno() if stream else number, "w", closefd=False)
    encoding = stream.encoding if stream else "utf-8"  # which some text may not fit
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding, errors="replace", line_buffering=True)


def begin_process() -> None:
    """Make the standard streams last, and let Ctrl-C end the imports without a traceback."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:  # streams that were closed lead nowhere
        pass
    os.close(opened)
    sys.stdout, sys.stderr = tolerant_stream(sys.stdout, 1), tolerant_stream(sys.stderr, 2)
    sys.__stderr__ = sys.stderr
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if process_rank() > 0:
        be_silent()


# How a process is told its number, and how many there are, by mlx.launch and by the kinds of MPI.
LAUNCHERS = (
    ("MLX_RANK", "MLX_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


def process_rank() -> int:
    """The rank of this process among those of a launcher; 0 without one."""
    numbers = (os.environ.get(rank, "") for rank, _ in LAUNCHERS)
    return next((int(number) for number in numbers if number.isdecimal()), 0)


def be_silent() -> None:
    """Print nothing from now on, since another process prints for all, but for what ends this one.

    What is to be seen all the same goes to `sys.__stderr__`.
    """
    sys.stdout = sys.stderr = tolerant_stream(Path(os.devnull).open("w"), 1)  # noqa: SIM115
    sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


@contextmanager
def raising_signals(outcome: str) -> Iterator[None]:
    """While it lasts, SIGTERM and SIGHUP raise Interrupted, so that what is half done is undone."""

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

    def __init__(self) -> None:
        self.signal: int | None = None

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
        from tqdm import tqdm  # not above, where it would slow down --help

        while received := os.read(self.reader, 1):
            if received[0] not in self.handlers:
                continue
            if self.signal and received[0] == signal.SIGINT:
                print("\ninterrupted", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGINT)
            if not self.signal:
                self.signal = received[0]
                tqdm.write(
                    "stopping after this iteration; Ctrl-C again stops at once", file=sys.stderr
                )
        os.close(self.reader)
