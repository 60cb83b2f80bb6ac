"""A JSON Lines file to examples, to tokens, to batches."""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_finetune.command_line import UserError, first_line, is_unicode, warn

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


def read_entries(file: Path, mask_prompt: bool) -> Iterator[tuple[int, Entry]]:
    """The line number and the object of each line of a JSON Lines file.

    A byte-order mark, Windows line ends and blank lines are passed over. The file is read as the
    iterator goes, so that a large one takes no memory.

    Raises:
        UserError: no such file, none in it, a line that is no such object as `parse_line` takes,
            or of another kind than the first; names the line.
    """
    first = None
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                entry = parse_line(line, mask_prompt)
                kind = " and ".join(key for key in entry if key != "tools")
                first = first or (number, kind)
                if kind != first[1]:
                    raise ValueError(f"has {kind}, but line {first[0]} has {first[1]}")
                yield number, entry
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}, line {number}: {error}") from None
    if not first:
        raise UserError(f"{file} holds no texts")


def parse_json(line: bytes) -> object:
    """What a line of a JSON Lines file holds; raises ValueError that says what is wrong."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None


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
        raise ValueError('has no "text", no "messages", and no "prompt" with a "completion"')
    for key in keys:
        check_value(key, entry[key])
    if mask_prompt and keys == ("text",) and not UP_TO_ANSWER.match(entry["text"]):
        raise ValueError(
            f'for --mask-prompt its "text" needs a "{QUESTION_HEADING}" and a "{ANSWER_HEADING}"'
        )
    return {key: entry[key] for key in (*keys, "tools") if key in entry}


def check_value(key: str, value: object) -> None:
    """Raise ValueError where the value of a key cannot be trained on."""
    if key == "messages":
        if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
            raise ValueError('its "messages" are not a list of objects')
    elif not isinstance(value, str):
        raise ValueError(f'its "{key}" is not a string')
    if not value or not str(value).strip():
        raise ValueError(f'its "{key}" is empty')
    if not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f'its "{key}" holds half of a surrogate pair')


def join_question(question: str, answer: str) -> str:
    """The text of a question and its answer."""
    return f"{QUESTION_HEADING}\n{question}\n\n{ANSWER_HEADING}\n{answer}"


def question_of(text: str) -> str:
    """The question of a text; all of it where it is not made of a question and an answer."""
    return text.removeprefix(QUESTION_HEADING).partition(f"\n{ANSWER_HEADING}")[0].strip()


class Text(NamedTuple):
    """An example as it is tokenized.

    Attributes:
        whole: all of it.
        prompt: what of it comes before the answer that the loss counts; "" where all counts.
        templated: a chat template made it, special tokens included.
    """

    whole: str
    prompt: str = ""
    templated: bool = False


def read_texts(file: Path, tokenizer: TokenizerWrapper, mask_prompt: bool) -> Iterator[Text]:
    """The texts of a JSON Lines file; raises UserError as `read_entries` and `render` do."""
    for number, entry in read_entries(file, mask_prompt):
        try:
            text = render(entry, tokenizer, mask_prompt)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from None
        yield text


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
    except Exception as error:  # a template raises what it likes
        why = first_line(error)
        raise ValueError(f"the model's chat template does not take it: {why}") from None
    if not is_unicode(whole):
        raise ValueError("the model's chat template makes half of a surrogate pair of it")
    return Text(whole, prompt, templated=True)


def load_examples(
    files: dict[str, Path],
    numbers: dict[str, int],
    tokenizer: TokenizerWrapper,
    *,
    vocabulary: int,
    end: bool,
    mask_prompt: bool,
    max_length: int,
) -> dict[str, Examples]:
    """Tokenize the file of each split, which has so many texts, and say how many were cut.

    Raises:
        UserError: a text cannot be had from an entry, a token is none of the model's vocabulary,
            or a split leaves nothing to predict.
    """
    if end and files and tokenizer.eos_token_id is None:
        warn("the tokenizer has no end-of-text token, so texts end without one")
        end = False
    examples = {}
    for split, file in files.items():
        texts = read_texts(file, tokenizer, mask_prompt)
        texts = tqdm(texts, f"Tokenizing {file.name}", numbers[split], leave=False, disable=None)
        try:
            examples[split] = found = tokenize(texts, tokenizer, end, max_length)
            largest = found.tokens.max(initial=0)
        except OverflowError:  # no 32 bits hold it
            largest = math.inf
        if largest >= vocabulary:
            raise UserError(
                f"the tokenizer makes tokens of {file} up to number {largest}, and the model knows "
                f"only {vocabulary}: they do not belong together"
            )
        if found.lengths.max() < 2:
            raise UserError(f"{file} has only texts of a single token")
        if found.targets.max() < 1:
            raise UserError(f"{file} has no answer within {max_length} tokens (--max-seq-length)")
        if found.cut:
            lost = sum(found.prompts >= found.lengths)
            warn(
                f"{file}: {found.cut} of {len(found)} texts were cut to {max_length} tokens "
                "(--max-seq-length)" + (f", {lost} of them before the answer" if lost else "")
            )
    return examples


# --- Tokens and batches ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Tokenized texts, one after the other in one array.

    Attributes:
        tokens: int32 (total number of tokens,).
        starts: int64 (number of texts + 1,): where each text starts, and where the last ends.
        prompts: int32 (number of texts,): how many tokens at its start the loss does not count.
        cut: how many of the texts were longer.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray
    cut: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 (number of texts,)."""
        return np.diff(self.starts)

    @property
    def targets(self) -> np.ndarray:
        """Tokens of each text that the loss counts; the first never does."""
        return self.lengths - np.maximum(self.prompts, 1)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The given texts, padded on the right, as `loss` takes them.

        Returns:
            Tokens int32 (rows, width), lengths int32 (rows,), prompts int32 (rows,).
        """
        lengths = self.lengths[rows]
        tokens = np.zeros((len(rows), padded_width(lengths)), np.int32)
        for row, start, length in zip(tokens, self.starts[rows], lengths, strict=True):
            row[:length] = self.tokens[start : start + length]
        return tokens, lengths.astype(np.int32), self.prompts[rows]


# Texts are tokenized so many at a time: enough for a fast tokenizer to share out among the cores.
TOKENIZED_TEXTS = 1000


def tokenize(
    texts: Iterable[Text], tokenizer: TokenizerWrapper, end: bool, max_length: int
) -> Examples:
    """Tokenize texts and cut the longer ones to `max_length` tokens.

    With `end`, each ends in exactly one end-of-text token, unless it is cut. That which a chat
    template puts behind the last message serves, and what follows it, a line end mostly, goes.
    """
    texts = iter(texts)
    tokens, starts, prompts, too_long = array("i"), array("q", [0]), array("i"), 0
    while some := list(islice(texts, TOKENIZED_TEXTS)):
        for ids, prompt_ids, text in zip(
            encode(tokenizer, [text.whole for text in some], some[0].templated),
            encode(tokenizer, [text.prompt for text in some], some[0].templated),
            some,
            strict=True,
        ):
            if end:
                end_text(ids, tokenizer, text.templated)
            # A token that holds some of the prompt and some of the answer counts as answer.
            shared = len(os.path.commonprefix([ids, prompt_ids])) if text.prompt else 0
            too_long += len(ids) > max_length
            tokens.extend(ids[:max_length])
            starts.append(len(tokens))
            prompts.append(min(shared, max_length))
    return Examples(
        np.frombuffer(tokens, np.int32),
        np.frombuffer(starts, np.int64),
        np.frombuffer(prompts, np.int32),
        too_long,
    )


def encode(
    tokenizer: TokenizerWrapper, texts: list[str], templated: bool = False
) -> list[list[int]]:
    """The tokens of texts, without the end-of-text token that some tokenizers put behind each.

    A fast tokenizer does them in parallel. Those of a chat template have their special tokens.
    """
    from transformers import PreTrainedTokenizerBase  # not above: it takes a second

    # mlx-lm and transformers have classes that change the text first, in an `encode` of their own.
    plain = tokenizer.is_fast and tokenizer.encode.__func__ is PreTrainedTokenizerBase.encode
    if plain:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch_fast(texts, add_special_tokens=not templated)
        ids = [encoding.ids for encoding in encodings]
    else:
        ids = [tokenizer.encode(text, add_special_tokens=not templated) for text in texts]
    if not templated and tokenizer.encode("a")[-1:] == [tokenizer.eos_token_id]:
        ids = [tokens[:-1] for tokens in ids]
    return ids


def end_text(ids: list[int], tokenizer: TokenizerWrapper, templated: bool) -> None:
    """Make tokens end in exactly one end-of-text token; a template's own serves as well.

    What a template puts behind it, a line end mostly, goes.
    """
    if templated:
        end = len(ids)
        while end and not tokenizer.decode(ids[end - 1 : end]).strip():
            end -= 1
        if end and ids[end - 1] in tokenizer.eos_token_ids:
            del ids[end:]
            return
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    ids.append(tokenizer.eos_token_id)


def padded_width(lengths: np.ndarray) -> int:
    """The width of a batch of texts: all tokens but the last of each are inputs."""
    return 1 + padded_length(max(1, max(lengths) - 1))


def padded_length(length: int) -> int:
    """Round up to a multiple of 32, of 64 above 256, of 128 above 512, and so on.

    Few widths occur in this way, each within a quarter of its text's: the compiled step is traced
    anew for each, and on a GPU its kernels are chosen anew, which takes seconds.
    """
    step = max(32, 2 ** (int(length - 1).bit_length() - 3))
    return -(-length // step) * step


# Examples are sorted by length within this many batches: wide enough that a batch's lengths are
# nearly equal, small enough that its members change from epoch to epoch.
POOL_BATCHES = 50


def epoch_batches(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal each example out once, at random, into batches of like length in random order.

    Returns:
        ceil(examples / batch size) arrays of example numbers; one is short if need be.
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
    """The batches of iteration start + 1 and on, without end; each a pure function of the seed."""
    per_epoch = math.ceil(len(examples) / batch_size)
    for epoch in count(start // per_epoch):
        rng = np.random.default_rng([seed, epoch])
        batches = epoch_batches(examples.lengths, batch_size, rng)
        for rows in batches[start % per_epoch :]:
            yield examples.batch(rows)
        start = 0


def padding_share(lengths: np.ndarray, batch_size: int, seed: int) -> float:
    """The share of padding among the inputs of the model in the first epoch."""
    batches = epoch_batches(lengths, batch_size, np.random.default_rng([seed, 0]))
    inputs = sum(len(rows) * (padded_width(lengths[rows]) - 1) for rows in batches)
    return 1 - (lengths - 1).sum() / inputs


def evaluation_batches(examples: Examples, batch_size: int, num_batches: int) -> list[np.ndarray]:
    """The first `num_batches` batches of examples (-1: all), those of like length together."""
    number = len(examples) if num_batches == -1 else min(len(examples), num_batches * batch_size)
    order = np.argsort(examples.lengths[:number], kind="stable")
    return np.split(order, range(0, number, batch_size)[1:])
