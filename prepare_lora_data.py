"""Make the training, validation and test sets of train_lora.py from questions and answers.

    python prepare_lora_data.py

reads data/korean_textbooks_qa and writes lora_finetune/data/{train,valid,test}.jsonl. How files are
read is in lora_finetune/texts/sources.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, islice, pairwise, product, starmap
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lora_finetune.base.command_line import Parser, in_project, nonempty, number, whole_number
from lora_finetune.base.errors import UserError, abbreviated, bar_options, hint, is_unicode, warn
from lora_finetune.base.files import atomic_write, composed, earlier_kept, nfc
from lora_finetune.base.signals import begin_process, raising_signals
from lora_finetune.texts import sources
from lora_finetune.texts.dataset import (
    DECOMPOSED,
    DECOMPOSED_HANGUL,
    Row,
    as_messages,
    below_headings,
    question_of,
)
from lora_finetune.texts.messages import (
    CHATS,
    TURNS,
    as_chat,
    as_text,
    is_learnt,
    is_number,
    is_objects,
    read_beside,
    read_messages,
    spell_out,
)
from lora_finetune.texts.sources import SPLITS, Note

from tqdm import tqdm

Notes = dict[str, Counter[Path]]  # what to say of files once they are read, how often in which
NESTED = ("paragraphs", "qas")  # SQuAD's lists in lists: questions and answers are innermost
FOR_TEMPLATE = ("tools", "functions", "chat_template_kwargs")  # beside a chat
AS_TEXT = "numbers and booleans in the column {} are written as text"
FORMS = {"text": below_headings, "messages": as_messages}
# Columns that are known without flags.
QUESTIONS = ("question", "질문", "질문내용", "질문 내용", "질의", "물음", "문의", "문제", "문항",
             "Question", "QUESTION", "Q", "q", "prompt", "instruction", "query")  # fmt: skip
ANSWERS = ("answer", "답변", "답변내용", "답변 내용", "응답", "대답", "답", "정답", "해설",
           "Answer", "ANSWER", "A", "a", "response")  # fmt: skip


# --- The command line ---------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(
        prog="prepare_lora_data.py",
        description="Make train.jsonl, valid.jsonl and test.jsonl from questions and answers.",
    )
    add, switch = parser.add, parser.switch
    share, count = number(float, 0, below=1), whole_number(1, below=math.inf)
    add("--source", nonempty, "data/korean_textbooks_qa", "a folder written by datasets' "
        "save_to_disk; a Parquet, Arrow, JSON Lines, JSON, CSV or TSV file; or a folder of such "
        "files")  # fmt: skip
    add("--output", nonempty, "lora_finetune/data", "folder of the three sets")
    add("--question-column", nonempty, "question", "column of the questions; instruction with "
        "output, prompt with completion, chats, SQuAD's form, texts are known too")  # fmt: skip
    add("--answer-column", nonempty, "answer", "column of the answers")
    add("--context-column", nonempty, None, "column of what is to stand before the question")
    add("--form", str, "text", "what to write: text, questions and answers below headings; or "
        "messages, chats in the model's own form", choices=FORMS, metavar="FORM")  # fmt: skip
    switch("--keep-chats", "write chats as they are, as messages, not each question with its "
           "answer")  # fmt: skip
    add("--valid-fraction", share, 0.05, "share of validation; with 0 there is no valid.jsonl")
    add("--test-fraction", share, 0.05, "share of the test; with 0 there is no test.jsonl")
    add("--seed", whole_number(0, below=math.inf), 0, "random seed of the split")
    add("--limit", count, None, "take so many examples, of each split where they are kept "
        "(default: all)")  # fmt: skip
    switch("--keep-splits", "keep the splits of a saved DatasetDict; a validation or test set that "
           "it lacks is taken from train")  # fmt: skip
    switch("--normalize", "compose letters (NFC): decomposed Hangul, as of a Mac, takes six to "
           "nine times the tokens")  # fmt: skip
    switch("--dry-run", "print the counts and three examples, write nothing")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a default path is one in this project, wherever it is called from."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.keep_chats and {"question_column", "answer_column", "context_column"} & args.typed:
        parser.error("--keep-chats keeps chats, which have no columns of questions and answers")
    args.shares = {"valid": args.valid_fraction, "test": args.test_fraction}
    if sum(args.shares.values()) >= 1:
        parser.error("--valid-fraction and --test-fraction leave nothing for training")
    for name in {"source", "output"} - args.typed:
        setattr(args, name, in_project(getattr(args, name)))
    return args


# --- The rows of a file -------------------------------------------------------------------------


class Example(NamedTuple):
    """A line of a set, maybe."""

    topic: str  # the split is drawn by it: the question, or what it shares with others
    question: str  # for comparing, so it is composed (NFC): macOS takes letters apart in places
    row: Row  # of a prompt and its completion, a text or messages; {} where a side is empty


EMPTY = Example("", "", {})
Read = Iterator[tuple[Example, str]]  # each with its line, as JSON; "" for an empty one


class Kind(NamedTuple):
    """A kind of row: those that have all of its columns."""

    columns: tuple[str, ...]
    more: tuple[str, ...]  # other columns that are used where a row has them
    make: Callable[[Row], Iterable[Example]]


def known_kinds(args: argparse.Namespace, note: Note) -> list[Kind]:
    """The kinds of rows; a row is of the first whose columns it has."""
    context = args.context_column

    def pairs(question: str, answer: str, below: str | None = None) -> Kind:
        asked = tuple(dict.fromkeys(name for name in (context, question, below) if name))
        return Kind((question, answer), asked, partial(make_pair, note, question, answer, asked))

    if args.keep_chats:
        more, make = (*CHATS, "system", *FOR_TEMPLATE), partial(make_chat, note)
        return [Kind((name,), more, make) for name in CHATS]
    if args.typed & {"question_column", "answer_column"}:
        return [pairs(args.question_column, args.answer_column)]
    passages = partial(make_passages, context, note)
    kinds = [
        pairs("question", "answer"),
        pairs("instruction", "output", "input"),
        pairs(*TURNS),
        *(Kind((name,), (context or "context",), passages) for name in NESTED),
    ]
    others = list(starmap(pairs, product(QUESTIONS, ANSWERS)))
    if context:  # which stands before questions alone
        return kinds + others
    turns = [Kind((name,), (*CHATS, "system"), partial(make_turns, note)) for name in CHATS]
    text = Kind(("text",), (), lambda row: [make_example(text_in(row, "text", note))])
    return [*kinds, *turns, *others, text]


def kind_of(row: Row, kinds: list[Kind]) -> Kind | None:
    return next((kind for kind in kinds if row.keys() >= set(kind.columns)), None)


def filled(row: Row) -> Row:
    """A row without what it lacks where others have it."""
    return {k: v for k, v in row.items() if v is not None and v != [] and v == v}  # not NaN


def read_examples(file: Path, args: argparse.Namespace, notes: Notes) -> Read:
    """The examples in each row of a file; a row of no kind, as without an answer, is empty."""

    def note(remark: str, times: int = 0) -> None:
        notes.setdefault(remark, Counter())[file] += times

    kinds = known_kinds(args, note)
    put = FORMS[args.form]
    also = TURNS if args.keep_chats else ()
    columns = set(also).union(*(kind.columns + kind.more for kind in kinds))
    rows = map(as_chat, sources.read_rows(file, columns, note))
    first = list(islice(rows, 50))  # not more, since articles and chats may have a megabyte each
    check_columns(file, first, kinds, args, note)
    try:
        for number, row in enumerate(map(filled, chain(first, rows)), 1):  # noqa: B007 used below
            kind = kind_of(row, kinds)
            for example in kind.make(row) if kind else [EMPTY]:
                row = example.row and put(example.row)
                line = to_json(composed(row) if args.normalize else row) if row else ""
                if not is_unicode(line + example.topic):
                    raise ValueError("holds half a character, an unpaired surrogate")
                if DECOMPOSED_HANGUL.search(line):
                    note(f"examples with {DECOMPOSED}; --normalize composes it", 1)
                yield example, line
    except ValueError as error:
        raise UserError(f"{file}, row {number}: {error}") from None


def check_columns(
    file: Path, rows: list[Row], kinds: list[Kind], args: argparse.Namespace, note: Note
) -> None:
    """Note the columns that the first rows of a file do not need; refuse those that lack some."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    there, context = abbreviated(names) or "nothing", args.context_column
    found = [kind for row in rows if (kind := kind_of(filled(row), kinds))]
    utterances = {kind.columns for kind in found} == {("text",)} and sources.named_speaker(names)
    if rows and (utterances or not any(kind_of(row, kinds) for row in rows)):
        flag = " for --keep-chats" * args.keep_chats or " for --context-column" * bool(context)
        advice = (
            sources.advice_on(rows) or ", of which --question-column and --answer-column name two"
        )
        wanted = " and ".join(kinds[0].columns)
        raise UserError(f"{file} has no columns {wanted}{flag}; it has {there}{advice}")
    if rows and context and not {context, *NESTED} & set(names):
        raise UserError(f"{file} has no column {context} for --context-column; it has {there}")
    used = {name for kind in found for name in kind.columns + kind.more}
    if found and (left_out := [name for name in names if name not in used]):
        known = kinds[1:] and not args.keep_chats and {*QUESTIONS, *ANSWERS} & set(left_out)
        other = "; --question-column and --answer-column name others" * bool(known)
        note(f"columns that are left out: {abbreviated(left_out)}{other}")


# --- The examples in a row ----------------------------------------------------------------------

# Times and the like, which a Parquet file may have beside the messages of a chat, become strings.
to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def make_pair(note: Note, question: str, answer: str, asked: tuple, row: Row) -> list[Example]:
    """The example of two columns; `asked` are those that make up the whole question."""
    texts = {name: text_in(row, name, note) for name in asked}
    whole = "\n\n".join(filter(None, texts.values())) if texts[question] else ""
    return [question_and_answer(whole, text_in(row, answer, note))]


def question_and_answer(question: str, answer: str) -> Example:
    asked, row = nfc(question), {"prompt": question, "completion": answer}
    return Example(asked, asked, row) if question and answer else EMPTY


def make_example(text: str) -> Example:
    question = question_of(nfc(text))
    return Example(question, question, {"text": text}) if text else EMPTY


def make_passages(context: str | None, note: Note, article: Row) -> Iterator[Example]:
    """An example for each question of an article in SQuAD's form; the passage is its topic."""
    rows, passage = innermost(article), context or "context"
    if rows and not any(passage in row for row in rows):
        if context:
            raise ValueError(f"has no {context} for --context-column, but {abbreviated(rows[0])}")
        note("questions without a context, which --context-column can name")
    for row in rows:
        answer = None if row.get("is_impossible") else row.get("answers", row.get("answer"))
        above = text_in(row, passage, note)
        columns = "question", "answer", (passage, "question")
        [example] = make_pair(note, *columns, row | {passage: above, "answer": answer})
        yield example._replace(topic=nfc(above) or example.topic)


def innermost(row: Row) -> list[Row]:
    """The innermost objects of a row's lists in lists, each with what those around it have."""
    rows = [row]
    for name in NESTED:
        inner = [(row, row.get(name, [{}])) for row in rows]
        if wrong := [some for _, some in inner if not is_objects(some)]:
            raise ValueError(f"the column {name} holds {str(wrong[0])[:50]}, not objects")
        rows = [row | one for row, some in inner for one in some]
    return rows


def make_turns(note: Note, row: Row) -> Iterator[Example]:
    """An example for each question of a chat with the answer directly after it."""
    messages = messages_in(row, note)
    turns = [
        (asked["content"].strip(), answered["content"].strip())
        for asked, answered in pairwise(messages)
        if (asked["role"], answered["role"]) == ("user", "assistant") and is_learnt(answered)
    ]
    if len(messages) > 2 * len(turns):
        note(
            "messages of chats that are no question with the answer directly after it are left "
            "out; --keep-chats keeps them"
        )
    for question, answer in turns or [("", "")]:
        example = question_and_answer(question, answer)
        yield example._replace(topic=nfc(turns[0][0])) if turns else example


def messages_in(row: Row, note: Note) -> list[Row]:
    for name in spell_out(row):
        note(AS_TEXT.format(name), 1)
    return read_messages(row)


def make_chat(note: Note, row: Row) -> list[Example]:
    """A chat as it is; one without a question or an answer has an empty side."""
    messages = messages_in(row, note)
    asked = [m["content"].strip() for m in messages if m["role"] == "user"]
    answers = [m for m in messages if m["role"] == "assistant"]
    if not (any(asked) and any(m["content"].strip() or "tool_calls" in m for m in answers)):
        return [EMPTY]
    question = nfc(next(filter(None, asked)))
    return [Example(question, question, {"messages": messages} | read_beside(row))]


def text_in(row: Row, name: str, note: Note) -> str:
    """The trimmed text of a column, "" where there is none; of several answers the first."""
    value = row.get(name)
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):  # SQuAD's answers
        value = value[0] if value else None
    if isinstance(value, dict) and (not value or "text" in value):
        value = value.get("text")
        if isinstance(value, list):
            value = value[0] if value else None
    if is_number(value):
        note(AS_TEXT.format(name), 1)
        value = as_text(value)
    if not isinstance(value, str | None):
        raise ValueError(f"the column {name} holds {str(value)[:50]}, not text")
    return (value or "").strip()


# --- Splitting ----------------------------------------------------------------------------------


def assign_split(topic: str, seed: int, shares: dict[str, float]) -> str:
    """The split of a topic by its hash, so that more rows do not move it; the rest is "train"."""
    drawn = int.from_bytes(digest(f"{seed} {topic}", 8), "big") / 2**64
    for split, share in shares.items():
        if drawn < share:
            return split
        drawn -= share
    return "train"


def digest(text: str, size: int = 16) -> bytes:
    """A short hash that stands for a text among all that have come before."""
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def select(
    files: list[tuple[Path, str]], args: argparse.Namespace, notes: Notes, counts: Counter
) -> Iterator[tuple[str, str]]:
    """The split and the line of each example that is neither empty nor a duplicate.

    Splits that no file is of are drawn from "train". `counts` takes what became of the examples.
    """
    shares = {k: v for k, v in args.shares.items() if k not in dict(files).values()}
    lines: set[bytes] = set()
    questions: dict[bytes, str] = {}
    taken = Counter()  # from each split of the source
    progress = tqdm(None, "Preparing", args.limit, False, unit=" examples", **bar_options())
    for file, source in files:
        examples = read_examples(file, args, notes)
        while taken[source] != args.limit and (read := next(examples, None)):
            progress.update()
            counts["read"] += 1
            example, line = read
            drawn = assign_split(example.topic, args.seed, shares)
            split = drawn if source == "train" else source
            key = digest(line)
            if not line:
                counts["empty"] += 1
            elif key in lines:
                counts["duplicate"] += 1
            elif questions.setdefault(digest(example.question), split) != split:
                counts["elsewhere"] += 1  # the question is in another split
            else:
                taken[source] += 1
                counts[split] += 1
                yield split, line
            lines.add(key)
    progress.close()


# --- The three sets -----------------------------------------------------------------------------


@contextmanager
def replace_sets(folder: Path, splits: list[str]) -> Iterator[dict[str, BinaryIO]]:
    """A stream for each of the splits; together they replace all sets when all is written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"{folder} cannot be made: {error.strerror}"
        raise UserError(f"the folder {why}; name another with --output") from None
    sets = {split: folder / f"{split}.jsonl" for split in SPLITS}
    with earlier_kept(folder, list(sets.values())):
        with atomic_write(*(sets[split] for split in splits)) as streams:
            yield dict(zip(splits, streams, strict=True))
        for split in set(SPLITS).difference(splits):
            sets[split].unlink(missing_ok=True)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for, and say what became of the rows."""
    source, output = Path(args.source), Path(args.output)
    files = sources.find_files(source)
    named = sources.own_splits(files) if args.keep_splits else [(file, "train") for file in files]
    if not args.keep_splits and len(names := dict.fromkeys(files.values())) > 1:
        warn(f"the splits {', '.join(names)} are pooled; --keep-splits keeps them apart")
    samples, notes, counts = [], {}, Counter()
    own = dict(named).values()
    wanted = [split for split in SPLITS if split in own or args.shares.get(split) != 0]
    with nullcontext() if args.dry_run else replace_sets(output, wanted) as streams:
        for split, line in select(named, args, notes, counts):
            if streams:
                streams[split].write(f"{line}\n".encode())
            if len(samples) < 3:
                samples.append(json.loads(line).get("text", line))
        print(
            f"Read {counts['read']} examples of {source}: dropped {counts['empty']} with an empty",
            f"side, {counts['duplicate']} exact duplicates,",
            f"{counts['elsewhere']} whose question is in another set.",
            flush=True,
        )
        written = ", ".join(f"{counts[split]} {split}" for split in wanted)
        if args.dry_run:
            print(f"Would write to {output}: {written}. The first of them:")
            print("", *samples, sep="\n---\n")
        if empty := [f"{split}.jsonl" for split in wanted if not counts[split]]:
            raise UserError(
                f"{source} leaves nothing for {', '.join(empty)}; take more rows or other fractions"
            )
        say(notes)
    if not args.dry_run:
        print(f"Wrote to {output}: {written}.")


def say(notes: Notes) -> None:
    """Warn of what the files have that is left out or was guessed; of those alike, once."""
    for remark, files in notes.items():
        first, *more = files
        times = f": {files.total()} in all" if files.total() else ""
        tell = hint if remark.startswith("read ") else warn  # how it was read is no loss
        tell(f"{first}{f' and {len(more)} more' if more else ''}: {remark}{times}")


def main() -> None:
    begin_process()
    args = parse_arguments()
    with raising_signals("nothing was written"):
        run(args)


if __name__ == "__main__":
    main()
