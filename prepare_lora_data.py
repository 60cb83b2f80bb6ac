"""Make the training, validation and test sets of train_lora.py from questions and answers.

    python prepare_lora_data.py

reads data/korean_textbooks_qa and writes lora_finetune/data/{train,valid,test}.jsonl. The file
follows the work: the command line, finding and reading the source, splitting it,
writing the sets, and `main`, which does it.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import math
import signal
import sqlite3
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from lora_finetune.command_line import (
    Parser,
    UserError,
    abbreviated,
    begin_process,
    first_line,
    in_project,
    is_unicode,
    nonempty,
    run_and_report_errors,
    warn,
    whole_number,
)
from lora_finetune.files import atomic_write

QUESTION, ANSWER = "question", "answer"  # the usual columns
BATCH_ROWS = 1000
SPLITS = ("train", "valid", "test")


# --- The command line ---------------------------------------------------------------------------


def fraction(text: str) -> float:
    """An argparse type: a number between 0 and 1, both excluded."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return number


def build_parser() -> Parser:
    parser = Parser(
        prog="prepare_lora_data.py",
        description="Make train.jsonl, valid.jsonl and test.jsonl from questions and answers.",
    )
    add, switch = parser.add, parser.switch
    add("--source", nonempty, "data/korean_textbooks_qa", "a folder written by datasets' "
        "save_to_disk; a Parquet, Arrow, JSON Lines, JSON or CSV file; or a folder of such "
        "files")  # fmt: skip
    add("--output", nonempty, "lora_finetune/data", "folder of the three sets")
    add("--question-column", nonempty, QUESTION, "column of the questions")
    add("--answer-column", nonempty, ANSWER, "column of the answers")
    add("--valid-fraction", fraction, 0.05, "share of validation")
    add("--test-fraction", fraction, 0.05, "share of the test")
    add("--seed", whole_number(0, below=math.inf), 0, "which questions go into which set")
    add("--limit", whole_number(1, below=math.inf), None, "stop after so many examples "
        "(default: all)")  # fmt: skip
    switch("--keep-splits", "keep the splits of a saved DatasetDict; a validation or test set that "
           "it lacks is taken from train")  # fmt: skip
    switch("--dry-run", "print the counts and three examples, write nothing")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a default path is one in this project, wherever it is called from."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.question_column == args.answer_column:
        parser.error("--question-column and --answer-column name the same column")
    if args.valid_fraction + args.test_fraction >= 1:
        parser.error("--valid-fraction and --test-fraction leave nothing for training")
    for name in {"source", "output"} - args.typed:
        setattr(args, name, in_project(getattr(args, name)))
    return args


if __name__ == "__main__":  # --help and a wrong flag answer at once: the imports take a second
    begin_process()
    args = parse_arguments()

from lora_finetune.dataset import join_question, question_of
from lora_finetune.formats import check_format, holds_rows, looks_like, parse_json, separators

import datasets
import pyarrow.parquet as pq
from tqdm import tqdm

datasets.disable_progress_bars()
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or each file is reported to the hub
datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)  # an error here is one line

# --- The source ---------------------------------------------------------------------------------

# Lies beside the data in many folders and is JSON, but describes it only.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# The names that the splits of a DatasetDict have, and what they become.
SPLIT_NAMES = {"train": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "valid")


def find_files(source: Path) -> dict[Path, str | None]:
    """The data files of a source in reading order, each with the DatasetDict's split it is in.

    Raises:
        UserError: there is no such source, or no data in it.
    """
    if not source.exists():
        raise UserError(
            f"there is no {source}; the real korean_textbooks_qa has to be downloaded by you (from "
            "maywell/korean_textbooks on the Hugging Face hub) and put there, or named by --source"
        )
    if not source.is_dir():
        if source.suffix.lower() not in READERS:
            raise UserError(f"{source} is none of {', '.join(READERS)}, which can be read")
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


def read_batches(file: Path, wanted: tuple[str, ...]) -> Iterator[Batch]:
    """The rows of a file, a thousand at a time; what is not needed any more is not kept.

    Raises:
        UserError: the file cannot be read; says why.
    """
    try:
        with file.open("rb") as stream:
            check_format(file, stream.read(100))
        yield from READERS[file.suffix.lower()](file, wanted)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{file} cannot be read: it is not UTF-8; save it as UTF-8") from None
    except Exception as error:  # the readers raise of every kind
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def read_parquet(file: Path, wanted: tuple[str, ...]) -> Iterator[Batch]:
    """Not by `datasets`, which takes a whole row group at a time: often all of the file."""
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**16)
    names = parquet.schema_arrow.names
    columns = [name for name in names if name in wanted]
    for batch in parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
        values = {name: batch.column(name).to_pylist() for name in columns}
        yield dict.fromkeys(names, []) | values


def read_dataset(file: Path, wanted: tuple[str, ...]) -> Iterator[Batch]:
    """An Arrow or CSV file, by `datasets`; all of a CSV file's values stay as they are written."""
    format, options = file.suffix.lower().removeprefix("."), {}
    if format == "csv":
        with file.open(encoding="utf-8-sig") as stream:
            marks = separators(stream.read(2**16))
        if marks not in ("", "commas"):
            raise UserError(f"{file} has its values separated by {marks}; save it with commas")
        # Or 007 would become a number, and NA nothing.
        options = {"converters": dict.fromkeys(wanted, str), "keep_default_na": False}
    options["cache_dir"] = "memory://"  # it makes a folder for it, though streaming puts nothing in
    pattern = glob.escape(str(file))
    rows = datasets.load_dataset(
        format, data_files=pattern, split="train", streaming=True, **options
    )
    for table in rows.with_format("arrow").iter(BATCH_ROWS):
        if "__index_level_0__" in table.column_names:  # which pandas makes of a column too many
            raise UserError(f"{file} has more values in its lines than names in its first line")
        yield {
            name: table.column(name).to_pylist() if name in wanted else []
            for name in table.column_names
        }


def read_json(file: Path, wanted: tuple[str, ...]) -> Iterator[Batch]:
    """JSON Lines, or a list of objects, which is read whole.

    Not by `datasets`, which takes the types of all columns, needed or not, from the first 10 MB,
    and makes times of texts that look like them.
    """
    with file.open("rb") as stream:
        start = stream.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()
        stream.seek(0)
        if start.startswith(b"["):
            rows = iter(json.loads(stream.read().decode("utf-8-sig")))
        else:
            rows = (parse_line(file, *line) for line in enumerate(stream, 1) if line[1].strip())
        while some := list(islice(rows, BATCH_ROWS)):
            if not all(isinstance(row, dict) for row in some):
                raise UserError(f"{file} holds something else than objects with named values")
            if len(some) == 1 and holds_rows(some[0]):
                keys = abbreviated(some[0])
                raise UserError(
                    f"{file} is one object that holds others by their keys ({keys}); make it a "
                    "list of rows: [{…}, {…}]"
                )
            names = dict.fromkeys(name for row in some for name in row)
            yield {name: [row.get(name) for row in some if name in wanted] for name in names}


def parse_line(file: Path, number: int, line: bytes) -> object:
    """What one line of a JSON Lines file holds; raises UserError that names it where it is none."""
    try:
        return parse_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except ValueError as error:
        looks = looks_like(file) if number == 1 else ""
        raise UserError(f"{file}, line {number}: {error}{looks}") from None


# What can be read, by the suffix.
READERS = {
    ".parquet": read_parquet,
    ".arrow": read_dataset,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_dataset,
}


def read_examples(file: Path, question: str, answer: str) -> Iterator[tuple[str, str]]:
    """The question and the whole text of each row, trimmed; the text is "" where a side is empty.

    The question is for comparing, so it is composed (NFC): macOS takes letters apart in places.

    Args:
        file: one of READERS by its suffix.
        question, answer: names of the columns. Where the usual two are missing, the column "text"
            holds the texts as they are to be.

    Raises:
        UserError: the file cannot be read, or has no such columns with text in them.
    """
    for batch in read_batches(file, (question, answer, "text")):
        if question in batch and answer in batch:
            asked, answered = (texts(file, name, batch[name]) for name in (question, answer))
            pairs = zip(asked, answered, strict=True)
            whole = (join_question(q, a) if q and a else "" for q, a in pairs)
        elif "text" in batch and (question, answer) == (QUESTION, ANSWER):
            whole = texts(file, "text", batch["text"])
        else:
            raise UserError(
                f"{file} has no columns {question} and {answer}; it has {abbreviated(batch)}, of "
                "which --question-column and --answer-column can name two"
            )
        for text in whole:
            yield question_of(unicodedata.normalize("NFC", text)), text


def texts(file: Path, name: str, values: list) -> Iterator[str]:
    """The trimmed texts of a column, "" where there is none."""
    for value in values:
        if not isinstance(value, str | None):
            raise UserError(f"{file}: the column {name} holds {str(value)[:50]}, not text")
        if value and not value.isascii() and not is_unicode(value):
            raise UserError(f"{file}: the column {name} holds an unpaired surrogate")
        yield (value or "").strip()


# --- Splitting ----------------------------------------------------------------------------------


def own_splits(files: dict[Path, str | None]) -> list[tuple[Path, str]]:
    """The files of a DatasetDict with what its splits become, test and validation first.

    Of a question that stands in several splits it is then training that loses it.

    Raises:
        UserError: the source is no DatasetDict, or a split has another name.
    """
    if None in files.values():
        raise UserError("--keep-splits is for a DatasetDict, and the source has no splits")
    if unknown := set(files.values()) - set(SPLIT_NAMES):
        raise UserError(
            f"the source has a split {min(unknown)}; --keep-splits knows {', '.join(SPLIT_NAMES)}"
        )
    named = [(file, SPLIT_NAMES[split]) for file, split in files.items()]
    return sorted(named, key=lambda pair: SPLITS.index(pair[1]), reverse=True)


def assign_split(question: str, seed: int, shares: dict[str, float]) -> str:
    """The split of a question, by these alone: more rows around it do not move it.

    Args:
        question: in Unicode's composed form, as `read_examples` has it.
        seed: draws differently.
        shares: the fractions of the splits that are drawn; the rest is "train".
    """
    digest = hashlib.blake2b(f"{seed} {question}".encode(), digest_size=8).digest()
    drawn = int.from_bytes(digest, "big") / 2**64
    for split, share in shares.items():
        if drawn < share:
            return split
        drawn -= share
    return "train"


class Seen:
    """What has come before, by its digest. It goes to disk as it grows, so that memory does not."""

    def __init__(self) -> None:
        self.database = sqlite3.connect("")  # a private one, gone with this object
        self.database.execute("PRAGMA journal_mode = OFF")
        self.database.execute("PRAGMA cache_size = -64000")  # KB
        self.database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, note) WITHOUT ROWID")

    def setdefault(self, text: str, note: int | str) -> int | str:
        """The note with which a text came first: this one where it is new."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        insert = "INSERT OR IGNORE INTO seen VALUES (?, ?)"
        if self.database.execute(insert, (digest, note)).rowcount:
            return note
        return self.database.execute(
            "SELECT note FROM seen WHERE digest = ?", (digest,)
        ).fetchone()[0]


# --- The three sets -----------------------------------------------------------------------------


@contextmanager
def replace_sets(folder: Path) -> Iterator[dict[str, BinaryIO]]:
    """A stream for each split; together they replace the old files when all is written."""
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{split}.jsonl" for split in SPLITS]
    for file in files:
        if file.is_dir():
            raise UserError(f"{file} is a folder; --output can name another place")
    try:
        with atomic_write(*files) as streams:
            yield dict(zip(SPLITS, streams, strict=True))
    finally:
        with suppress(OSError):  # which is raised where they hold something, as they should
            for path in new_folders:
                path.rmdir()


def prepare(
    sources: list[tuple[Path, str]],
    question: str,
    answer: str,
    draw: Callable[[str], str],
    limit: int | None,
    write: Callable[[str, str], None],
) -> Counter:
    """Clean, split and write the examples of some files.

    Args:
        sources: the files, each with the split of its rows; those of "train" are drawn from.
        question, answer: names of the columns.
        draw: the split of a question out of "train".
        limit: takes no more examples than this from a split of the source.
        write: takes a split and a text.

    Returns:
        How many rows were read ("rows"), dropped ("empty", "duplicate", "elsewhere": the question
        is in another split) and written ("train", "valid", "test").

    Raises:
        UserError: a file cannot be read.
    """
    texts, questions = Seen(), Seen()
    counts, taken = Counter(), Counter()
    with tqdm(None, "Preparing", limit, False, unit=" rows", disable=None) as progress:
        for file, source in sources:
            if taken[source] == limit:
                continue
            for asked, text in read_examples(file, question, answer):
                if taken[source] == limit:
                    break
                progress.update()
                counts["rows"] += 1
                split = draw(asked) if source == "train" else source
                if not text:
                    counts["empty"] += 1
                elif texts.setdefault(text, counts["rows"]) != counts["rows"]:
                    counts["duplicate"] += 1
                elif questions.setdefault(asked, split) != split:
                    counts["elsewhere"] += 1
                else:
                    taken[source] += 1
                    counts[split] += 1
                    write(split, text)
    return counts


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for, and say what became of the rows.

    Raises:
        UserError, OSError: something that the user can put right.
    """
    source, output = Path(args.source), Path(args.output)
    files = find_files(source)
    if args.keep_splits:
        sources = own_splits(files)
    else:
        sources = [(file, "train") for file in files]  # which validation and test are drawn from
        if len(names := dict.fromkeys(files.values())) > 1:
            warn(f"the splits {', '.join(names)} are pooled; --keep-splits keeps them apart")
    shares = {"valid": args.valid_fraction, "test": args.test_fraction}
    shares |= {split: 0 for _, split in sources if split in shares}  # it has that split already
    samples = []
    encode = json.JSONEncoder(ensure_ascii=False).encode

    with nullcontext() if args.dry_run else replace_sets(output) as streams:

        def write(split: str, text: str) -> None:
            if streams:
                streams[split].write((encode({"text": text}) + "\n").encode())
            if len(samples) < 3:
                samples.append(text)

        counts = prepare(
            sources,
            args.question_column,
            args.answer_column,
            partial(assign_split, seed=args.seed, shares=shares),
            args.limit,
            write,
        )
        print(
            f"Read {counts['rows']} rows of {source}: dropped {counts['empty']} with an empty",
            f"side, {counts['duplicate']} exact duplicates,",
            f"{counts['elsewhere']} whose question is in another set.",
            flush=True,
        )
        check_filled(counts, source)
    written = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
    if args.dry_run:
        print(f"Would write to {output}: {written}. The first of them:")
        print("", *samples, sep="\n---\n")
    else:
        print(f"Wrote to {output}: {written}.")


def check_filled(counts: Counter, source: Path) -> None:
    """Raise UserError where a set is left empty."""
    if not sum(counts[split] for split in SPLITS):
        raise UserError(f"{source} leaves nothing to train on")
    for split in SPLITS:
        if not counts[split]:
            raise UserError(
                f"{split}.jsonl would be empty: take more rows, or choose other fractions"
            )


def main(args: argparse.Namespace) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # leave nothing half-written then
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return run_and_report_errors(partial(run, args), "the output")
    except sqlite3.Error as error:
        print(f"error: the temporary folder cannot be written: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(args))
