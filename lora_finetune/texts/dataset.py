"""JSON Lines to rows, each a text, a prompt and its completion, or messages; and rows to text."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_finetune.base.errors import UserError, abbreviated, first_line, is_unicode, warn
from lora_finetune.base.files import file_checksum
from lora_finetune.texts.chat import Message, Template, read_messages, read_tools

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

# How files begin that are taken for others, and what to do with them.
FORMATS = {
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"PK\x03\x04": "a zip archive or an Excel file: unpack it, or save it as CSV",
    b"version https://git-lfs": "a Git LFS pointer to the file: `git lfs pull` fetches it",
    b"<": "a web page: download the file itself",
}
OTHER_FORMS = "prepare_lora_data.py converts other forms and encodings"


@dataclass(frozen=True)
class File:
    """A JSON Lines file as it was read, once."""

    path: Path
    rows: deque[tuple[int, Row]]  # with line numbers; `render_rows` frees them one by one
    kind: str  # "messages", "prompt and completion", "text"; "questions" if most texts are such
    checksum: str  # SHA-256 of its bytes


def read(path: Path, mask_prompt: bool) -> File:
    """Read a JSON Lines file; UserError says what is wrong, and in which line."""
    rows, first_kind, num_questions = deque(), None, 0
    try:
        check_format(path)
        # Bytes that are not UTF-8 become surrogates, which `parse_row` refuses.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
            for number, value in read_json_lines(path, lines):
                row = parse_row(value, mask_prompt)
                kind = " and ".join(key for key in row if key != "tools")
                first_kind = first_kind or kind
                if kind != first_kind:
                    raise ValueError(f"has {kind}, but line {rows[0][0]} has {first_kind}")
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
    kind = "questions" if 2 * num_questions > len(rows) else first_kind
    return File(path, rows, kind, checksum)


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
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # too long a number, or too deep
            why = first_line(error)
            if isinstance(error, json.JSONDecodeError):
                why = f"{error.msg}: character {error.colno}"
            other = f"; {OTHER_FORMS}" if number == 1 else ""
            raise UserError(f"{path}, line {number}: is not JSON: {why}{other}") from None
        yield number, value


def parse_row(found: object, mask_prompt: bool) -> Row:
    """The row in a line's value, with the keys of its kind alone; ValueError says what is wrong."""
    if not isinstance(found, dict):
        raise ValueError(f'is not a JSON object such as {{"text": "…"}}; {OTHER_FORMS}')
    named = {key for key, value in found.items() if value is not None}
    keys = next((keys for keys in KINDS if named >= set(keys)), None)
    if not keys:
        raise ValueError(
            'has no "text", no "messages", and no "prompt" with a "completion"; it has '
            f"{abbreviated(found) or 'nothing'}; {OTHER_FORMS}"
        )
    if keys in (("messages",), ("conversations",)):
        row = {"messages": read_messages(found)}
    else:
        row = {key: found[key] for key in keys}
        for key, value in row.items():
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f'its "{key}" is not a text, but {value!r:.50}')
    if mask_prompt and "text" in row and not UP_TO_ANSWER.match(row["text"]):
        raise ValueError(
            f'for --mask-prompt its "text" needs a "{QUESTION_HEADING}" and a "{ANSWER_HEADING}"'
        )
    if tools := read_tools(found.get("tools")):
        row["tools"] = tools
    if not is_unicode(json.dumps(row, ensure_ascii=False)):
        raise ValueError("is not UTF-8, or has half of a surrogate pair; save the file as UTF-8")
    return row


# --- Text ---------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A row before tokenization."""

    whole: str
    answers: list[tuple[int, int]] | None = None  # what the loss counts, in characters; None: all
    templated: bool = False  # made by a chat template, special tokens included
    is_cut: bool = False  # the template left out a field of a message, or some of one
    last_only: bool = False  # of several answers only the last could be located


def render(row: Row, template: Template | None, mask_prompt: bool) -> Text:
    """The text of a row; messages, and prompts where there is one, go through the template."""
    messages = row.get("messages")
    if template and "prompt" in row:
        prompt = {"role": "user", "content": row["prompt"]}
        messages = [prompt, {"role": "assistant", "content": row["completion"]}]
    if messages:
        return render_chat(messages, row.get("tools"), template, mask_prompt)
    if "text" in row:
        whole = row["text"]
        start = UP_TO_ANSWER.match(whole).end() if mask_prompt else 0
    else:
        whole, start = row["prompt"] + row["completion"], len(row["prompt"])
    return Text(whole, [(start, len(whole))] if mask_prompt else None)


def render_chat(
    messages: list[Message], tools: list[dict] | None, template: Template | None, mask_prompt: bool
) -> Text:
    if not template:
        raise ValueError("this model has no chat template for messages; write a text instead")
    whole = template.render(messages, tools)
    is_cut = template.leaves_out(messages, tools, whole)
    if not mask_prompt:
        return Text(whole, None, True, is_cut)
    # What follows the last answer does not count, and in some templates changes the answer.
    ends = [end for end, m in enumerate(messages, 1) if m["role"] == "assistant"]
    if not ends:
        raise ValueError('for --mask-prompt it needs a message of the role "assistant"')
    if ends[-1] < len(messages):
        messages = messages[: ends[-1]]
        whole = template.render(messages, tools)
    answers, all_found = template.find_answers(messages, tools, whole)
    return Text(whole, answers, True, is_cut, not all_found)


def render_rows(file: File, tokenizer: TokenizerWrapper, mask_prompt: bool) -> Iterator[Text]:
    """Take the rows out of a file as texts; warn once of what the template does not show."""
    template = Template(tokenizer) if tokenizer.has_chat_template else None
    cut, last_only, total = [], [], len(file.rows)
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
