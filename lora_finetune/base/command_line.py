"""What the command lines of train_lora.py and prepare_lora_data.py share: errors in one line.

Nothing here takes long to import, so that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import io
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

ROOT = Path(__file__).resolve().parents[2]


class UserError(Exception):
    """Something the user can put right; the program prints it as one `error:` line."""

    def __str__(self) -> str:
        """In one line, whatever names of files, arrays and settings it mentions."""
        return one_line(super().__str__())


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, with this outcome."""

    def __init__(self, signal: int, outcome: str):
        super().__init__(signal, outcome)
        self.signal, self.outcome = signal, outcome


def one_line(text: str) -> str:
    """A text in one line, control characters and the like written as in Python: \\n.

    What is too long, a path or a name in it or all of it, is without its middle: a path ends in the
    file's name, and a message in the way out.
    """
    text = re.sub(r"\S{251,}", lambda word: without_middle(word[0], 250), text)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in without_middle(text, 600))
    return without_middle(text, 600)


def without_middle(text: str, most: int) -> str:
    """A text of at most so many characters and a few."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def abbreviated(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = [f"{name[:40]}…" if len(name) > 41 else name for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8: an unpaired surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def warn(message: str) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)


def hint(message: str) -> None:
    """Tell, beside the output, what goes on, or what may have been meant."""
    print(f"hint: {one_line(message)}", file=sys.stderr, flush=True)


SLOW = 10.0  # seconds


@contextmanager
def hint_if_slow(message: str) -> Iterator[None]:
    """Tell what the wait is where what is done meanwhile is slow."""
    timer = threading.Timer(SLOW, hint, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all errors of these programs.

    The set `typed` among the arguments names those with a value that were typed, not defaults.
    On Windows there is only the error that says so.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=one_line_each, **options)
        if sys.platform == "win32":
            self.error("this does not run on Windows; run it in WSL2, its Linux (`wsl --install`)")
        self.register("action", None, StoreTyped)
        self.set_defaults(typed=frozenset())
        self.group = self

    def section(self, title: str) -> None:
        """Begin a section of flags, to which those that are added belong from now on."""
        self.group = self.add_argument_group(title)

    def add(self, names: str, type: Callable, default: object, help: str, **options) -> None:
        """Add a flag with a value; its help tells the default, if it has one."""
        help += "" if default is None else " (default: %(default)s)"
        if "choices" not in options:
            options.setdefault("metavar", "TEXT" if type is nonempty else "N")
        self.group.add_argument(*names.split(), type=type, default=default, help=help, **options)

    def switch(self, name: str, help: str) -> None:
        self.group.add_argument(name, action="store_true", help=help)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}\n")


def one_line_each(prog: str) -> argparse.HelpFormatter:
    """Help that has a line for each flag, where its text is short enough for one of 100 letters."""
    return argparse.HelpFormatter(prog, max_help_position=30, width=100)


class StoreTyped(argparse.Action):
    def __call__(self, parser, namespace, value, option_string=None) -> None:
        setattr(namespace, self.dest, value)
        namespace.typed |= {self.dest}


def nonempty(text: str) -> str:
    """An argparse type: any text but an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def nonnegative_number(text: str) -> float:
    """An argparse type: a finite real number that is not negative."""
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or more, not {text}")
    return number


def scale_number(text: str) -> float:
    """An argparse type: a real number within what float32 can be scaled by."""
    number = float(text)
    if not 1e-4 <= number <= 1e4:
        raise argparse.ArgumentTypeError(f"must be from 0.0001 to 10000, not {text}")
    return number


for number_type in (nonnegative_number, scale_number):
    number_type.__name__ = "number"  # for argparse's "invalid … value"


def whole_number(least: int, also: int | None = None, below: float = 2**31) -> Callable[[str], int]:
    """An argparse type: an integer from `least` on and less than `below`, or `also`."""

    def parse(text: str) -> int:
        number = int(text)
        if not least <= number < below and number != also:
            other = "" if also is None else f" or {also}"
            most = f" and below {below}" if number >= below else ""
            raise argparse.ArgumentTypeError(f"must be at least {least}{most}{other}, not {text}")
        return number

    parse.__name__ = "whole number"  # for argparse's "invalid … value"
    return parse


def in_project(path: str) -> str:
    """A default path: one in this project, wherever the program is called from."""
    try:
        return os.path.relpath(ROOT / path)
    except FileNotFoundError:  # the working folder was deleted
        return str(ROOT / path)


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


def import_or_exit(module: str, *packages: str) -> None:
    """Import a module, and look for packages; what is not there or does not load is one line."""
    try:
        importlib.import_module(module)
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
        return
    except ModuleNotFoundError as error:
        reason = (
            f"{error.name} is not installed for {sys.executable}; `make demo` installs all that is "
            "needed into .venv, and `source .venv/bin/activate` turns to that"
        )
    except ImportError as error:  # such as that of MLX for CUDA where there is no GPU
        reason = (
            f"{module} cannot be loaded ({first_line(error)}); see README.md for what to install "
            "on which machine"
        )
    print(f"error: {one_line(reason)}", file=sys.__stderr__)
    sys.exit(2)


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


def run_and_report_errors(run: Callable[[], None], subject: str) -> int:
    """Run, and turn what the user can put right into one line and exit status 2.

    Args:
        run: may raise UserError, OSError, KeyboardInterrupt.
        subject: what an OSError that names no file is about.

    Returns:
        The exit status.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except (UserError, OSError, KeyboardInterrupt) as error:
        print(describe(error, subject), file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 128 + getattr(error, "signal", signal.SIGINT)
        return 2
    sys.stdout.flush()
    lost = getattr(sys.stdout.buffer.raw, "error", None)
    if lost and lost.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        print(f"error: standard output could not be written: {lost.strerror}", file=sys.stderr)
        return 2
    return 0


def describe(error: BaseException, subject: str) -> str:
    """The one line that tells what ended a run; `subject` as in `run_and_report_errors`."""
    if isinstance(error, Interrupted):
        return f"interrupted: {one_line(error.outcome)}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError):
        return f"error: {one_line(str(error.filename or subject))}: {error.strerror or error}"
    return f"error: {error if isinstance(error, UserError) else one_line(repr(error))}"


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
