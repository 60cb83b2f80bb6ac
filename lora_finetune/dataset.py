"""A JSON Lines file to examples, to tokens, to batches."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_finetune.command_line import UserError, abbreviated, first_line, is_unicode, warn
from lora_finetune.encoding import encode, encode_starts, end_with_eos

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The kinds of examples by their keys; the first that an object has counts, as in mlx-lm.
KINDS = (("prompt", "completion"), ("messages",), ("text",))

# A text of a question and its answer, each below its heading.
QUESTION_HEADING, ANSWER_HEADING = "### 질문:", "### 답변:"
# All of a text of questions and answers but the last answer.
UP_TO_ANSWER = re.compile(rf"\s*{QUESTION_HEADING}.*\n{ANSWER_HEADING}\s*(?=\S)", re.DOTALL)

Entry = dict[str, Any]


@dataclass(frozen=True)
class File:
    """A JSON Lines file as it was read, once.

    Attributes:
        path: where it is.
        entries: the line number and the object of each line; `load` takes them out, so that no
            text is in memory twice.
        checksum: the SHA-256 of its bytes.
    """

    path: Path
    entries: deque[tuple[int, Entry]]
    checksum: str

    def __len__(self) -> int:
        return len(self.entries)


def read(path: Path, mask_prompt: bool) -> File:
    """Read a JSON Lines file; a byte-order mark, Windows line ends and blank lines are ignored.

    Raises:
        UserError: no such file, one of another format, no lines in it, a line that `parse_line`
            refuses, or of another kind than the first; names the line.
    """
    entries, digest, first_kind = deque(), hashlib.sha256(), None
    try:
        with path.open("rb") as lines:
            check_format(path, lines.peek())
            for number, line in enumerate(lines, 1):
                digest.update(line)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                entry = parse_line(line, mask_prompt)
                kind = " and ".join(key for key in entry if key != "tools")
                first_kind = first_kind or kind
                if kind != first_kind:
                    raise ValueError(f"has {kind}, but line {entries[0][0]} has {first_kind}")
                entries.append((number, entry))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        looks = "" if entries else looks_like(path)
        raise UserError(f"{path}, line {number}: {error}{looks}") from None
    if not entries:
        raise UserError(f"{path} holds no texts")
    return File(path, entries, digest.hexdigest())


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


def parse_line(line: bytes, mask_prompt: bool) -> Entry:
    """The object of one line of a JSON Lines file, with the keys of its kind alone, and "tools".

    Raises:
        ValueError: says what is wrong; with `mask_prompt`, also of a text without an answer.
    """
    entry = parse_json(line)
    if not isinstance(entry, dict):
        raise ValueError('is not a JSON object such as {"text": "…"}')
    for keys in KINDS:
        if entry.keys() >= set(keys):
            break
    else:
        names = abbreviated(entry) or "nothing"
        if holds_rows(entry):
            raise ValueError(
                f"is one object that holds others by their keys ({names}); write each of them in a "
                "line of its own (jq -c '.[]' does)"
            )
        raise ValueError(
            f'has no "text", no "messages", and no "prompt" with a "completion"; it has {names}'
        )
    for key in keys:
        check_value(key, entry[key])
    if mask_prompt and keys == ("text",) and not UP_TO_ANSWER.match(entry["text"]):
        raise ValueError(
            f'for --mask-prompt its "text" needs a "{QUESTION_HEADING}" and a "{ANSWER_HEADING}"'
        )
    return {key: entry[key] for key in (*keys, "tools") if key in entry}


def holds_rows(entry: Entry) -> bool:
    """Whether an object holds lists and objects alone, as a whole data set in one object does."""
    return bool(entry) and all(isinstance(value, dict | list) for value in entry.values())


def check_value(key: str, value: object) -> None:
    """Raise ValueError where the value of a key cannot be trained on."""
    if key == "messages":
        if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
            raise ValueError('its "messages" are not a list of objects')
    elif not isinstance(value, str):
        found = {dict: ", but an object", list: ", but a list"}.get(type(value), "")
        raise ValueError(f'its "{key}" is not a string{found}')
    if not value or not str(value).strip():
        raise ValueError(f'its "{key}" is empty')
    if not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f'its "{key}" holds an unpaired surrogate')


def join_question(question: str, answer: str) -> str:
    """The text of a question and its answer."""
    return f"{QUESTION_HEADING}\n{question}\n\n{ANSWER_HEADING}\n{answer}"


def question_of(text: str) -> str:
    """The question of a text; all of it where it is not made of a question and an answer."""
    return text.removeprefix(QUESTION_HEADING).partition(f"\n{ANSWER_HEADING}")[0].strip()


class Text(NamedTuple):
    """An example before tokenization.

    Attributes:
        whole: all of it.
        prompt: its start that the loss leaves out; "" where all of it counts.
        templated: whether a chat template made it, special tokens included.
    """

    whole: str
    prompt: str = ""
    templated: bool = False


def render(entry: Entry, tokenizer: TokenizerWrapper, mask_prompt: bool) -> Text:
    """The text of an entry: messages go through the tokenizer's chat template.

    So do a prompt and a completion, as messages of a user and an assistant. Where there is no
    template, the completion follows its prompt directly.

    Raises:
        ValueError: there is no template for messages, or it does not take them.
    """
    if "text" in entry:
        up_to_answer = UP_TO_ANSWER.match(entry["text"]) if mask_prompt else None
        return Text(entry["text"], up_to_answer[0] if up_to_answer else "")
    if "messages" in entry:
        messages = entry["messages"]
    elif tokenizer.has_chat_template:
        messages = [
            {"role": "user", "content": entry["prompt"]},
            {"role": "assistant", "content": entry["completion"]},
        ]
    else:
        prompt = entry["prompt"]
        return Text(prompt + entry["completion"], prompt if mask_prompt else "")
    if not tokenizer.has_chat_template:
        raise ValueError("this model has no chat template for messages; write a text instead")
    apply = partial(tokenizer.apply_chat_template, tools=entry.get("tools"), tokenize=False)
    try:
        whole, prompt = apply(messages), ""
        if mask_prompt and messages[:-1]:
            answers = messages[-1].get("role") == "assistant"
            prompt = apply(messages[:-1], add_generation_prompt=answers)
    except Exception as error:  # a template may raise anything
        why = first_line(error)
        raise ValueError(f"the model's chat template does not take it: {why}") from None
    if not is_unicode(whole):
        raise ValueError("the model's chat template makes an unpaired surrogate of it")
    return Text(whole, prompt, templated=True)


# --- Tokens -------------------------------------------------------------------------------------


def load(
    files: dict[str, File],
    tokenizer: TokenizerWrapper,
    vocabulary_size: int,
    add_eos: bool,
    mask_prompt: bool,
    max_length: int,
) -> dict[str, Examples]:
    """Tokenize the file of each split, and warn of truncated texts.

    Raises:
        UserError: an entry cannot be rendered, a token is not in the model's vocabulary, or a
            split leaves nothing to predict.
    """
    if add_eos and files and tokenizer.eos_token_id is None:
        warn("the tokenizer has no end-of-text token, so texts end without one")
        add_eos = False
    examples = {}
    for split, file in files.items():
        texts = render_entries(file, tokenizer, mask_prompt)
        bar = tqdm(texts, f"Tokenizing {file.path.name}", len(file), leave=False, disable=None)
        try:
            examples[split] = tokenized = tokenize(bar, tokenizer, add_eos, max_length)
            ends = [tokenized.tokens.min(initial=0), tokenized.tokens.max(initial=0)]
        except OverflowError:  # a token does not fit 32 bits
            ends = [math.inf]
        check_tokens(ends, vocabulary_size, file.path)
        check_lengths(tokenized, file.path, max_length)
    return examples


def check_tokens(tokens: Iterable[float], vocabulary_size: int, source: object) -> None:
    """Raise UserError where a model does not have a token that was made of a text."""
    for token in tokens:
        if not 0 <= token < vocabulary_size:
            raise UserError(
                f"token {token} of {source} is outside the model's vocabulary of "
                f"{vocabulary_size}: tokenizer and model do not match; download the model again"
            )


def check_lengths(examples: Examples, path: Path, max_length: int) -> None:
    """Warn of truncated texts; raise UserError where nothing is left to predict."""
    if examples.lengths.max() < 2:
        raise UserError(f"{path} has only texts of a single token")
    if examples.num_targets.max() < 1:
        raise UserError(f"{path} has no answer within {max_length} tokens (--max-seq-length)")
    if examples.num_truncated:
        lost = sum(examples.num_targets < 1)
        warn(
            f"{path}: {examples.num_truncated} of {len(examples)} texts were cut to "
            f"{max_length} tokens (--max-seq-length, or all that the model has positions for)"
            + (f", {lost} of them before the answer" if lost else "")
        )


def render_entries(file: File, tokenizer: TokenizerWrapper, mask_prompt: bool) -> Iterator[Text]:
    """Take the entries out of a file, one by one, as texts; raises UserError for bad ones."""
    while file.entries:
        number, entry = file.entries.popleft()
        try:
            yield render(entry, tokenizer, mask_prompt)
        except ValueError as error:
            raise UserError(f"{file.path}, line {number}: {error}") from None


@dataclass(frozen=True)
class Examples:
    """Tokenized texts, one after the other in one array.

    Attributes:
        tokens: int32 (total number of tokens,).
        starts: int64 (number of texts + 1,): where each text starts, and where the last ends.
        prompt_lengths: int32 (number of texts,): tokens at the start of each that are no targets.
        num_truncated: how many of the texts were longer.
        max_length: what they were cut to, and the most inputs in a batch, padding included.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    num_truncated: int = 0
    max_length: float = math.inf

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 (number of texts,)."""
        return np.diff(self.starts)

    @property
    def num_targets(self) -> np.ndarray:
        """Tokens of each text that the loss counts; the first never does."""
        return self.lengths - np.maximum(self.prompt_lengths, 1)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The given texts, padded on the right, as `loss` takes them.

        Returns:
            Tokens int32 (rows, width), lengths and prompt lengths int32 (rows,).
        """
        lengths = self.lengths[rows]
        tokens = np.zeros((len(rows), padded_width(lengths, self.max_length)), np.int32)
        for row, start, length in zip(tokens, self.starts[rows], lengths, strict=True):
            row[:length] = self.tokens[start : start + length]
        return tokens, lengths.astype(np.int32), self.prompt_lengths[rows]


# A fast tokenizer shares a chunk of texts out among the cores, and takes up to 500 bytes of memory
# for each character of it.
CHUNK_CHARACTERS = 2**18


def chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Texts in lists of about CHUNK_CHARACTERS characters together, or of a single longer text."""
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text.whole) + len(text.prompt)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def tokenize(
    texts: Iterable[Text], tokenizer: TokenizerWrapper, add_eos: bool, max_length: int
) -> Examples:
    """Tokenize texts and truncate them to `max_length` tokens.

    With `add_eos`, each ends in exactly one end-of-text token, unless it is truncated. The one
    that a chat template puts after the last message serves, and what follows it is dropped.
    """
    tokens, starts, prompt_lengths, num_truncated = array("i"), array("q", [0]), array("i"), 0
    for chunk in chunks(texts):
        templated = chunk[0].templated
        for ids, prompt_ids, text in zip(
            encode_starts(tokenizer, [text.whole for text in chunk], templated, max_length + 1),
            encode_starts(tokenizer, [text.prompt for text in chunk], templated, max_length),
            chunk,
            strict=True,
        ):
            if add_eos:
                longer = len(ids) > max_length
                end_with_eos(ids, tokenizer, templated)
                if longer and len(ids) <= max_length:  # a long run of ends: up to where?
                    [ids] = encode(tokenizer, [text.whole], templated)
                    end_with_eos(ids, tokenizer, templated)
            # A token that holds the end of the prompt and the start of the answer is a target.
            shared = len(os.path.commonprefix([ids, prompt_ids])) if text.prompt else 0
            num_truncated += len(ids) > max_length
            tokens.extend(ids[:max_length])
            starts.append(len(tokens))
            prompt_lengths.append(min(shared, max_length))
    return Examples(
        np.frombuffer(tokens, np.int32),
        np.frombuffer(starts, np.int64),
        np.frombuffer(prompt_lengths, np.int32),
        num_truncated,
        max_length,
    )


# --- Batches ------------------------------------------------------------------------------------


def padded_width(lengths: np.ndarray, max_inputs: float = math.inf) -> int:
    """The width of a batch of texts of these lengths; all tokens but the last are inputs."""
    return 1 + min(padded_length(max(1, max(lengths) - 1)), max_inputs)


def padded_length(length: int) -> int:
    """Round up to a multiple of 32, of 64 above 256, of 128 above 512, and so on.

    Bucketing limits recompilation: the step is traced once for each width, and on a GPU its kernels
    are chosen anew, which takes seconds. Padding adds less than a quarter to a long text.
    """
    step = max(32, 2 ** (int(length - 1).bit_length() - 3))
    return -(-length // step) * step


# Examples are sorted by length within this many batches: wide enough that a batch's lengths are
# nearly equal, small enough that its members change from epoch to epoch.
POOL_BATCHES = 50


def epoch_batches(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """A random order of batches of similar length, with each example in one of them.

    Returns:
        ceil(examples / batch size) arrays of example indices; at most one is short.
    """
    order = rng.permutation(len(lengths))
    batches = []
    for pool in np.split(order, range(0, len(order), POOL_BATCHES * batch_size)[1:]):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(0, len(pool), batch_size)[1:])
    return [batches[i] for i in rng.permutation(len(batches))]


def training_batches(
    examples: Examples, batch_size: int, seed: int, start: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The batches from iteration start + 1 on, endlessly; each depends on the seed alone."""
    per_epoch = math.ceil(len(examples) / batch_size)
    for epoch in count(start // per_epoch):
        rng = np.random.default_rng([seed, epoch])
        batches = epoch_batches(examples.lengths, batch_size, rng)
        for rows in batches[start % per_epoch :]:
            yield examples.batch(rows)
        start = 0


def padding_share(
    lengths: np.ndarray, batch_size: int, seed: int, max_inputs: float = math.inf
) -> float:
    """The fraction of the model's inputs in the first epoch that is padding."""
    batches = epoch_batches(lengths, batch_size, np.random.default_rng([seed, 0]))
    inputs = sum(len(rows) * (padded_width(lengths[rows], max_inputs) - 1) for rows in batches)
    return 1 - (lengths - 1).sum() / inputs


def evaluation_batches(examples: Examples, batch_size: int, num_batches: int) -> list[np.ndarray]:
    """The first `num_batches` batches of examples (-1: all), sorted by length."""
    number = len(examples) if num_batches == -1 else min(len(examples), num_batches * batch_size)
    order = np.argsort(examples.lengths[:number], kind="stable")
    return np.split(order, range(0, number, batch_size)[1:])
