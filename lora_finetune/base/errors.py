"""Lines for people: what a run says, and errors that they can put right, warnings and hints."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO


class UserError(Exception):
    """Something the user can put right; the program prints it as one `error:` line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, with this outcome."""

    def __init__(self, signal: int, outcome: str):
        super().__init__(signal, outcome)
        self.signal, self.outcome = signal, outcome


def one_line(text: str) -> str:
    """A text in one line of at most 600 characters; those that cannot be seen as in Python: \\n."""
    text = re.sub(r"\S{251,}", lambda word: elide(word[0], 250), text)
    return elide("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), 600)


def elide(text: str, length: int) -> str:
    """Leave out the middle of a long text: a path ends in a name, a message in the way out."""
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"


def abbreviated(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = [f"{name[:40]}…" if len(name) > 41 else name for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8: an unpaired surrogate cannot."""
    return text.encode(errors="ignore").decode() == text


def bar_options() -> dict[str, Any]:
    """Options of a progress bar: on a terminal only, and with room behind it for ^C, twice."""
    try:
        return {"ncols": max(os.get_terminal_size(sys.stderr.fileno()).columns - 4, 0)}
    except OSError:
        return {"disable": True}


def print_line(line: str, stream: TextIO | None = None) -> None:
    """Print a line at once, on stdout by default, above the progress bars if there are some."""
    write = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print
    write(line, file=stream or sys.stdout)
    (stream or sys.stdout).flush()


def warn(message: str) -> None:
    print_line(f"warning: {one_line(message)}", sys.stderr)


def hint(message: str) -> None:
    print_line(f"hint: {one_line(message)}", sys.stderr)


SLOW = 10.0  # seconds


@contextmanager
def hint_if_slow(message: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    timer = threading.Timer(SLOW, lambda: unless() or hint(message))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def describe(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        outcome = f": {error.outcome}" if isinstance(error, Interrupted) else ""
        return f"interrupted{one_line(outcome)}"
    if isinstance(error, OSError):
        file = f"{one_line(str(error.filename))}: " if error.filename else ""
        return f"error: {file}{error.strerror or error}"
    return f"error: {error if isinstance(error, UserError) else one_line(repr(error))}"


def report_uncaught(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook`: one line, and status 2, for what the user can put right."""
    if isinstance(error, ModuleNotFoundError):
        error = UserError(
            f"{error.name} is not installed for {sys.executable}; `make demo` installs all that is "
            "needed into .venv, and `source .venv/bin/activate` turns to that"
        )
    elif isinstance(error, ImportError):  # such as that of MLX for CUDA where there is no GPU
        error = UserError(f"{first_line(error)}; see README.md for what to install where")
    for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else []:
        bar.close()
    if not isinstance(error, (UserError, OSError, KeyboardInterrupt)):
        traceback.print_exception(error, file=sys.__stderr__)
        return
    print(describe(error), file=sys.stderr)
    is_interrupt = isinstance(error, KeyboardInterrupt)
    sys.exit(128 + getattr(error, "signal", signal.SIGINT) if is_interrupt else 2)
