"""The format of a data file, whatever its name says, and JSON Lines."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_finetune.base.errors import UserError

# How files of other formats begin, and what to do with them.
FORMATS = {
    b"PAR1": "Parquet: name it .parquet for prepare_lora_data.py",
    b"ARROW1": "Arrow: name it .arrow for prepare_lora_data.py",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive: unpack it",
    b"PK\x03\x04": "a zip archive or an Excel file: unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel file: save it as CSV",
    b"version https://git-lfs": "a Git LFS pointer to the file: `git lfs pull` fetches it",
    b"<!": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
}


def check_format(path: Path) -> None:
    """Raise UserError where a file begins as one of another format than its name says."""
    with path.open("rb") as stream:
        start = stream.read(100)
    for begin, what in FORMATS.items():
        if start.startswith(begin) and path.suffix.lower() not in what:
            raise UserError(f"{path} looks like {what}")


def read_json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not blank; a byte-order mark is ignored.

    Raises:
        UserError: a line is not JSON; names it.
    """
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(codecs.BOM_UTF8)
        try:
            if line.strip():
                yield number, parse_json(line)
        except ValueError as error:
            looks = looks_like(path) if number == 1 else ""
            raise UserError(f"{path}, line {number}: {error}{looks}") from None


def parse_json(line: bytes) -> Any:
    """The value of a line of JSON; raises ValueError that says what is wrong."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(why_not_json(error)) from None


def why_not_json(error: Exception) -> str:
    """The reason why a text is not JSON, from the error of json.loads."""
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8; save the file as UTF-8"
    if not isinstance(error, json.JSONDecodeError):
        return "is not JSON that can be read: too deep, or too long a number"
    if "\0" in error.doc:
        return "is not text in UTF-8; save the file as UTF-8"
    return f"is not JSON: {error.msg.removesuffix(' at')} at character {error.colno}"


def looks_like(path: Path) -> str:
    """A guess at the format of a file that is not JSON Lines, to end an error with; or ""."""
    with path.open("rb") as stream:
        text = stream.read(2**16).decode(errors="replace").removeprefix("\ufeff").lstrip()
    first, _, more = text.partition("\n")
    mark = find_separator(first)
    if text.startswith("["):
        what = "one JSON list: write each of its objects in a line of its own (jq -c '.[]' does)"
    elif more and breaks_off(first):
        what = "one JSON object over several lines: write each object in one line (jq -c . does)"
    elif not text.startswith("{") and mark and mark in more.partition("\n")[0]:
        what = f"CSV with {SEPARATORS[mark]}: name it .csv for prepare_lora_data.py"
    else:
        return ""
    return f"; the file looks like {what}"


def breaks_off(line: str) -> bool:
    """Whether a line is the beginning of a JSON object."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(line.rstrip()) or error.msg.startswith("Unterminated")
        return at_end and line.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False
    return False


SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def find_separator(names: str) -> str | None:
    """The separator in a CSV file's line of names, the most frequent one; None without any."""
    mark = max(SEPARATORS, key=names.count)
    return mark if mark in names else None
