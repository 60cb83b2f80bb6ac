"""The file that a path means, and writing that leaves a whole file or folder, or none."""

from __future__ import annotations

import fcntl
import filecmp
import hashlib
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from lora_finetune.base.errors import UserError, print_line


def real_file(file: Path) -> Path:
    """The file that a path means: behind links, and in either Unicode form of its name."""
    if file.suffix == ".npz":  # the hub's cache links .safetensors to files without the ending
        file = Path(os.path.realpath(file)) if file.is_symlink() else file
    if file.exists():
        return file
    return next((f for f in file.parent.glob("*") if nfc(f.name) == nfc(file.name)), file)


def write_json(file: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def nfc(text: str) -> str:
    """A text in Unicode's composed form (NFC); a Mac decomposes Hangul in some places."""
    return unicodedata.normalize("NFC", text)


def composed(value: object) -> object:
    """A JSON value with all its strings in NFC; its text could not be, for escapes compose too."""
    if isinstance(value, dict):
        return {nfc(key): composed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [composed(one) for one in value]
    return nfc(value) if isinstance(value, str) else value


def check_can_make(path: Path) -> None:
    """Raise OSError where no file can be made at a path, and the folders that it lacks."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    with suppress(FileNotFoundError):
        path.lstat()  # which raises where a name is too long
    with tempfile.TemporaryFile(dir=folder):
        pass


def file_checksum(file: Path) -> str | None:
    """The SHA-256 of a file, None where there is none."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_write(*files: Path) -> Iterator[list[BinaryIO]]:
    """A stream for each file; together they take the files' places when all is written, or vanish.

    Where a file is a link, what it leads to is replaced. Raises UserError where they cannot be
    written: a full disk, a folder that has gone.
    """
    files = tuple(Path(os.path.realpath(file)) if file.is_symlink() else file for file in files)
    temporary = [file.with_name(file.name + ".part") for file in files]
    try:
        with ExitStack() as stack:
            streams = [stack.enter_context(file.open("wb")) for file in temporary]
            yield streams
            for stream in streams:
                flush_to_disk(stream)
        for written, file in zip(temporary, files, strict=True):
            written.replace(file)
    except OSError as error:
        what = files[0] if len(files) == 1 else files[0].parent
        raise UserError(f"{what} cannot be written: {error.strerror}") from None
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def link(file: Path, name: Path) -> None:
    """Give a file a second name; on a file system without such links, a copy has it."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy2(file, name)


@contextmanager
def earlier_kept(folder: Path, files: list[Path]) -> Iterator[None]:
    """Keep what files of a folder hold in FOLDER.previous-1, or a later number, if they change.

    Where nothing can be made beside the folder, as beside one that a container has for data alone,
    that is in the folder, and hidden.
    """
    whole = folder if folder.name.strip(".") else folder.resolve()
    start = f"{whole}" if os.access(whole.parent, os.W_OK) else f"{whole}/"
    names = (Path(f"{start}.previous-{k}") for k in count(1))
    kept = next(name for name in names if not name.exists())
    earlier = [file for file in files if file.exists()]
    if not earlier:
        yield
        return
    kept.mkdir()
    try:
        for file in earlier:
            link(file, kept / file.name)
        yield
    finally:
        if all(f.exists() and filecmp.cmp(kept / f.name, f, shallow=False) for f in earlier):
            shutil.rmtree(kept)
        else:
            print_line(f"What {folder} held before is kept in {kept}.")


def flush_to_disk(stream: BinaryIO) -> None:
    """Have what was written on the disk itself; on a Mac, fsync leaves it in the disk's cache."""
    stream.flush()
    try:
        fcntl.fcntl(stream.fileno(), fcntl.F_FULLFSYNC)
    except (AttributeError, OSError):  # not a Mac, or a file system without it
        os.fsync(stream.fileno())


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder, which gets its name when all is written in it, or vanishes.

    Raises UserError where it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as work:
            made = Path(work, "made")  # unlike `work`, others may read it
            made.mkdir()
            yield made
            made.rename(folder)
    except (OSError, RuntimeError) as error:  # MLX's are RuntimeErrors
        why = getattr(error, "strerror", None) or error
        raise UserError(f"the folder {folder} cannot be written: {why}") from error
