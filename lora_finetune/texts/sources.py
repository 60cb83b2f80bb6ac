"""A source of rows: its files, and the rows of a file of any format, up to a thousand at a time."""

from __future__ import annotations

import codecs
import glob
import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_finetune.base.errors import UserError, abbreviated, first_line
from lora_finetune.texts.formats import (
    SEPARATORS,
    TOO_MUCH,
    check_format,
    cut_short,
    find_separator,
    looks_like,
    parse_json,
    why_not_json,
)

import datasets
import pyarrow.parquet as pq

datasets.disable_progress_bars()
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or each file is reported to the hub
datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)  # an error here is one line

BATCH_ROWS = 1000
BATCH_LISTS = 50  # articles and chats, of which each may have a megabyte

# Lies beside the data in many folders and is JSON, but describes it only.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def find_files(source: Path) -> dict[Path, str | None]:
    """The data files of a source in reading order, each with the DatasetDict's split it is in.

    Raises:
        UserError: there is no such source, or no data in it.
    """
    if not source.exists():
        raise UserError(
            f"there is no {source}; name a file or a folder with --source (the real "
            "korean_textbooks_qa has to be downloaded by you, from maywell/korean_textbooks on the "
            "Hugging Face hub)"
        )
    if not source.is_dir():
        return {source: None}
    if (source / "dataset_dict.json").is_file():
        splits = read_names(source / "dataset_dict.json", lambda saved: saved["splits"])
        return {file: split for split in splits for file in find_files(source / split)}
    if (source / "state.json").is_file():
        names = read_names(
            source / "state.json", lambda saved: [file["filename"] for file in saved["_data_files"]]
        )
        return dict.fromkeys(source / name for name in names)
    files = sorted(
        file
        for file in source.rglob("*")
        if file.suffix.lower() in READERS
        and file.name not in NOT_DATA
        and not any(part.startswith(".") for part in file.relative_to(source).parts)
        and file.is_file()
    )
    if not files:
        raise UserError(f"{source} holds no {', '.join(READERS)} file")
    return dict.fromkeys(files)


def read_names(file: Path, pick: Callable[[dict], list[str]]) -> list[str]:
    """Names of files or folders beside a JSON file that datasets' save_to_disk wrote."""
    try:
        check_format(file, file.read_bytes())
        names = pick(json.loads(file.read_text(encoding="utf-8")))
        if not isinstance(names, list) or not all(
            Path(name).name == name != ".." and (file.parent / name).exists() for name in names
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file} is not what datasets' save_to_disk writes") from None
    return names


Batch = dict[str, list]  # columns by their names; those that are not wanted are empty


class Wanted(NamedTuple):
    """What to read.

    Attributes:
        sets: names of columns; an object that has all of a set is a row.
        columns: the names of all columns that are to be read.
    """

    sets: tuple[tuple[str, ...], ...]
    columns: frozenset[str]


Remark = Callable[[str], None]  # takes what the user should know of how a file is read


def read_batches(file: Path, wanted: Wanted, remark: Remark) -> Iterator[Batch]:
    """The rows of a file, up to a thousand at a time; what is not needed any more is not kept.

    Raises:
        UserError: the file cannot be read; says why.
    """
    read = READERS.get(file.suffix.lower())
    if not read:
        raise UserError(f"{file} cannot be read: its name ends in none of {', '.join(READERS)}")
    try:
        with file.open("rb") as stream:
            start = stream.read(100)
        if read in BINARY or not mark_of(start):
            check_format(file, start)
        yield from read(file, wanted, remark)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise UserError(f"{file} cannot be read: it is not {encoding}; save it as UTF-8") from None
    except Exception as error:  # the readers raise of every kind
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def read_parquet(file: Path, wanted: Wanted, remark: Remark) -> Iterator[Batch]:
    """Not by `datasets`, which takes a whole row group at a time: often all of the file."""
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**16)
    names = parquet.schema_arrow.names
    columns = [name for name in names if name in wanted.columns]
    for batch in parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
        values = {name: batch.column(name).to_pylist() for name in columns}
        yield dict.fromkeys(names, []) | values


def read_arrow(file: Path, wanted: Wanted, remark: Remark) -> Iterator[Batch]:
    yield from read_dataset("arrow", file, wanted)


def read_csv(file: Path, wanted: Wanted, remark: Remark) -> Iterator[Batch]:
    """Values that commas separate, or something else; all stay as they are written."""
    encoding, guess = find_encoding(file)
    with file.open(encoding=encoding, newline="") as stream:
        start = stream.read(2**16)
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    separator = find_separator(start) or usual
    guesses = [f"as {guess}"] if guess else []
    if separator != usual:
        guesses.append(f"with {SEPARATORS[separator]} between the values")
    if guesses:
        remark(f"read {', '.join(guesses)}")
    options = {"sep": separator, "encoding": encoding}
    # Or 007 would become a number, and NA nothing.
    options |= {"converters": dict.fromkeys(wanted.columns, str), "keep_default_na": False}
    yield from read_dataset("csv", file, wanted, **options)


def read_dataset(format: str, file: Path, wanted: Wanted, **options: object) -> Iterator[Batch]:
    """A file of a format that `datasets` reads, with its options for it."""
    rows = datasets.load_dataset(
        format,
        data_files=glob.escape(str(file)),
        split="train",
        streaming=True,
        cache_dir="memory://",  # it makes a folder for it, though streaming puts nothing in
        **options,
    )
    for table in rows.with_format("arrow").iter(BATCH_ROWS):
        if "__index_level_0__" in table.column_names:  # which pandas makes of a column too many
            raise UserError(f"{file} has more values in its lines than names in its first line")
        yield {
            name: table.column(name).to_pylist() if name in wanted.columns else []
            for name in table.column_names
        }


def read_json(file: Path, wanted: Wanted, remark: Remark) -> Iterator[Batch]:
    """JSON Lines, a list of objects, or an object whose one list of objects has the rows.

    Not by `datasets`, which takes the types of all columns, needed or not, from the first 10 MB,
    and makes times of texts that look like them.
    """
    encoding, guess = find_encoding(file)
    if guess:
        remark(f"read as {guess}")
    rows = read_lines(file, encoding) if is_lines(file, encoding) else read_whole(file, encoding)
    if isinstance(rows, dict):
        rows = find_rows(file, rows, wanted)
    for run, kind in in_runs(file, rows, wanted):
        names = dict.fromkeys(name for row in run for name in row) | dict.fromkeys(kind)
        yield {name: [row.get(name) for row in run if name in wanted.columns] for name in names}


def is_lines(file: Path, encoding: str) -> bool:
    """Whether a file is JSON Lines: not a list, and its first line is not all of it, nor cut."""
    with file.open(encoding=encoding, errors="replace", newline="\n") as stream:
        lines = filter(None, map(str.strip, stream))
        first, more = next(lines, ""), next(lines, None)
    if first.startswith("["):
        return False
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        return not (first.startswith("{") and (more is None or cut_short(error)))
    except (ValueError, RecursionError):
        return more is not None
    return more is not None


def read_whole(file: Path, encoding: str) -> Any:
    """What a JSON file holds, all of it; raises UserError that names the line where it is none."""
    try:
        return json.loads(file.read_text(encoding))
    except json.JSONDecodeError as error:
        what, line = why_not_json(error, error.colno - 1), error.lineno
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        what, line = TOO_MUCH, 1
    raise UserError(f"{file}, line {line}: {what}")


def find_rows(file: Path, content: dict[str, Any], wanted: Wanted) -> list[Any]:
    """The rows in the object that fills a file: itself, or those of its only list of objects.

    Raises:
        UserError: there are several such lists, or nothing but other objects by their keys.
    """
    if any(content.keys() >= set(names) for names in wanted.sets):
        return [content]
    lists = [
        name
        for name, value in content.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if len(lists) > 1:
        raise UserError(
            f"{file} holds several lists of objects ({abbreviated(lists)}); write the one with the "
            f"rows to a file of its own (jq '.[\"{lists[0]}\"]' does)"
        )
    if lists:
        return content[lists[0]]
    if content and all(isinstance(value, list | dict) for value in content.values()):
        raise UserError(
            f"{file} is one object that holds others by their keys ({abbreviated(content)}); make "
            "it a list of rows: [{…}, {…}]"
        )
    return [content]


def in_runs(
    file: Path, rows: Iterable[object], wanted: Wanted
) -> Iterator[tuple[list[dict], tuple[str, ...]]]:
    """Some rows after each other that have the same of the wanted sets, and that set.

    A row that has none of them, as one that lacks its answer, goes with those before it. What is
    not wanted of a row is not kept.

    Raises:
        UserError: a row is no object.
    """
    run, kind = [], ()
    for row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file} holds something other than objects with named values")
        own = next((names for names in wanted.sets if row.keys() >= set(names)), kind)
        most = BATCH_LISTS if len(kind) == 1 else BATCH_ROWS
        if run and (len(run) == most or own != kind != ()):
            yield run, kind
            run = []
        kind = own
        run.append({name: row[name] if name in wanted.columns else None for name in row})
    if run:
        yield run, kind


def read_lines(file: Path, encoding: str) -> Iterator[object]:
    """What the lines of a JSON Lines file hold; raises UserError that names one that is none."""
    with file.open("rb") as stream:
        lines: Iterable[bytes] = stream
        if not encoding.startswith("utf-8"):  # which the error of a line names as what it is not
            text = io.TextIOWrapper(stream, encoding, newline="\n")
            lines = (line.encode() for line in text)
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                yield parse_json(line)
            except ValueError as error:
                looks = looks_like(file) if number == 1 and lines is stream else ""
                raise UserError(f"{file}, line {number}: {error}{looks}") from None


# What can be read, by the suffix.
READERS = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
BINARY = (read_parquet, read_arrow)


# --- Encodings ----------------------------------------------------------------------------------

# By the byte-order mark that a text file begins with.
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def mark_of(start: bytes) -> str | None:
    """The encoding that the first bytes of a file name, None where they name none."""
    return next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)


def find_encoding(file: Path) -> tuple[str, str]:
    """The encoding of a text file, and again where it is a guess: what all of it can be read in."""
    with file.open("rb") as stream:
        if encoding := mark_of(stream.read(4)):
            return encoding, ""
    if not can_be_read(file, "utf-8") and can_be_read(file, "cp949"):  # which Korean Windows writes
        return "cp949", "cp949"
    return "utf-8", ""


def can_be_read(file: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with file.open("rb") as stream:
            for block in iter(partial(stream.read, 2**20), b""):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
