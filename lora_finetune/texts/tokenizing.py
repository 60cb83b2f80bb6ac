"""Texts to tokens, and which of them the loss counts."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_finetune.base.errors import UserError, bar_options, warn
from lora_finetune.texts.batching import Examples
from lora_finetune.texts.chat import Template
from lora_finetune.texts.dataset import File, Text, render_rows

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer


class Encoded(NamedTuple):
    ids: list[int]
    ends: list[int] | None = None  # where each token ends, in characters, where that is known


def encode(
    tokenizer: TokenizerWrapper, texts: list[str], templated: bool = False, with_ends: bool = False
) -> list[Encoded]:
    """The tokens of texts, without the end-of-text token that some tokenizers append.

    A chat template has written its special tokens. To other texts the tokenizer may add one for
    their beginning, but not where a text is written with it. A fast tokenizer works in parallel.
    """
    # mlx-lm and transformers have classes that change the text first, in an `encode` of their own.
    is_plain = tokenizer.is_fast and tokenizer.encode.__func__ is PreTrainedTokenizerBase.encode
    found = encode_plainly(
        tokenizer.backend_tokenizer if is_plain else tokenizer, texts, templated, with_ends
    )
    if templated:
        return found
    own, bos = tokenizer.encode("a"), tokenizer.bos_token_id
    last = -1 if own[-1:] == [tokenizer.eos_token_id] else None
    for i, (ids, ends) in enumerate(found):
        first = 1 if own[:1] == [bos] and ids[:2] == [bos, bos] else 0
        found[i] = Encoded(ids[first:last], ends and ends[first:last])
    return found


def encode_plainly(
    tokenizer: Tokenizer | TokenizerWrapper, texts: list[str], templated: bool, with_ends=False
) -> list[Encoded]:
    """As `encode`, with all special tokens that the tokenizer puts around a text."""
    special = not templated
    if not hasattr(tokenizer, "encode_batch_fast"):
        return [Encoded(tokenizer.encode(text, add_special_tokens=special)) for text in texts]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if not with_ends:  # in half the time
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        return [Encoded(each.ids) for each in found]
    found = tokenizer.encode_batch(texts, add_special_tokens=special)
    return [Encoded(each.ids, [end for _, end in each.offsets]) for each in found]


# A long text is cut after so many characters for each token that is wanted of it, more than most
# tokens have: tokenizing takes hundreds of bytes of memory for each character.
CHARACTERS_PER_TOKEN = 6
# The last tokens before the cut may be others in the whole text. WordPiece has a single one for a
# word of more than 100 characters, and up to 100 for less of it.
UNSURE_TOKENS = 128


def encode_starts(
    tokenizer: TokenizerWrapper, texts: list[str], templated: bool, number: int, with_ends: bool
) -> list[Encoded]:
    """The tokens of each text: all, or the first `number` and at least UNSURE_TOKENS more."""
    wanted = number + UNSURE_TOKENS
    size = wanted * CHARACTERS_PER_TOKEN
    found = encode(tokenizer, [text[:size] for text in texts], templated, with_ends)
    for i, text in enumerate(texts):
        end = size
        while len(found[i].ids) < wanted and end < len(text):
            end *= 8
            [found[i]] = encode(tokenizer, [text[:end]], templated, with_ends)
    return found


def end_with_eos(ids: list[int], tokenizer: TokenizerWrapper, templated: bool) -> None:
    """Make tokens end in exactly one end-of-text token.

    A template's own serves as well; what follows it, mostly a line end, is dropped.
    """
    if templated:
        end = before_blanks(ids, tokenizer)
        if end and ids[end - 1] in tokenizer.eos_token_ids:
            del ids[end:]
            return
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    ids.append(tokenizer.eos_token_id)


def before_blanks(ids: list[int], tokenizer: TokenizerWrapper) -> int:
    """The number of tokens without the white space at their end."""
    end = len(ids)
    while end and not tokenizer.decode(ids[end - 1 : end]).strip():
        end -= 1
    return end


def warn_of_other_tokens(tokenizer: TokenizerWrapper, texts: list[str], templated: bool) -> None:
    """Say, once, where transformers makes other tokens of texts than tokenizer.json does."""
    as_built = getattr(tokenizer, "as_built", None)
    if as_built is None:
        return
    texts = [text[:10_000] for text in texts]
    ours = encode_plainly(tokenizer.backend_tokenizer, texts, templated)
    if encode_plainly(as_built, texts, templated) != ours:
        tokenizer.as_built = None
        warn(
            f"{Path(tokenizer.name_or_path) / 'tokenizer.json'} makes other tokens of these texts "
            f"than what transformers {version('transformers')} builds from it; the file's are "
            "taken here, and programs that use transformers' have others"
        )


# --- Examples -----------------------------------------------------------------------------------

CHUNK_CHARACTERS = 2**18  # tokenized at a time, on all cores


def chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Lists of texts of about CHUNK_CHARACTERS together."""
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
    """Tokenize texts, with one end-of-text token if `add_eos`, and cut them to `max_length`."""
    tokens, starts, is_target, num_truncated = array("I"), array("q", [0]), bytearray(), 0
    for chunk in chunks(texts):
        wholes, templated = [text.whole for text in chunk], chunk[0].templated
        if len(starts) < 1000:
            warn_of_other_tokens(tokenizer, wholes, templated)
        masked = any(text.answers is not None for text in chunk)
        encoded = encode_starts(tokenizer, wholes, templated, max_length + 1, masked)
        for text, (ids, ends) in zip(chunk, encoded, strict=True):
            if add_eos and len(ids) <= max_length + UNSURE_TOKENS:  # else it is truncated anyway
                end_with_eos(ids, tokenizer, templated)
            num_truncated += len(ids) > max_length
            del ids[max_length:]
            tokens.extend(ids)
            starts.append(len(tokens))
            is_target += mark_targets(text, Encoded(ids, ends), tokenizer).tobytes()
    return Examples(
        np.frombuffer(tokens, np.int32),
        np.frombuffer(starts, np.int64),
        np.frombuffer(is_target, bool),
        num_truncated,
        max_length,
    )


def mark_targets(text: Text, encoded: Encoded, tokenizer: TokenizerWrapper) -> np.ndarray:
    """Which of the first tokens of a text the loss counts, bool (tokens,); never the first one.

    A token that holds the end of a prompt and the start of an answer counts, and so does the
    end-of-text token behind a last answer.
    """
    is_target = np.full(len(encoded.ids), text.answers is None)
    for start, end in text.answers or []:
        first, last = (tokens_before(at, text, encoded, tokenizer) for at in (start, end))
        is_target[first:last] = True
    is_target[:1] = False
    return is_target


def tokens_before(place: int, text: Text, encoded: Encoded, tokenizer: TokenizerWrapper) -> int:
    """How many of the first tokens of a text end at or before a place in it, in characters."""
    if place == len(text.whole):
        return len(encoded.ids)
    if encoded.ends is not None:
        return min(bisect_right(encoded.ends, place), len(encoded.ids))
    [before] = encode(tokenizer, [text.whole[:place]], text.templated)
    return len(os.path.commonprefix([encoded.ids, before.ids]))


def load(
    files: dict[str, File], tokenizer: TokenizerWrapper, template: Template | None,
    vocabulary_size: int, add_eos: bool, mask_prompt: bool, max_length: int,
) -> dict[str, Examples]:  # fmt: skip
    """Tokenize the file of each split; UserError says what cannot be trained on."""
    if add_eos and files and tokenizer.eos_token_id is None:
        warn("the tokenizer has no end-of-text token, so texts end without one")
        add_eos = False
    examples, first = {}, next(iter(files), None)
    for split, file in files.items():
        texts = render_rows(file, template, mask_prompt)
        name, number = f"Tokenizing {file.path.name}", len(file.rows)
        bar = tqdm(texts, name, number, leave=False, **bar_options())
        examples[split] = tokenize(bar, tokenizer, add_eos, max_length)
        held_out = split != first and file.path == files[first].path
        if held_out and not examples[split].num_targets.any():
            warn(f"what is held out of {file.path} has nothing to learn, so all is validated on")
            examples[split] = examples[first]
        check_tokens(examples[split].tokens, vocabulary_size, file.path)
        check_lengths(examples[split], file.path, max_length)
    tokenizer.as_built = None  # for comparing only
    return examples


def check_tokens(tokens: np.ndarray, vocabulary_size: int, source: object) -> None:
    """Raise UserError where the model lacks a token."""
    for token in np.min(tokens, initial=0), np.max(tokens, initial=0):
        if not 0 <= token < vocabulary_size:
            raise UserError(
                f"token {token} of {source} is outside the model's vocabulary of "
                f"{vocabulary_size}: tokenizer and model do not match; download the model again"
            )


def check_lengths(examples: Examples, path: Path, max_length: int) -> None:
    """Warn of truncated texts; raise UserError where nothing is left to predict."""
    lost = sum(examples.num_targets < 1)
    if lost == len(examples):
        raise UserError(
            f"{path} leaves nothing to predict within {max_length} tokens (--max-seq-length)"
        )
    if examples.num_truncated:
        warn(
            f"{path}: {examples.num_truncated} of {len(examples)} texts were cut to "
            f"{max_length} tokens (--max-seq-length, or all that the model has positions for)"
            + (f"; {lost} of all texts have nothing left to learn from" if lost else "")
        )
