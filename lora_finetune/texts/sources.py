"""The files of a source, and the rows of a file of any format."""

from __future__ import annotations

import codecs
import csv
import glob
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

from lora_finetune.base.errors import UserError, first_line
from lora_finetune.base.files import nfc
from lora_finetune.texts.dataset import Row, check_format, read_json_lines
from lora_finetune.texts.messages import FORM, WrittenFloat, advice_on_contents, is_objects

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

datasets.disable_progress_bars()
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or each file is reported to the hub
datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)  # an error here is one line
csv.field_size_limit(sys.maxsize)

# Takes what the user should know of how a file is read, and how many times more it was so.
Note = Callable[..., None]

BATCH_ROWS = 1000

# JSON files that only describe the data beside them.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def find_files(source: Path) -> dict[Path, str | None]:
    """The data files of a source in reading order, each with the DatasetDict's split it is in."""
    if not source.exists():
        raise UserError(
            f"there is no {source}; name a file or a folder with --source (the real "
            "korean_textbooks_qa has to be downloaded by you, from maywell/korean_textbooks on the "
            "Hugging Face hub)"
        )
    if not source.is_dir():
        return {source: None}
    if any((source / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return saved_files(source)
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


def saved_files(folder: Path) -> dict[Path, str | None]:
    """The files that datasets' save_to_disk wrote, each with its split."""
    for file in folder.rglob("*.arrow"):
        check_format(file)
    try:
        saved = datasets.load_from_disk(str(folder), keep_in_memory=False)  # mapped, not read
    except Exception as error:  # the readers raise of every kind
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from error
    splits = saved if isinstance(saved, dict) else {None: saved}
    return {
        Path(file["filename"]): split
        for split, dataset in splits.items()
        for file in dataset.cache_files
    }


SPLITS = ("train", "valid", "test")
# The names that the splits of a DatasetDict have, and what they become.
SPLIT_NAMES = {"train": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "valid")


def own_splits(files: dict[Path, str | None]) -> list[tuple[Path, str]]:
    """The files of a DatasetDict with their splits, training last: it loses what is in several."""
    if unknown := set(files.values()) - set(SPLIT_NAMES):
        raise UserError(
            f"--keep-splits is for a DatasetDict of {', '.join(SPLIT_NAMES)}; the source has "
            + (f"a split {unknown.pop()}" if unknown != {None} else "no splits")
        )
    named = [(file, SPLIT_NAMES[split]) for file, split in files.items()]
    return sorted(named, key=lambda pair: SPLITS.index(pair[1]), reverse=True)


def read_rows(file: Path, columns: set[str], note: Note) -> Iterator[Row]:
    """The rows of a file, one at a time; in columnar formats only `columns` are filled."""
    read = READERS.get(file.suffix.lower())
    if not read:
        raise UserError(f"{file} cannot be read: its name ends in none of {', '.join(READERS)}")
    try:
        check_format(file)
        yield from read(file, columns, note)
    except UserError:
        raise
    except Exception as error:  # the readers raise of every kind
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def read_parquet(file: Path, columns: set[str], note: Note) -> Iterator[Row]:
    """Not by load_dataset, which decodes a whole row group at once: often all of the file."""
    stored = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**16)
    names = stored.schema_arrow.names
    kept = wanted(names, columns)
    return rows_of(names, stored.iter_batches(BATCH_ROWS, columns=kept, use_threads=False))


def read_arrow(file: Path, columns: set[str], note: Note) -> Iterator[Row]:
    stored = datasets.load_dataset(
        "arrow",
        data_files=glob.escape(str(file)),
        split="train",
        streaming=True,
        cache_dir="memory://",  # it makes a folder for it, though streaming puts nothing in
    )
    names = stored.column_names
    kept = stored.select_columns(wanted(names, columns)).with_format("arrow")
    return rows_of(names, kept.iter(BATCH_ROWS))


def wanted(names: list[str], columns: set[str]) -> list[str]:
    """The columns to read; at least one, so that there are rows."""
    kept = [name for name in names if name in columns]
    if len(kept) > len(set(kept)):
        raise ValueError(f"two of its columns have the same name: {', '.join(kept)}")
    return kept or names[:1]


def rows_of(names: list[str], tables: Iterable[pa.Table | pa.RecordBatch]) -> Iterator[Row]:
    """The rows of tables; a column that was not read is None."""
    empty = dict.fromkeys(names)
    for table in tables:
        features = datasets.Features.from_arrow_schema(table.schema)
        for row in table.to_pylist():
            yield empty | decode(row, features)


def decode(value: object, feature: object) -> object:
    """A stored value as it was before `datasets` stored it.

    Arrow gives each object the keys of all, with null where it had none: these go. What `datasets`
    stores as JSON text, such as values of several types, has no nulls but its own: these stay.
    """
    if value is None:
        return None
    if isinstance(feature, dict):
        return {k: decode(one, feature[k]) for k, one in value.items() if one is not None}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return [decode(one, feature.feature) for one in value]
    return feature.decode_example(value) if isinstance(feature, datasets.Json) else value


SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
# A first line by which Excel knows the separator.
SEPARATOR_LINE = re.compile(r'"?sep=(.|\\t)"?\s*', re.IGNORECASE)


def read_csv(file: Path, columns: set[str], note: Note) -> Iterator[Row]:
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding=find_encoding(file, note), newline="") as stream:
        first = stream.readline()
        if named := SEPARATOR_LINE.fullmatch(first):
            separator = named[1].replace("\\t", "\t")
        else:
            separator = max([usual, *SEPARATORS], key=first.count)
            if separator != usual:
                note(f"read with {SEPARATORS[separator]} between the values")
            stream.seek(0)
        rows = csv.DictReader(stream, delimiter=separator, strict=True)
        rows.fieldnames = [nfc(name.strip()) for name in rows.fieldnames or []]
        wanted(rows.fieldnames, columns)
        for row in rows:
            if None in row:
                raise UserError(f"{file} has more values in a line than names in its first line")
            yield row


def read_json(file: Path, columns: set[str], note: Note) -> Iterator[Row]:
    """JSON Lines, a list of objects, or an object whose one list of objects has the rows.

    Not by load_dataset, which takes the types of all columns, needed or not, from the first 10 MB,
    and makes times of texts that look like them.
    """
    with file.open(encoding=find_encoding(file, note), newline="\n") as stream:
        first = next(filter(str.strip, stream), "{}")
        stream.seek(0)
        if is_object(first):
            rows = (value for _, value in read_json_lines(file, stream))
        else:
            whole = json.load(stream, parse_float=WrittenFloat)
            rows = iter(whole if isinstance(whole, list) else [whole])
        start = list(islice(rows, 2))
        if len(start) == 1 and isinstance(start[0], dict):
            start = find_rows(start[0], columns)
        for row in chain(start, rows):
            if not isinstance(row, dict):
                raise UserError(f"{file} holds something other than objects with named values")
            yield row


def is_object(line: str) -> bool:
    """Whether a line is a JSON object; a file that begins with one has JSON Lines."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def find_rows(content: Row, columns: set[str]) -> list[Row]:
    """The rows in the only object of a file: itself, or those of its only list of objects.

    Utterances of a dialogue are no rows, though they may have texts.
    """
    lists = [value for value in content.values() if value and is_objects(value)]
    if len(lists) != 1 or not columns.isdisjoint(content):
        return [content]
    is_dialogue = columns.intersection(lists[0][0]) <= {"text"} and speaker_of(lists[0])
    return [content] if is_dialogue else lists[0]


def find_encoding(file: Path, note: Note) -> str:
    """UTF-8; UTF-16 where its mark says so; or, as a guess, cp949, which Korean Windows writes."""
    with file.open("rb") as stream:
        if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
    for encoding in ("utf-8-sig", "cp949"):
        with suppress(UnicodeDecodeError), file.open(encoding=encoding, newline="") as stream:
            while stream.read(2**16):
                pass
            if encoding == "cp949":
                note("read as cp949")
            return encoding
    raise UserError(f"{file} cannot be read: it is not UTF-8; save it as UTF-8")


# The formats, by the suffix.
READERS = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}


# --- Forms that cannot be read -------------------------------------------------------------------


def advice_on(rows: list[Row]) -> str:
    """What to do with rows of no kind, where their form is known."""
    if advice := next(filter(None, map(advice_on_contents, rows)), None):
        return advice
    names = (name for row in rows for name in row)
    speaker = named_speaker(names) or next(filter(None, map(find_speaker, rows)), None)
    if not speaker:
        return ""
    return (
        f"; by {speaker:.40} these are utterances of dialogues: write each dialogue as {FORM}, "
        f"and texts that stand alone without {speaker:.40}"
    )


# Who speaks, as corpora of dialogues name it.
SPEAKER = re.compile(r"(speaker|talker|participant)(?!s)|화자|^(role|from|who|sender)$", re.I)
PROSE = re.compile(r"[^!-~]")  # what numbers and other identifiers have none of


def named_speaker(names: Iterable[str]) -> str | None:
    return next(filter(SPEAKER.search, names), None)


def speaker_of(rows: list[Row]) -> str | None:
    """The column that says who speaks, where rows are utterances.

    By its name, or as one with few values, which come again, beside a single one of texts.
    """
    rows = rows[:50]
    columns = {name: {str(row.get(name)) for row in rows} for name in rows[0]}
    several = [name for name, values in columns.items() if len(values) > 1]
    few = [name for name in several if 2 * len(columns[name]) <= len(rows) + 1]
    texts = [name for name in several if name not in few and any(map(PROSE.search, columns[name]))]
    return named_speaker(columns) or (few[0] if few and len(texts) == 1 else None)


def find_speaker(value: object) -> str | None:
    """As `speaker_of`, in the first list of utterances inside a value."""
    found = speaker_of(value) if value and is_objects(value) else None
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found or next(filter(None, map(find_speaker, inner)), None)
