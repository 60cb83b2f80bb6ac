"""What a user can put right, in one line on stderr; warnings and hints likewise."""

from __future__ import annotations

import errno
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


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
