"""JSON Lines to rows, each a text, a prompt and its completion, or messages; and rows to text."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from lora_finetune.base.errors import UserError, abbreviated, first_line, hint, is_unicode, warn
from lora_finetune.base.files import file_checksum
from lora_finetune.texts.chat import Chat, Span, Template
from lora_finetune.texts.messages import (
    BESIDE,
    CHATS,
    REASONING,
    TURNS,
    Message,
    WrittenFloat,
    advice_on_contents,
    as_chat,
    is_learnt,
    read_beside,
    read_messages,
    spell_out,
)

Row = dict[str, Any]

# The kinds of rows by their keys; the first that a row has counts, as in mlx-lm.
KINDS = (TURNS, ("messages",), ("conversations",), ("text",))

# A text of a question and its answer, each below its heading.
QUESTION_HEADING, ANSWER_HEADING = "### 질문:", "### 답변:"
HEADINGS = re.compile(rf"^({QUESTION_HEADING}|{ANSWER_HEADING})\s*", re.MULTILINE)
# Everything before the last answer of such a text.
UP_TO_ANSWER = re.compile(rf"\s*{QUESTION_HEADING}.*\n{ANSWER_HEADING}\s*(?=\S)", re.DOTALL)


def join_question(question: str, answer: str) -> str:
    return f"{QUESTION_HEADING}\n{question}\n\n{ANSWER_HEADING}\n{answer}"


def question_of(text: str) -> str:
    """The question in a text; all of a text that has no headings."""
    return text.removeprefix(QUESTION_HEADING).partition(f"\n{ANSWER_HEADING}")[0].strip()


def below_headings(row: Row) -> Row:
    """A prompt and its completion as one text; ValueError where one has such a heading already."""
    if "prompt" not in row:
        return row
    if found := HEADINGS.search("\n".join(row.values())):
        raise ValueError(f"has {found[1]} in a question or an answer; --form messages takes it")
    return {"text": join_question(*row.values())}


def as_messages(row: Row) -> Row:
    """A prompt and its completion, or such a text, as a chat; ValueError where it is another."""
    if "messages" in row:
        return row
    said = list(row.values())
    if "text" in row:
        before, *parts = HEADINGS.split(row["text"])
        said, in_turns = parts[1::2], [QUESTION_HEADING, ANSWER_HEADING] * (len(parts) // 4)
        if before.strip() or not said or parts[::2] != in_turns:
            raise ValueError("is no text of questions and answers in turns; --form text is for it")
    turns = zip(("user", "assistant") * len(said), map(str.strip, said), strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# --- Reading ------------------------------------------------------------------------------------

# How files begin that are taken for others, and what to do with them.
FORMATS = {
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"PK\x03\x04": "a zip archive or an Excel file: unpack it, or save it as CSV",
    b"version https://git-lfs": "a Git LFS pointer to the file: `git lfs pull` fetches it",
    b"<": "a web page: download the file itself",
}
OTHER_FORMS = "prepare_lora_data.py converts other forms and encodings"


DECOMPOSED_HANGUL = re.compile("[\u1100-\u1112][\u1161-\u1175]")
DECOMPOSED = "decomposed Hangul, of six to nine times the tokens"

# What is said once of the lines of a file that are so.
NOTHING = (
    "have nothing to learn, since all that counts is marked with weight 0 or the like; they are "
    "left out"
)
NUMBERS = "have a number or a boolean in the place of a text, which is learnt as it is written"
APART = f"have {DECOMPOSED}; prepare_lora_data.py --normalize composes it"


@dataclass(frozen=True)
class File:
    """A JSON Lines file as it was read, once."""

    path: Path
    rows: deque[tuple[int, Row]]  # with line numbers; `render_rows` frees them one by one
    kind: str  # "messages", "prompt and completion", "text"; "questions" if all texts are such
    checksum: str  # SHA-256 of its bytes
    arguments: dict[str, Any]  # of the chat template, if all rows have the same


def read(path: Path, mask_prompt: bool) -> File:
    """Read a JSON Lines file; UserError says what is wrong, and in which line."""
    rows, first, first_kind, num_questions = deque(), 0, None, 0
    remarks: dict[str, list[int]] = {}
    try:
        check_format(path)
        # Bytes that are not UTF-8 become surrogates, which `parse_row` refuses.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
            for number, value in read_json_lines(path, lines):
                row, said = parse_row(value, mask_prompt)
                kind = " and ".join(key for key in row if key not in BESIDE)
                first, first_kind = (first, first_kind) if first_kind else (number, kind)
                if kind != first_kind:
                    raise ValueError(f"has {kind}, but line {first} has {first_kind}")
                for remark in said:
                    remarks.setdefault(remark, []).append(number)
                if NOTHING not in said:
                    rows.append((number, row))
                    num_questions += row.get("text", "").lstrip().startswith(QUESTION_HEADING)
        checksum = file_checksum(path)
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}; prepare_lora_data.py makes it, or --data names another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no texts; write one in each line, or name another --data")
    for remark, numbers in remarks.items():
        warn(f"{path}: {len(numbers)} texts, the first in line {numbers[0]}, {remark}")
    kind = "questions" if num_questions == len(rows) else first_kind
    arguments = [row.get("chat_template_kwargs", {}) for _, row in rows]
    same = all(each == arguments[0] for each in arguments)
    return File(path, rows, kind, checksum, arguments[0] if same else {})


def hold_out(train: File, held: list[str] | None) -> tuple[File, File, list[str]]:
    """One in twenty texts of a training file, at most 500, as validation texts.

    They are chosen by their hashes, equal ones together. A file of equal texts is both.

    Args:
        held: hashes of those that an earlier run held out, if there was one.

    Returns:
        What is left to train on, what is held out, and its hashes.
    """
    rows = [
        (blake2b(json.dumps(row).encode(), digest_size=8).hexdigest(), (number, row))
        for number, row in train.rows
    ]
    counts = Counter(digest for digest, _ in rows)
    chosen, room = counts.keys() & set(held or ()), min(max(1, len(rows) // 20), 500)
    if not chosen or len(chosen) == len(counts):
        chosen = set()
        for digest in sorted(counts):
            if counts[digest] <= room:
                chosen.add(digest)
                room -= counts[digest]
        chosen = chosen or {min(counts, key=counts.__getitem__)}
    valid = deque(row for digest, row in rows if digest in chosen)
    rest = deque(row for digest, row in rows if digest not in chosen) or train.rows
    hint(
        f"there is no {train.path.with_name('valid.jsonl')}, so {len(valid)} of the {len(rows)} "
        "texts in train.jsonl, chosen by their hashes, are for validation"
        + (" too" if rest is train.rows else ", held out of training")
    )
    return replace(train, rows=rest), replace(train, rows=valid), sorted(chosen)


def check_format(path: Path) -> None:
    """Raise UserError where a file is of a format that neither script reads."""
    with path.open("rb") as stream:
        start = stream.read(100)
    for begin, what in FORMATS.items():
        if start.startswith(begin):
            raise UserError(f"{path} looks like {what}")


def read_json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not blank; UserError names a line if wrong."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_float=WrittenFloat)
        except (ValueError, RecursionError) as error:  # too long a number, or too deep
            why = first_line(error)
            if isinstance(error, json.JSONDecodeError):
                why = f"{error.msg}: character {error.colno}"
            other = f"; {OTHER_FORMS}" if number == 1 else ""
            raise UserError(f"{path}, line {number}: is not JSON: {why}{other}") from None
        yield number, value


def parse_row(found: object, mask_prompt: bool) -> tuple[Row, list[str]]:
    """The row in a line's value, with the keys of its kind alone, and what is to be said of it.

    ValueError says what is wrong.
    """
    if not isinstance(found, dict):
        raise ValueError(f'is not a JSON object such as {{"text": "…"}}; {OTHER_FORMS}')
    said = [NUMBERS] * bool(spell_out(found))
    found = as_chat(found, mask_prompt)
    named = {key for key, value in found.items() if value is not None}
    keys = next((keys for keys in KINDS if named >= set(keys)), None)
    if not keys:
        raise ValueError(
            'has no "text", no "messages", and no "prompt" with a "completion"; it has '
            f"{abbreviated(found) or 'nothing'}{advice_on_contents(found) or f'; {OTHER_FORMS}'}"
        )
    if keys[0] in CHATS:
        row = {"messages": read_messages(found)}
        check_answers(row["messages"])
    else:
        row = {key: found[key] for key in keys}
        for key, value in row.items():
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f'its "{key}" is not a text, but {value!r:.50}')
    if mask_prompt and "text" in row and not UP_TO_ANSWER.match(row["text"]):
        raise ValueError(
            f'for --mask-prompt its "text" needs a "{QUESTION_HEADING}" and a "{ANSWER_HEADING}"'
        )
    row |= read_beside(found)
    whole = json.dumps(row, ensure_ascii=False)
    if not is_unicode(whole):
        raise ValueError("is not UTF-8, or has half of a surrogate pair; save the file as UTF-8")
    said += [APART] * bool(DECOMPOSED_HANGUL.search(whole))
    return row, said + [NOTHING] * is_skipped(row, mask_prompt)


def check_answers(messages: list[Message]) -> None:
    """Raise ValueError where an assistant says, thinks and calls nothing."""
    for number, message in enumerate(messages, 1):
        said = [str(message.get(key) or "") for key in ("content", *REASONING, "tool_calls")]
        if message["role"] == "assistant" and not any(map(str.strip, said)):
            raise ValueError(f"message {number} of its messages: the assistant's is empty")


def is_skipped(row: Row, mask_prompt: bool) -> bool:
    """Whether all messages of a row that would count are marked as not to be learnt."""
    counting = [m for m in row.get("messages", []) if not mask_prompt or m["role"] == "assistant"]
    return bool(counting) and not any(map(is_learnt, counting))


# --- Text ---------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A row before tokenization."""

    whole: str
    answers: list[Span] | None = None  # what the loss counts, in characters; None: all
    templated: bool = False  # made by a chat template, special tokens included
    left_out: tuple[str, ...] = ()  # fields of messages, and tools, that the template left out
    last_only: bool = False  # of several answers only the last could be located


def render(row: Row, template: Template | None, mask_prompt: bool) -> Text:
    """The text of a row; messages, and prompts where there is one, go through the template."""
    messages = row.get("messages")
    if template and "prompt" in row:
        prompt = {"role": "user", "content": row["prompt"]}
        messages = [prompt, {"role": "assistant", "content": row["completion"]}]
    if messages:
        chat = Chat(messages, row.get("tools"), row.get("chat_template_kwargs", {}))
        return render_chat(chat, template, mask_prompt)
    if "text" in row:
        whole = row["text"]
        start = UP_TO_ANSWER.match(whole).end() if mask_prompt else 0
    else:
        whole, start = row["prompt"] + row["completion"], len(row["prompt"])
    return Text(whole, [(start, len(whole))] if mask_prompt else None)


def render_line(
    path: Path, number: int, row: Row, template: Template | None, mask_prompt: bool
) -> Text:
    """As `render`; UserError names the line."""
    try:
        return render(row, template, mask_prompt)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}") from None


def render_chat(chat: Chat, template: Template | None, mask_prompt: bool) -> Text:
    if not template:
        raise ValueError("this model has no chat template for messages; write a text instead")
    whole = template.render(chat)
    left_out = tuple(template.left_out(chat, whole))
    if not mask_prompt:
        others = [i for i, message in enumerate(chat.messages) if not is_learnt(message)]
        spans = [template.find_whole(chat, whole, number) for number in others]
        if None in spans:
            raise ValueError(
                f"message {others[spans.index(None)] + 1} is not to be learnt, and the model's "
                "chat template does not let its place in the text be found; leave the text out"
            )
        return Text(whole, between(spans, len(whole)) if spans else None, True, left_out)
    # What follows the last answer does not count, and in some templates changes the answer.
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError('for --mask-prompt it needs a message of the role "assistant"')
    if len(chat.messages) > answers[-1] + 1:
        chat = chat.until(answers[-1] + 1)
        whole = template.render(chat)
    learnt = [i for i in answers if is_learnt(chat.messages[i])]
    spans = [
        # What is said beside a call some templates put behind the answer to it.
        (template.find_whole if "tool_calls" in chat.messages[number] else template.find)(
            chat, whole, number
        )
        for number in learnt
    ]
    found = [span for span in spans if span]
    if not found:
        raise ValueError("no answer's place is sure in what the model's chat template makes of it")
    if len(found) < len(spans):
        return Text(whole, found[-1:], True, left_out, last_only=True)
    return Text(whole, found, True, left_out)


def between(spans: list[Span], length: int) -> list[Span]:
    """The rest of a text of that length, without some of its parts."""
    edges = [0, *(edge for span in spans for edge in span), length]
    return list(zip(edges[::2], edges[1::2], strict=True))


def render_rows(file: File, template: Template | None, mask_prompt: bool) -> Iterator[Text]:
    """Take the rows out of a file as texts; warn once of what the template does not show."""
    cut, last_only, total = [], [], len(file.rows)
    while file.rows:
        number, row = file.rows.popleft()
        text = render_line(file.path, number, row, template, mask_prompt)
        cut += [number] * bool(text.left_out)
        last_only += [number] * text.last_only
        yield text
    if cut:
        warn(
            f"{file.path}: the model's chat template cuts or drops a message in {len(cut)} of "
            f"{total} texts, the first in line {cut[0]}"
        )
    if last_only:
        warn(
            f"{file.path}: in {len(last_only)} of {total} chats, the first in line {last_only[0]}, "
            "the places of some answers cannot be found in what the model's chat template makes of "
            "it, so --mask-prompt counts only the last that can"
        )
