"""Where a path leads, and atomic writing: to a temporary file that is renamed when it is whole."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from lora_finetune.base.errors import UserError


def real_file(file: Path) -> Path:
    """The file that a path means: behind links, and spelled as its folder spells it.

    A Mac's file system takes either letter case and either Unicode form of a name for the same.
    """
    if file.is_symlink():
        try:
            resolved = file.resolve()
            # The hub's cache links to files without an ending, which tells what they are.
            file = resolved if resolved.suffix or file.suffix == ".npz" else file
        except (RuntimeError, OSError):
            raise UserError(f"{file} is a loop of links") from None
    file = file if file.name else file.absolute()
    others = list(file.parent.iterdir()) if file.parent.is_dir() else []
    if file not in others:
        for other in others:
            if nfc(other.name) == nfc(file.name) or same_file(other, file):
                return other
    return file


def nfc(text: str) -> str:
    """A text in Unicode's composed form (NFC); a Mac decomposes Hangul in some places."""
    return unicodedata.normalize("NFC", text)


def same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def file_checksum(file: Path) -> str | None:
    """The SHA-256 of a file, None where there is none."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_size(file: Path) -> int:
    """The size of a file, 0 where there is none."""
    return file.stat().st_size if file.is_file() else 0


@contextmanager
def atomic_write(*files: Path) -> Iterator[list[BinaryIO]]:
    """A stream for each file; together they take the files' places when all is written, or vanish.

    Where a file is a link, what it leads to is replaced.

    Raises:
        UserError: they cannot be written: a full disk, a folder that has gone.
    """
    files = tuple(file.resolve() if file.is_symlink() else file for file in files)
    parts = [file.with_name(file.name + ".part") for file in files]
    try:
        with ExitStack() as stack:
            streams = [stack.enter_context(part.open("wb")) for part in parts]
            yield streams
            for stream in streams:
                flush_to_disk(stream)
        for part, file in zip(parts, files, strict=True):
            part.replace(file)
    except OSError as error:
        what = files[0] if len(files) == 1 else files[0].parent
        raise UserError(f"{what} cannot be written: {error.strerror}") from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def flush_to_disk(stream: BinaryIO) -> None:
    """Have what was written on the disk itself; on a Mac, fsync leaves it in the disk's cache."""
    import fcntl  # not above, since Windows has none

    stream.flush()
    try:
        fcntl.fcntl(stream.fileno(), fcntl.F_FULLFSYNC)
    except (AttributeError, OSError):  # not a Mac, or a file system without it
        os.fsync(stream.fileno())
