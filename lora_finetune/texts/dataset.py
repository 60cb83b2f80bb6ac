"""A JSON Lines file to examples, to tokens, to batches."""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_finetune.base.errors import UserError, abbreviated, is_unicode, warn
from lora_finetune.texts.chat import (
    Message,
    Template,
    read_messages,
    read_tools,
    type_name,
    up_to_answer,
)
from lora_finetune.texts.encoding import (
    encode,
    encode_starts,
    end_with_eos,
    forget_what_was_built,
    tokens_before,
    warn_of_other_tokens,
)
from lora_finetune.texts.formats import check_format, holds_rows, looks_like, parse_json

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The kinds of examples by their keys; the first that an object has counts, as in mlx-lm.
KINDS = (("prompt", "completion"), ("messages",), ("conversations",), ("text",))

# A text of a question and its answer, each below its heading.
QUESTION_HEADING, ANSWER_HEADING = "### 질문:", "### 답변:"
# All of a text of questions and answers but the last answer.
UP_TO_ANSWER = re.compile(rf"\s*{QUESTION_HEADING}.*\n{ANSWER_HEADING}\s*(?=\S)", re.DOTALL)

Entry = dict[str, Any]
# Tokens int32 (rows, width), and whether each is a target, bool (rows, width); where the model
# starts from hidden states, these too.
Batch = tuple[Any, ...]


@dataclass(frozen=True)
class File:
    """A JSON Lines file as it was read, once.

    Attributes:
        path: where it is.
        entries: the line number and the object of each line; `load` takes them out, so that no
            text is in memory twice.
        kind: "messages", "pairs" of prompt and completion, "questions" for texts most of which
            begin with ### 질문:, or "texts".
        checksum: the SHA-256 of its bytes.
    """

    path: Path
    entries: deque[tuple[int, Entry]]
    kind: str
    checksum: str

    def __len__(self) -> int:
        return len(self.entries)


def read(path: Path, mask_prompt: bool) -> File:
    """Read a JSON Lines file; a byte-order mark, Windows line ends and blank lines are ignored.

    Raises:
        UserError: no such file, one of another format, no lines in it, a line that `parse_line`
            refuses, or of another kind than the first; names the line.
    """
    entries, digest, first_kind, num_questions = deque(), hashlib.sha256(), None, 0
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
                num_questions += entry.get("text", "").lstrip().startswith(QUESTION_HEADING)
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}; prepare_lora_data.py makes it, or --data names another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        looks = "" if entries else looks_like(path)
        raise UserError(f"{path}, line {number}: {error}{looks}") from None
    if not entries:
        raise UserError(f"{path} holds no texts; write one in each line, or name another --data")
    kinds = {"messages": "messages", "prompt and completion": "pairs"}
    of_texts = "questions" if 2 * num_questions > len(entries) else "texts"
    return File(path, entries, kinds.get(first_kind, of_texts), digest.hexdigest())


def parse_line(line: bytes, mask_prompt: bool) -> Entry:
    """The object of one line of a JSON Lines file, with the keys of its kind alone, and "tools".

    Raises:
        ValueError: says what is wrong; with `mask_prompt`, also of a text without an answer.
    """
    entry = parse_json(line)
    if not isinstance(entry, dict):
        raise ValueError('is not a JSON object such as {"text": "…"}')
    filled = {key for key, value in entry.items() if value is not None}
    kinds = [keys for keys in KINDS if filled >= set(keys)]
    kinds = kinds or [keys for keys in KINDS if entry.keys() >= set(keys)]
    if not kinds:
        names = abbreviated(entry) or "nothing"
        if holds_rows(entry):
            each = "'.[][]'" if any(isinstance(v, list) for v in entry.values()) else "'.[]'"
            raise ValueError(
                f"is one object that holds others by their keys ({names}); write each of them in a "
                f"line of its own (jq -c {each} does)"
            )
        raise ValueError(
            f'has no "text", no "messages", and no "prompt" with a "completion"; it has {names}'
        )
    keys, tools = kinds[0], read_tools(entry.get("tools"))
    if keys in (("messages",), ("conversations",)):
        kept = {"messages": read_messages(entry)}
    else:
        kept = {key: entry[key] for key in keys}
        for key, value in kept.items():
            check_value(key, value)
    if mask_prompt and keys == ("text",) and not UP_TO_ANSWER.match(entry["text"]):
        raise ValueError(
            f'for --mask-prompt its "text" needs a "{QUESTION_HEADING}" and a "{ANSWER_HEADING}"'
        )
    kept |= {"tools": tools} if tools else {}
    if not is_unicode(json.dumps(kept, ensure_ascii=False)):
        raise ValueError("holds half a character, an unpaired surrogate")
    return kept


def check_value(key: str, value: object) -> None:
    """Raise ValueError where the value of a key cannot be trained on."""
    if not isinstance(value, str):
        raise ValueError(f'its "{key}" is not a string, but {type_name(value)}')
    if not value.strip():
        raise ValueError(f'its "{key}" is empty')


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
        answers: where the parts that the loss counts start and end, in characters; None where all
            of it counts.
        templated: whether a chat template made it, special tokens included.
        cut: whether the template left out part of a message.
        last_only: whether of several answers only the last could be found.
    """

    whole: str
    answers: list[tuple[int, int]] | None = None
    templated: bool = False
    cut: bool = False
    last_only: bool = False


def render(entry: Entry, template: Template | None, mask_prompt: bool) -> Text:
    """The text of an entry: messages go through the chat template.

    So do a prompt and a completion, as messages of a user and an assistant. Where there is no
    template, the completion follows its prompt directly.

    Raises:
        ValueError: there is no template for messages, or it does not take them.
    """
    if "text" in entry:
        whole = entry["text"]
        start = UP_TO_ANSWER.match(whole).end() if mask_prompt else 0
    elif "messages" in entry or template:
        return render_chat(as_messages(entry), entry.get("tools"), template, mask_prompt)
    else:
        whole, start = entry["prompt"] + entry["completion"], len(entry["prompt"])
    return Text(whole, [(start, len(whole))] if mask_prompt else None)


def as_messages(entry: Entry) -> list[Message]:
    """The messages of an entry; a prompt and its completion are those of user and assistant."""
    if "messages" in entry:
        return entry["messages"]
    return [
        {"role": "user", "content": entry["prompt"]},
        {"role": "assistant", "content": entry["completion"]},
    ]


def render_chat(
    messages: list[Message], tools: list[dict] | None, template: Template | None, mask_prompt: bool
) -> Text:
    """The text of messages, with all answers of the assistant; raises ValueError as `render`."""
    if not template:
        raise ValueError("this model has no chat template for messages; write a text instead")
    whole = template.render(messages, tools)
    cut = template.leaves_out(messages, tools, whole)
    answers, all_found = None, True
    if mask_prompt:
        # What follows the last answer does not count, and in some templates changes the answer.
        answered = up_to_answer(messages)
        if len(answered) < len(messages):
            whole = template.render(answered, tools)
        answers, all_found = template.find_answers(answered, tools, whole)
    return Text(whole, answers, True, cut, not all_found)


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
    forget_what_was_built(tokenizer)
    return examples


def text_length(asked: int, is_given: bool, positions: float) -> int:
    """What texts are cut to: --max-seq-length, or all positions that the model has embeddings for.

    Args:
        asked: --max-seq-length, by default or as given by hand.

    Raises:
        UserError: it was given, and is more than that.
    """
    if is_given and asked > positions:
        raise UserError(
            f"--max-seq-length {asked} is more than the {positions} positions that this model has "
            f"embeddings for; give at most {positions}"
        )
    return min(asked, positions)


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
        raise UserError(f"{path} has only texts of a single token, which leave nothing to predict")
    if examples.num_targets.max() < 1:
        raise UserError(f"{path} has no answer within {max_length} tokens (--max-seq-length)")
    if examples.num_truncated:
        lost = sum(examples.num_targets < 1)
        warn(
            f"{path}: {examples.num_truncated} of {len(examples)} texts were cut to "
            f"{max_length} tokens (--max-seq-length, or all that the model has positions for)"
            + (f"; {lost} of all texts have nothing left to learn from" if lost else "")
        )


def render_entries(file: File, tokenizer: TokenizerWrapper, mask_prompt: bool) -> Iterator[Text]:
    """Take the entries out of a file, as texts; warn once of what the template does not show.

    Raises:
        UserError: an entry cannot be rendered.
    """
    template = Template(tokenizer) if tokenizer.has_chat_template else None
    cut, last_only, total = [], [], len(file)
    while file.entries:
        number, entry = file.entries.popleft()
        try:
            text = render(entry, template, mask_prompt)
        except ValueError as error:
            raise UserError(f"{file.path}, line {number}: {error}") from None
        cut += [number] * text.cut
        last_only += [number] * text.last_only
        yield text
    if cut:
        warn(
            f"{file.path}: the model's chat template leaves out part of a message in {len(cut)} of "
            f"{total} texts, the first in line {cut[0]}"
        )
    if last_only:
        warn(
            f"{file.path}: of {len(last_only)} of {total} chats, the first in line {last_only[0]}, "
            "the model's chat template changes earlier messages when more follow, so --mask-prompt "
            "counts only the last answer of each"
        )


@dataclass(frozen=True)
class Examples:
    """Tokenized texts, one after the other in one array.

    Attributes:
        tokens: int32 (total number of tokens,).
        starts: int64 (number of texts + 1,): where each text starts, and where the last ends.
        is_target: bool (total number of tokens,): whether the loss counts a token; the first of a
            text never counts.
        num_truncated: how many of the texts were longer.
        max_length: what they were cut to, and the most inputs in a batch, padding included.
    """

    tokens: np.ndarray
    starts: np.ndarray
    is_target: np.ndarray
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
        """Tokens of each text that the loss counts, int64 (number of texts,)."""
        return np.diff(np.append(0, np.cumsum(self.is_target))[self.starts])

    def batch(self, rows: np.ndarray) -> Batch:
        """The given texts, padded on the right, as `loss` takes them.

        Returns:
            Tokens int32 (rows, width), and whether each is a target, bool (rows, width).
        """
        lengths = self.lengths[rows]
        shape = len(rows), padded_width(lengths, self.max_length)
        tokens, is_target = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, (start, length) in enumerate(zip(self.starts[rows], lengths, strict=True)):
            tokens[row, :length] = self.tokens[start : start + length]
            is_target[row, :length] = self.is_target[start : start + length]
        return tokens, is_target


# A fast tokenizer shares a chunk of texts out among the cores, and takes up to 500 bytes of memory
# for each character of it.
CHUNK_CHARACTERS = 2**18


def chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Texts in lists of about CHUNK_CHARACTERS characters together, or of a single longer text."""
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text.whole)
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
    tokens, starts, is_target, num_truncated = array("i"), array("q", [0]), bytearray(), 0
    for number, chunk in enumerate(chunks(texts)):
        templated = chunk[0].templated
        wholes = [text.whole for text in chunk]
        if number & (number - 1) == 0:  # 0, 1, 2, 4, 8 …: more would take longer than it tells
            warn_of_other_tokens(tokenizer, wholes, templated)
        chunk_ids = encode_starts(tokenizer, wholes, templated, max_length + 1)
        for ids, text in zip(chunk_ids, chunk, strict=True):
            if add_eos:
                longer = len(ids) > max_length
                end_with_eos(ids, tokenizer, templated)
                # Ends of text were taken off, and behind them the text may go on.
                if longer and len(ids) <= max_length:
                    ids[:] = encode(tokenizer, [text.whole], templated)[0]
                    end_with_eos(ids, tokenizer, templated)
            num_truncated += len(ids) > max_length
            del ids[min(max_length, len(ids)) :]
            tokens.extend(ids)
            starts.append(len(tokens))
        for marks in mark_targets(chunk, chunk_ids, tokenizer):
            is_target += marks
    return Examples(
        np.frombuffer(tokens, np.int32),
        np.frombuffer(starts, np.int64),
        np.frombuffer(is_target, bool),
        num_truncated,
        max_length,
    )


def mark_targets(
    texts: list[Text], ids: list[list[int]], tokenizer: TokenizerWrapper
) -> Iterator[bytes]:
    """For each token of each text 1 where the loss counts it, 0 where not.

    A token that holds the end of a prompt and the start of an answer counts; the first token of a
    text never does. A last answer takes in the end-of-text token behind it.
    """
    places = [[place for answer in text.answers or [] for place in answer] for text in texts]
    counts = tokens_before(tokenizer, [t.whole for t in texts], ids, places, texts[0].templated)
    for text, tokens, bounds in zip(texts, ids, counts, strict=True):
        marks = bytearray(len(tokens))
        if text.answers is None:
            bounds = [0, len(tokens)]
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            marks[start:end] = b"\1" * (end - start)
        marks[:1] = bytes(len(marks[:1]))
        yield marks


# --- Batches ------------------------------------------------------------------------------------


def padded_width(lengths: np.ndarray, max_inputs: float = math.inf) -> int:
    """The width of a batch of texts of these lengths; all tokens but the last are inputs."""
    return 1 + min(padded_length(max(1, max(lengths) - 1)), max_inputs)


def padded_length(length: int) -> int:
    """Round up to a multiple of 32, above 256 of 64, above 512 of 128 …; on a CPU of a quarter.

    Bucketing limits recompilation: the step is traced once for each width, and on a GPU its kernels
    are chosen anew, which takes seconds. On a CPU only the tracing is repeated, and padding costs
    more. It adds less than a quarter to a long text, and on a CPU less than a sixteenth.
    """
    import mlx.core as mx  # not above, since prepare_lora_data.py does without it

    step = max(32, 2 ** (int(length - 1).bit_length() - 3))
    step //= 4 if mx.default_device() == mx.cpu else 1
    return -(-length // step) * step


# Examples are sorted by length within this many batches: wide enough that a batch's lengths are
# nearly equal, small enough that its members change from epoch to epoch.
POOL_BATCHES = 50


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """A random order of batches of similar length, with each example in one of them.

    Returns:
        ceil(examples / batch size) arrays of example indices; at most one is short.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches = []
    for pool in np.split(order, range(0, len(order), POOL_BATCHES * batch_size)[1:]):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(0, len(pool), batch_size)[1:])
    return [batches[i] for i in rng.permutation(len(batches))]


def training_batches(
    examples: Examples,
    batch_size: int,
    seed: int,
    start: int,
    parts: int = 1,
    rank: int = 0,
    size: int = 1,
) -> Iterator[list[Batch]]:
    """The batches from iteration start + 1 on, endlessly; each depends on the seed alone.

    Args:
        parts: how many a batch comes in, as far as it has texts.
        rank, size: of each batch only the share of this one of so many processes comes.
    """
    per_epoch = math.ceil(len(examples) / batch_size)
    for epoch in count(start // per_epoch):
        batches = epoch_batches(examples.lengths, batch_size, seed, epoch)
        for rows in batches[start % per_epoch :]:
            share = shares(rows, examples.lengths[rows], size)[rank]
            yield [examples.batch(part) for part in split_batch(share, parts)]
        start = 0


def shares(rows: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """The texts of a batch shared out among processes, with as equal work as can be.

    The longest text first, each goes where the inputs, padding included, are then the fewest: no
    share has more than ceil(texts / size) texts of the longest length would have. Some are empty
    where there are fewer texts.

    Args:
        rows: the texts, of these lengths in tokens.
    """
    if size == 1:
        return [rows]
    members: list[list[int]] = [[] for _ in range(size)]
    for index in np.argsort(-lengths, kind="stable"):
        inputs = [(len(m) + 1) * padded_width(lengths[[*m[:1], index]]) for m in members]
        members[int(np.argmin(inputs))].append(index)
    return [rows[np.sort(np.array(m, np.int64))] for m in members]


def padding_share(
    lengths: np.ndarray, batch_size: int, seed: int, max_inputs: float = math.inf
) -> float:
    """The fraction of the model's inputs in the first epoch that is padding."""
    batches = epoch_batches(lengths, batch_size, seed, 0)
    inputs = sum(len(rows) * (padded_width(lengths[rows], max_inputs) - 1) for rows in batches)
    return 1 - (lengths - 1).sum() / inputs


def split_batch(rows: np.ndarray, parts: int) -> list[np.ndarray]:
    """The texts of a batch in so many parts, or fewer, of nearly the same size."""
    return np.array_split(rows, min(parts, len(rows))) if len(rows) else []


def evaluation_batches(
    examples: Examples, batch_size: int, num_batches: int, parts: int = 1
) -> list[np.ndarray]:
    """The first `num_batches` batches of examples (-1: all), sorted by length, each in parts."""
    number = len(examples) if num_batches == -1 else min(len(examples), num_batches * batch_size)
    order = np.argsort(examples.lengths[:number], kind="stable")
    batches = np.split(order, range(0, number, batch_size)[1:])
    return [part for batch in batches for part in split_batch(batch, parts)]
