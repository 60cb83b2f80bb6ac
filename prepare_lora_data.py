"""Make the training, validation and test sets of train_lora.py from questions and answers.

    python prepare_lora_data.py

reads data/korean_textbooks_qa and writes lora_finetune/data/{train,valid,test}.jsonl. The file
follows the work: the command line, the examples in the rows of a file, splitting them, writing the
sets, and `main`, which does it. How files are found and read is in lora_finetune/texts/sources.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import count, pairwise, repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_finetune.base.command_line import Parser, in_project, nonempty, whole_number
from lora_finetune.base.errors import (
    UserError,
    abbreviated,
    is_unicode,
    run_and_report_errors,
    warn,
)
from lora_finetune.base.files import atomic_write, nfc
from lora_finetune.base.signals import begin_process

QUESTION, ANSWER = "question", "answer"  # the usual columns
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
        "save_to_disk; a Parquet, Arrow, JSON Lines, JSON, CSV or TSV file; or a folder of such "
        "files")  # fmt: skip
    add("--output", nonempty, "lora_finetune/data", "folder of the three sets")
    add("--question-column", nonempty, QUESTION, "column of the questions; instruction and output, "
        "prompt and completion, messages, conversations, SQuAD's paragraphs and a ready text are "
        "recognized too")  # fmt: skip
    add("--answer-column", nonempty, ANSWER, "column of the answers")
    add("--context-column", nonempty, None, "column of what is to stand before the question")
    switch("--keep-chats", "write chats as they are, as messages, not each question with its "
           "answer")  # fmt: skip
    add("--valid-fraction", fraction, 0.05, "share of validation")
    add("--test-fraction", fraction, 0.05, "share of the test")
    add("--seed", whole_number(0, below=math.inf), 0, "which questions go into which set")
    add("--limit", whole_number(1, below=math.inf), None, "take so many examples, of each split "
        "where they are kept (default: all)")  # fmt: skip
    switch("--keep-splits", "keep the splits of a saved DatasetDict; a validation or test set that "
           "it lacks is taken from train")  # fmt: skip
    switch("--dry-run", "print the counts and three examples, write nothing")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a default path is one in this project, wherever it is called from."""
    parser = build_parser()
    args = parser.parse_args(argv)
    flags = {"question_column", "answer_column", "context_column"}
    named = [name for name in (getattr(args, flag) for flag in flags) if name]
    if len(named) > len(set(named)):
        parser.error("two of --question-column, --answer-column and --context-column are the same")
    if args.keep_chats and flags & args.typed:
        parser.error("--keep-chats keeps chats, which have no columns of questions and answers")
    if args.valid_fraction + args.test_fraction >= 1:
        parser.error("--valid-fraction and --test-fraction leave nothing for training")
    for name in {"source", "output"} - args.typed:
        setattr(args, name, in_project(getattr(args, name)))
    return args


if __name__ == "__main__":  # --help and a wrong flag answer at once: the imports take a second
    begin_process()
    args = parse_arguments()

from lora_finetune.texts.chat import Message, read_messages, read_tools
from lora_finetune.texts.dataset import join_question, question_of
from lora_finetune.texts.sources import Batch, Wanted, find_files, read_batches

from tqdm import tqdm

# --- The examples in the rows -------------------------------------------------------------------

# The columns that rows are known by; of several in a file the first count.
PAIRS = ((QUESTION, ANSWER), ("instruction", "output"), ("prompt", "completion"))
NESTED = ("paragraphs", "qas")  # SQuAD's lists in lists: questions and answers are innermost
CHATS = ("messages", "conversations")
TEXT = "text"

Row = dict[str, Any]
# Times and the like, which a Parquet file may have beside the messages of a chat, become strings.
to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


class Example(NamedTuple):
    """What may become a line of a set.

    Attributes:
        topic: what the split is drawn by: the question, or what it shares with others.
        question: for comparing, so it is composed (NFC): macOS takes letters apart in places.
        line: the line, as JSON; "" where a side is empty.
    """

    topic: str
    question: str
    line: str


EMPTY = Example("", "", "")


class Notes:
    """What to say of the files once they are read; of those that are alike, once.

    Attributes:
        columns: of each file that was read, the columns that it has and those that are used.
        said: what else there is to say, with the files that it is true of.
        messages: how many messages of chats were left out.
        unit: what is counted.
    """

    def __init__(self) -> None:
        self.columns: dict[Path, tuple[dict[str, None], set[str | None]]] = {}
        self.said: dict[str, dict[Path, None]] = {}
        self.messages, self.unit = 0, "rows"

    def add(self, file: Path, what: str) -> None:
        self.said.setdefault(what, {})[file] = None

    def say(self, source: Path) -> None:
        for file, (names, used) in self.columns.items():
            if others := [name for name in names if name not in used]:
                self.add(file, f"columns that are left out: {abbreviated(others)}")
        for what, files in self.said.items():
            first, *more = files
            where = f"{first} and {len(more)} more" if more else first
            warn(f"{source if len(files) == len(self.columns) else where}: {what}")
        if self.messages:
            warn(
                f"{self.messages} messages of chats are left out, as they are no question with the "
                "answer directly after it; --keep-chats keeps them"
            )


def read_examples(file: Path, args: argparse.Namespace, notes: Notes) -> Iterator[Example]:
    """The examples in each row of a file.

    Args:
        file: one that `find_files` found.
        args: the command line, which may name the columns.
        notes: takes what was guessed and what is left out.

    Raises:
        UserError: the file cannot be read, or has no such columns with text in them.
    """
    kinds, context = known_columns(args), args.context_column
    columns = {context or "context", "input", "system", "tools"}.union(*kinds)
    wanted = Wanted(kinds, frozenset(columns))
    names, used = notes.columns[file] = {}, set()
    rows = count(1)
    for batch in read_batches(file, wanted, partial(notes.add, file)):
        names |= dict.fromkeys(batch)
        kind = next((kind for kind in kinds if batch.keys() >= set(kind)), None)
        check_columns(file, kind, names, args)
        used.update(kind)
        if len(kind) == 2:
            more = "input" if kind == ("instruction", "output") and context != "input" else None
            used |= {context, more}
            yield from make_pairs(file, batch, *kind, context, more)
        elif kind[0] in NESTED:
            used |= {context or "context"}
            yield from make_passages(file, rows_of(batch), args, notes)
        elif kind[0] in CHATS:
            used |= {*CHATS, "system"} | ({"tools"} if args.keep_chats else set())
            make = make_chat if args.keep_chats else make_turns
            for row in rows_of(batch):
                yield from make(file, next(rows), row, notes)
        else:
            yield from map(make_example, texts(file, TEXT, batch[TEXT]))


def known_columns(args: argparse.Namespace) -> tuple[tuple[str, ...], ...]:
    """The columns that rows may be known by, the first sets before the others."""
    if args.keep_chats:
        return tuple((name,) for name in CHATS)
    if args.typed & {"question_column", "answer_column"}:
        return ((args.question_column, args.answer_column),)
    return (*PAIRS, *((name,) for name in (*NESTED, *CHATS, TEXT)))


def check_columns(
    file: Path, kind: tuple[str, ...] | None, names: Iterable[str], args: argparse.Namespace
) -> None:
    """Raise UserError where a file with columns of such names is of no kind, or lacks a column."""
    there = abbreviated(names) or "nothing"
    if not kind and args.keep_chats:
        raise UserError(f"{file} has no {' or '.join(CHATS)} for --keep-chats; it has {there}")
    if not kind:
        raise UserError(
            f"{file} has no columns {args.question_column} and {args.answer_column}; it has "
            f"{there}, of which --question-column and --answer-column can name two"
        )
    if not args.context_column or kind[0] in NESTED:  # where it is further inside
        return
    if len(kind) == 1:
        raise UserError(
            f"{file} has {kind[0]}, before which no --context-column can stand; --question-column "
            "and --answer-column can name two other columns"
        )
    if args.context_column not in names:
        column = args.context_column
        raise UserError(f"{file} has no column {column} for --context-column; it has {there}")


def rows_of(batch: Batch) -> Iterator[Row]:
    """The rows of a batch, without what is null in them."""
    filled = {name: values for name, values in batch.items() if values}
    for values in zip(*filled.values(), strict=True):
        yield {name: value for name, value in zip(filled, values, strict=True) if value is not None}


def make_pairs(
    file: Path, batch: Batch, question: str, answer: str, context: str | None, more: str | None
) -> Iterator[Example]:
    """An example for each row; what else is to be asked stands around the question.

    Args:
        question, answer, context, more: names of columns; the last two stand before and after the
            question, and may be lacking.
    """

    def column(name: str | None) -> Iterator[str]:
        return texts(file, name, batch[name]) if batch.get(name) else repeat("")

    sides = (texts(file, name, batch[name]) for name in (question, answer))
    for asked, answered, before, after in zip(*sides, column(context), column(more), strict=False):
        parts = [part for part in (before, asked, after) if part]
        yield make_example(
            join_question("\n\n".join(parts), answered) if asked and answered else ""
        )


def make_example(text: str) -> Example:
    question = question_of(nfc(text))
    return Example(question, question, to_json({"text": text}) if text else "")


def make_passages(
    file: Path, articles: Iterable[Row], args: argparse.Namespace, notes: Notes
) -> Iterator[Example]:
    """An example for each question of articles in SQuAD's form; the passage is its topic."""
    context = args.context_column or "context"
    rows = [row for article in articles for row in innermost(file, article)]
    if rows and not any(context in row for row in rows):
        if args.context_column:
            raise UserError(
                f"{file} has no {context} for --context-column around its questions; it has "
                f"{abbreviated(rows[0])}"
            )
        notes.add(file, "questions without a context, which --context-column can name")
    notes.unit = "questions"
    passages = list(texts(file, context, (row.get(context) for row in rows)))
    batch = {
        QUESTION: [row.get("question") for row in rows],
        ANSWER: [
            None if row.get("is_impossible") else row.get("answers", row.get("answer"))
            for row in rows
        ],
        context: passages,
    }
    examples = make_pairs(file, batch, QUESTION, ANSWER, context, None)
    for passage, example in zip(passages, examples, strict=True):
        yield example._replace(topic=composed(passage) or example.topic)


def innermost(file: Path, row: Row) -> Iterator[Row]:
    """The innermost objects of a row's lists in lists, each with what those around it have."""
    name = next((name for name in NESTED if name in row), None)
    if name is None:
        yield row
        return
    if not isinstance(row[name], list) or not all(isinstance(inner, dict) for inner in row[name]):
        raise UserError(f"{file}: the column {name} holds {str(row[name])[:50]}, not objects")
    around = {key: value for key, value in row.items() if key != name}
    for inner in row[name]:
        yield from innermost(file, around | inner)


def make_turns(file: Path, number: int, row: Row, notes: Notes) -> Iterator[Example]:
    """An example for each question of a chat with the answer directly after it."""
    messages, _ = read_chat(file, number, row)
    turns = [
        (asked["content"], answered["content"])
        for asked, answered in pairwise(messages)
        if (asked["role"], answered["role"]) == ("user", "assistant")
    ]
    notes.unit = "questions"
    notes.messages += len(messages) - 2 * len(turns)
    if not turns:
        yield EMPTY
    for turn in turns:
        question, answer = texts(file, "messages", turn)
        example = make_example(join_question(question, answer) if question and answer else "")
        yield example._replace(topic=composed(turns[0][0]))


def make_chat(file: Path, number: int, row: Row, _: Notes) -> Iterator[Example]:
    """A chat as it is; one without a question or an answer has an empty side."""
    messages, tools = read_chat(file, number, row)
    asked = [m["content"] for m in messages if m["role"] == "user" and m["content"].strip()]
    answers = [m for m in messages if m["role"] == "assistant"]
    if not (asked and any(m["content"].strip() or "tool_calls" in m for m in answers)):
        yield EMPTY
        return
    line = to_json({"messages": messages} | ({"tools": tools} if tools else {}))
    question = composed(asked[0])
    yield Example(question, question, line)


def read_chat(file: Path, number: int, row: Row) -> tuple[list[Message], list[dict] | None]:
    """The messages and the tools of a row; there are none where all is empty.

    Raises:
        UserError: they are not in order; names the row, counted from 1.
    """
    if not any(row.get(name) for name in CHATS):
        return [], None
    try:
        messages, tools = read_messages(row), read_tools(row.get("tools"))
        if not is_unicode(to_json((messages, tools))):
            raise ValueError("holds half a character, an unpaired surrogate")
    except ValueError as error:
        raise UserError(f"{file}, row {number}: {error}") from None
    return messages, tools


def texts(file: Path, name: str, values: Iterable[object]) -> Iterator[str]:
    """The trimmed texts of a column, "" where there is none."""
    for value in map(text_in, values):
        if not isinstance(value, str | None):
            raise UserError(f"{file}: the column {name} holds {str(value)[:50]}, not text")
        if value and not value.isascii() and not is_unicode(value):
            raise UserError(
                f"{file}: the column {name} holds half a character, an unpaired surrogate"
            )
        yield (value or "").strip()


def text_in(value: object) -> object:
    """The text of a value; of an answer in SQuAD's form, or of several, that of the first."""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = value[0] if value else None
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
        if isinstance(value, list):
            value = value[0] if value else None
    return value


def composed(text: str) -> str:
    """A text without white space around it, in Unicode's composed form."""
    return nfc(text.strip())


# --- Splitting ----------------------------------------------------------------------------------

# The names that the splits of a DatasetDict have, and what they become.
SPLIT_NAMES = {"train": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "valid")


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


def assign_split(topic: str, seed: int, shares: dict[str, float]) -> str:
    """The split of a topic, by these alone: more rows around it do not move it.

    Args:
        topic: mostly a question, in Unicode's composed form, as `read_examples` has it.
        seed: draws differently.
        shares: the fractions of the splits that are drawn; the rest is "train".
    """
    digest = hashlib.blake2b(f"{seed} {topic}".encode(), digest_size=8).digest()
    drawn = int.from_bytes(digest, "big") / 2**64
    for split, share in shares.items():
        if drawn < share:
            return split
        drawn -= share
    return "train"


def digest(text: str) -> bytes:
    """What stands for a text among all that have come before: 16 bytes, whatever its length."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


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
    read: Callable[[Path], Iterator[Example]],
    draw: Callable[[str], str],
    limit: int | None,
    write: Callable[[str, str], None],
) -> Counter:
    """Clean, split and write the examples of some files.

    Args:
        sources: the files, each with the split of its rows; those of "train" are drawn from.
        read: the examples of a file.
        draw: the split of a topic out of "train".
        limit: takes no more examples than this from a split of the source.
        write: takes a split and a line.

    Returns:
        How many examples were read ("read"), dropped ("empty", "duplicate", "elsewhere": the
        question is in another split) and written ("train", "valid", "test").

    Raises:
        UserError: a file cannot be read.
    """
    lines: dict[bytes, int] = {}
    questions: dict[bytes, str] = {}
    counts, taken = Counter(), Counter()
    with tqdm(None, "Preparing", limit, False, unit=" rows", disable=None) as progress:
        for file, source in sources:
            if taken[source] == limit:
                continue
            for topic, question, line in read(file):
                if taken[source] == limit:
                    break
                progress.update()
                counts["read"] += 1
                split = draw(topic) if source == "train" else source
                if not line:
                    counts["empty"] += 1
                elif lines.setdefault(digest(line), counts["read"]) != counts["read"]:
                    counts["duplicate"] += 1
                elif questions.setdefault(digest(question), split) != split:
                    counts["elsewhere"] += 1
                else:
                    taken[source] += 1
                    counts[split] += 1
                    write(split, line)
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
    samples, notes = [], Notes()

    with nullcontext() if args.dry_run else replace_sets(output) as streams:

        def write(split: str, line: str) -> None:
            if streams:
                streams[split].write(f"{line}\n".encode())
            if len(samples) < 3:
                samples.append(json.loads(line).get("text", line))

        counts = prepare(
            sources,
            partial(read_examples, args=args, notes=notes),
            partial(assign_split, seed=args.seed, shares=shares),
            args.limit,
            write,
        )
        written = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
        print(
            f"Read {counts['read']} {notes.unit} of {source}: dropped {counts['empty']} with an",
            f"empty side, {counts['duplicate']} exact duplicates,",
            f"{counts['elsewhere']} whose question is in another set.",
            flush=True,
        )
        if args.dry_run:
            print(f"Would write to {output}: {written}. The first of them:")
            print("", *samples, sep="\n---\n")
        check_filled(counts, source)
        notes.say(source)
    if not args.dry_run:
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
    return run_and_report_errors(partial(run, args), "the output")


if __name__ == "__main__":
    sys.exit(main(args))
