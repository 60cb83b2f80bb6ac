"""What a data file is, whatever its name says, and what a line of JSON Lines holds."""

from __future__ import annotations

import csv
import io
import json
from itertools import islice
from pathlib import Path

from lora_finetune.base.errors import UserError

# How files of other formats begin, and what to do with them.
FORMATS = {
    b"PAR1": "Parquet: name it .parquet for prepare_lora_data.py",
    b"ARROW1": "Arrow: name it .arrow for prepare_lora_data.py",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive: unpack it",
    b"PK\x03\x04": "a zip archive or an Excel file: unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel file: save it as CSV",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer to the file: `git lfs pull` fetches it",
    b"<!": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
}


def check_format(path: Path, start: bytes) -> None:
    """Raise UserError where a file begins as one of another format than its name says."""
    for begin, what in FORMATS.items():
        if start.startswith(begin) and path.suffix.lower() not in what:
            raise UserError(f"{path} looks like {what}")


# What stands between the values of a CSV file; where two would do, the first.
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def find_separator(text: str, least: int = 1) -> str | None:
    """What separates the values in the first lines of a CSV file: the key in SEPARATORS, or None.

    Args:
        text: the beginning of the file.
        least: in how many rows there have to be several values, the same number as in the first.
    """
    rows = {mark: count_like_first(text, mark) for mark in SEPARATORS}
    best = max(rows, key=rows.get)
    return best if rows[best] >= least else None


def count_like_first(text: str, mark: str) -> int:
    """How many of the first rows have as many values as the first, if this is more than one."""
    rows = list(islice(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=mark)), 20))
    return sum(len(row) == len(rows[0]) > 1 for row in rows)


def looks_like(path: Path) -> str:
    """A guess at the layout of a file that is not JSON Lines, to end an error with; or ""."""
    with path.open("rb") as stream:
        text = stream.read(2**16).decode(errors="replace").removeprefix("\ufeff").lstrip()
    if text.startswith("["):
        what = "one JSON list: write each of its objects in a line of its own (jq -c '.[]' does)"
    elif text.startswith("{"):
        if not breaks_off(text):
            return ""
        what = "one JSON object over several lines: write each object in one line (jq -c . does)"
    elif mark := find_separator(text, least=2):
        what = f"CSV with {SEPARATORS[mark]}: name it .csv for prepare_lora_data.py"
    else:
        return ""
    return f"; the file looks like {what}"


def breaks_off(text: str) -> bool:
    """Whether the first line of a text is the start of JSON that goes on in the next."""
    line, newline, _ = text.partition("\n")
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return bool(newline) and cut_short(error)
    except (ValueError, RecursionError):
        pass
    return False


def cut_short(error: json.JSONDecodeError) -> bool:
    """Whether what is wrong with JSON is that it ends too early."""
    return error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")


TOO_MUCH = "is not JSON that can be read: too deep, or too long a number"


def parse_json(line: bytes) -> object:
    """What a line of a JSON Lines file holds; raises ValueError that says what is wrong."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(why_not_json(error, error.pos)) from None
    except (ValueError, RecursionError):
        raise ValueError(TOO_MUCH) from None


def why_not_json(error: json.JSONDecodeError, column: int) -> str:
    """What is wrong with a line, at a column counted from 0."""
    if "\0" in error.doc:
        return "is not text in UTF-8; save the file as UTF-8"
    return f"is not JSON: {error.msg.removesuffix(' at')} at character {column + 1}"


def holds_rows(entry: dict) -> bool:
    """Whether an object holds lists and objects alone, as a whole data set in one object does."""
    return bool(entry) and all(isinstance(value, dict | list) for value in entry.values())
