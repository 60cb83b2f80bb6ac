"""JSON Lines to rows, each a text, a prompt and its completion, or messages; and rows to text."""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_finetune.base.errors import UserError, abbreviated, is_unicode, warn
from lora_finetune.texts.chat import Message, Template, read_messages, read_tools, type_name
from lora_finetune.texts.formats import check_format, looks_like, parse_json

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Row = dict[str, Any]

# The kinds of rows by their keys; the first that a row has counts, as in mlx-lm.
KINDS = (("prompt", "completion"), ("messages",), ("conversations",), ("text",))

# A text of a question and its answer, each below its heading.
QUESTION_HEADING, ANSWER_HEADING = "### 질문:", "### 답변:"
# Everything before the last answer of such a text.
UP_TO_ANSWER = re.compile(rf"\s*{QUESTION_HEADING}.*\n{ANSWER_HEADING}\s*(?=\S)", re.DOTALL)


def join_question(question: str, answer: str) -> str:
    return f"{QUESTION_HEADING}\n{question}\n\n{ANSWER_HEADING}\n{answer}"


def question_of(text: str) -> str:
    """The question in a text; all of a text that has no headings."""
    return text.removeprefix(QUESTION_HEADING).partition(f"\n{ANSWER_HEADING}")[0].strip()


# --- Reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A JSON Lines file as it was read, once.

    Attributes:
        rows: line numbers and rows; `render_rows` takes them out, to free their memory.
        kind: "messages", "pairs" of prompt and completion, "questions" where most texts begin with
            ### 질문:, or "texts".
        checksum: SHA-256 of its bytes.
    """

    path: Path
    rows: deque[tuple[int, Row]]
    kind: str
    checksum: str

    def __len__(self) -> int:
        return len(self.rows)


def read(path: Path, mask_prompt: bool) -> File:
    """Read a JSON Lines file; a byte-order mark, Windows line ends and blank lines are ignored.

    Raises:
        UserError: there is no such file, it has another format, no rows, or a line that
            `parse_row` refuses or that is of another kind than the first; names the line.
    """
    rows, digest, first_kind, num_questions = deque(), hashlib.sha256(), None, 0
    try:
        with path.open("rb") as lines:
            check_format(path)
            for number, line in enumerate(lines, 1):
                digest.update(line)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                row = parse_row(line, mask_prompt)
                kind = " and ".join(key for key in row if key != "tools")
                first_kind = first_kind or kind
                if kind != first_kind:
                    raise ValueError(f"has {kind}, but line {rows[0][0]} has {first_kind}")
                rows.append((number, row))
                num_questions += row.get("text", "").lstrip().startswith(QUESTION_HEADING)
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}; prepare_lora_data.py makes it, or --data names another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        looks = "" if rows else looks_like(path)
        raise UserError(f"{path}, line {number}: {error}{looks}") from None
    if not rows:
        raise UserError(f"{path} holds no texts; write one in each line, or name another --data")
    kinds = {"messages": "messages", "prompt and completion": "pairs"}
    kind = kinds.get(first_kind, "questions" if 2 * num_questions > len(rows) else "texts")
    return File(path, rows, kind, digest.hexdigest())


def parse_row(line: bytes, mask_prompt: bool) -> Row:
    """The row in a line, with "tools" and the keys of its kind alone.

    Raises:
        ValueError: says what is wrong; with `mask_prompt`, also a text without an answer.
    """
    found = parse_json(line)
    if not isinstance(found, dict):
        raise ValueError('is not a JSON object such as {"text": "…"}')
    filled = {key for key, value in found.items() if value is not None}
    kinds = [keys for named in (filled, set(found)) for keys in KINDS if named >= set(keys)]
    if not kinds:
        raise ValueError(
            'has no "text", no "messages", and no "prompt" with a "completion"; it has '
            + (abbreviated(found) or "nothing")
        )
    keys, tools = kinds[0], read_tools(found.get("tools"))
    if keys in (("messages",), ("conversations",)):
        row = {"messages": read_messages(found)}
    else:
        row = {key: found[key] for key in keys}
        for key, value in row.items():
            if not isinstance(value, str):
                raise ValueError(f'its "{key}" is not a string, but {type_name(value)}')
            if not value.strip():
                raise ValueError(f'its "{key}" is empty')
    if mask_prompt and keys == ("text",) and not UP_TO_ANSWER.match(row["text"]):
        raise ValueError(
            f'for --mask-prompt its "text" needs a "{QUESTION_HEADING}" and a "{ANSWER_HEADING}"'
        )
    row |= {"tools": tools} if tools else {}
    if not is_unicode(json.dumps(row, ensure_ascii=False)):
        raise ValueError("holds half a character, an unpaired surrogate")
    return row


# --- Text ---------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A row before tokenization.

    Attributes:
        answers: start and end, in characters, of what the loss counts; None: it counts all.
        templated: whether a chat template made it, special tokens included.
        is_cut: whether the template left out a field of a message, or some of one.
        last_only: whether of several answers only the last could be located.
    """

    whole: str
    answers: list[tuple[int, int]] | None = None
    templated: bool = False
    is_cut: bool = False
    last_only: bool = False


def render(row: Row, template: Template | None, mask_prompt: bool) -> Text:
    """The text of a row: chats go through the template, and prompts too where there is one.

    Raises:
        ValueError: there is no template for messages, or it does not take them.
    """
    if "messages" in row or (template and "prompt" in row):
        return render_chat(row, template, mask_prompt)
    if "text" in row:
        whole = row["text"]
        start = UP_TO_ANSWER.match(whole).end() if mask_prompt else 0
    else:
        whole, start = row["prompt"] + row["completion"], len(row["prompt"])
    return Text(whole, [(start, len(whole))] if mask_prompt else None)


def render_chat(row: Row, template: Template | None, mask_prompt: bool) -> Text:
    if not template:
        raise ValueError("this model has no chat template for messages; write a text instead")
    messages, tools = messages_of(row), row.get("tools")
    whole = template.render(messages, tools)
    is_cut = template.leaves_out(messages, tools, whole)
    if not mask_prompt:
        return Text(whole, None, True, is_cut)
    # What follows the last answer does not count, and in some templates changes the answer.
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError('for --mask-prompt it needs a message of the role "assistant"')
    if len(messages) < len(messages_of(row)):
        whole = template.render(messages, tools)
    answers, all_found = template.find_answers(messages, tools, whole)
    return Text(whole, answers, True, is_cut, not all_found)


def messages_of(row: Row) -> list[Message]:
    """The messages of a row; a prompt and its completion are a user's and the assistant's."""
    if "messages" in row:
        return row["messages"]
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def render_rows(file: File, tokenizer: TokenizerWrapper, mask_prompt: bool) -> Iterator[Text]:
    """Take the rows out of a file as texts; warn once of what the template does not show.

    Raises:
        UserError: a row cannot be rendered.
    """
    template = Template(tokenizer) if tokenizer.has_chat_template else None
    cut, last_only, total = [], [], len(file)
    while file.rows:
        number, row = file.rows.popleft()
        try:
            text = render(row, template, mask_prompt)
        except ValueError as error:
            raise UserError(f"{file.path}, line {number}: {error}") from None
        cut += [number] * text.is_cut
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
            "the model's chat template changes earlier messages when more follow, so --mask-prompt "
            "counts only the last answer of each"
        )
