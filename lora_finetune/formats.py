"""What a data file is, whatever its name says, and what a line of JSON Lines holds."""

from __future__ import annotations

import json
from pathlib import Path

from lora_finetune.command_line import UserError

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


# What stands between the values of a CSV file, commas or something else.
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}


def separators(text: str) -> str:
    """The name of what separates the values in the first two lines of a CSV file; "" if nothing."""
    head, _, rest = text.partition("\n")
    mark = max(SEPARATORS, key=head.count)
    return SEPARATORS[mark] if mark in head and mark in rest.partition("\n")[0] else ""


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
    elif not (values := separators(text)):
        return ""
    elif values == "commas":
        what = "CSV with commas: name it .csv for prepare_lora_data.py"
    else:
        what = f"CSV with {values}: save it with commas, as ….csv, for prepare_lora_data.py"
    return f"; the file looks like {what}"


def breaks_off(text: str) -> bool:
    """Whether the first line of a text is the start of JSON that goes on in the next."""
    line, newline, _ = text.partition("\n")
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        unfinished = error.pos >= len(line.rstrip()) or error.msg.startswith("Unterminated")
        return bool(newline) and unfinished
    except (ValueError, RecursionError):
        pass
    return False


def parse_json(line: bytes) -> object:
    """What a line of a JSON Lines file holds; raises ValueError that says what is wrong."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if "\0" in error.doc:
            raise ValueError("is not text in UTF-8; save the file as UTF-8") from None
        what = error.msg.removesuffix(" at")
        raise ValueError(f"is not JSON: {what} at character {error.pos + 1}") from None
    except (ValueError, RecursionError):
        raise ValueError("is not JSON that can be read: too deep, or too long a number") from None


def holds_rows(entry: dict) -> bool:
    """Whether an object holds lists and objects alone, as a whole data set in one object does."""
    return bool(entry) and all(isinstance(value, dict | list) for value in entry.values())
