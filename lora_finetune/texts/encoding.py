"""Texts to token ids: whole, or only the start of a long text, with the ids of the whole."""

from __future__ import annotations

import os
import re
import unicodedata
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lora_finetune.base.errors import warn

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Encoding, Tokenizer


def encode(
    tokenizer: TokenizerWrapper, texts: list[str], templated: bool = False
) -> list[list[int]]:
    """The tokens of texts, without the end-of-text token that some tokenizers append.

    Texts of a chat template hold their special tokens already. To others the tokenizer may add one
    for the beginning of a text, but not to a text that is written with it. A fast tokenizer works
    in parallel.
    """
    if is_plain(tokenizer):
        ids = encode_plainly(tokenizer.backend_tokenizer, texts, templated)
    else:
        ids = [tokenizer.encode(text, add_special_tokens=not templated) for text in texts]
    if not templated:
        own, bos = tokenizer.encode("a"), tokenizer.bos_token_id
        if own[-1:] == [tokenizer.eos_token_id]:
            ids = [tokens[:-1] for tokens in ids]
        if own[:1] == [bos]:
            ids = [tokens[1:] if tokens[:2] == [bos, bos] else tokens for tokens in ids]
    return ids


def encode_plainly(backend: Tokenizer, texts: list[str], templated: bool) -> list[list[int]]:
    """The tokens of texts as `tokenizers` has them, with the special ones around them."""
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch_fast(texts, add_special_tokens=not templated)
    return [encoding.ids for encoding in encodings]


def is_plain(tokenizer: TokenizerWrapper) -> bool:
    """Whether a tokenizer does what the `tokenizers` library does, and nothing before that.

    mlx-lm and transformers have classes that change the text first, in an `encode` of their own.
    """
    from transformers import PreTrainedTokenizerBase  # not above: it takes a second

    return tokenizer.is_fast and tokenizer.encode.__func__ is PreTrainedTokenizerBase.encode


COMPARED = 2**18  # characters of a text


def warn_of_other_tokens(tokenizer: TokenizerWrapper, texts: list[str], templated: bool) -> None:
    """Say, once, where transformers makes other tokens of texts than tokenizer.json does."""
    as_built = getattr(tokenizer, "as_built", None)
    if as_built is None:
        return
    texts = [text[:COMPARED] for text in texts]
    if hasattr(as_built, "encode_batch_fast"):
        theirs = encode_plainly(as_built, texts, templated)
    else:
        theirs = [as_built.encode(text, add_special_tokens=not templated) for text in texts]
    if theirs != encode_plainly(tokenizer.backend_tokenizer, texts, templated):
        forget_what_was_built(tokenizer)
        warn(
            f"{Path(tokenizer.name_or_path) / 'tokenizer.json'} makes other tokens of these texts "
            f"than what transformers {version('transformers')} builds from it; the file's are "
            "taken here, and programs that use transformers' have others"
        )


def forget_what_was_built(tokenizer: TokenizerWrapper) -> None:
    """Free the memory of what transformers built, which is kept for comparing only."""
    tokenizer.as_built = None


def end_with_eos(ids: list[int], tokenizer: TokenizerWrapper, templated: bool) -> None:
    """Make tokens end in exactly one end-of-text token; a template's own serves as well.

    What a template puts after it, mostly a line end, is dropped.
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
    """How many tokens there are without the white space at their end."""
    end = len(ids)
    while end and not tokenizer.decode(ids[end - 1 : end]).strip():
        end -= 1
    return end


def tokens_before(
    tokenizer: TokenizerWrapper,
    texts: list[str],
    ids: list[list[int]],
    places: list[list[int]],
    templated: bool,
) -> list[list[int]]:
    """How many of the tokens of each text stand before each of some places in it.

    A token that goes on beyond a place is not before it.

    Args:
        ids: the first tokens of each text, all that count.
        places: in characters.
    """
    # The start of each text is encoded, to beyond its last place or beyond what its tokens cover.
    inner = [[p for p in some if p < len(text)] for text, some in zip(texts, places, strict=True)]
    ends = [
        LONGEST_WORD + min(max(some, default=0), max(SHORT, len(tokens) * CHARACTERS_PER_TOKEN))
        for some, tokens in zip(inner, ids, strict=True)
    ]
    encodings = [None] * len(texts)
    if is_plain(tokenizer) and any(inner):
        encodings = tokenizer.backend_tokenizer.encode_batch(
            [text[:end] for text, end in zip(texts, ends, strict=True)],
            add_special_tokens=not templated,
        )

    counts = []
    for text, end, tokens, encoding, some in zip(texts, ends, ids, encodings, places, strict=True):
        # As many tokens are the same in the encoding of the start.
        same = len(os.path.commonprefix([tokens, encoding.ids])) if encoding and some else 0
        counts.append([len(tokens)] * len(some))
        for i, place in enumerate(some):
            if place == len(text) or (place >= end and same == len(tokens)):
                continue  # all tokens are before it
            number = token_at(encoding, place) if same else None
            if number is None or (number >= same and same < len(tokens)):
                # The place is behind those tokens.
                [before] = encode_starts(tokenizer, [text[:place]], templated, len(tokens))
                number = len(os.path.commonprefix([tokens, before]))
            counts[-1][i] = min(number, len(tokens))
    return counts


def token_at(encoding: Encoding, place: int) -> int | None:
    """The first token that holds a character at a place or behind it; None where none is near."""
    tokens = map(encoding.char_to_token, range(place, place + LONGEST_WORD))
    return next((token for token in tokens if token is not None), None)


# --- The start of a long text -------------------------------------------------------------------

# A long text is cut after so many characters for each token that is wanted of it, more than most
# tokens have. WordPiece makes one unknown token of a word of more than LONGEST_WORD characters.
CHARACTERS_PER_TOKEN = 6
LONGEST_WORD = 100
SHORT = 2**16  # characters that may be tokenized without a thought of memory
# The last tokens of a part may be others in the whole text: some tokenizers look a little ahead,
# and some put a token at the end.
UNSURE_TOKENS = 8
# The end of a word that has a space and another word after it.
WORD_END = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


def encode_starts(
    tokenizer: TokenizerWrapper, texts: list[str], templated: bool, number: int
) -> list[list[int]]:
    """The tokens of each text as `encode` has them: all, or at least the first `number`.

    What is far beyond them is not tokenized, since that takes memory, hundreds of bytes a
    character.
    """
    least = LONGEST_WORD + number * CHARACTERS_PER_TOKEN
    ends = [word_end(tokenizer, text, least) for text in texts]
    parts = [text[:end] for text, end in zip(texts, ends, strict=True)]
    ids = encode(tokenizer, parts, templated)
    for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
        if end < len(text):
            del ids[i][-UNSURE_TOKENS:]
            if len(ids[i]) < number:
                ids[i] = encode_start(tokenizer, text, templated, number)
    return ids


def encode_start(tokenizer: TokenizerWrapper, text: str, templated: bool, number: int) -> list[int]:
    """As `encode_starts` for a single text, in longer and longer parts."""
    wanted = number + UNSURE_TOKENS
    least = LONGEST_WORD + wanted
    while least < len(text):
        if end := word_end(tokenizer, text, least):
            [tokens] = encode(tokenizer, [text[:end]], templated)
        else:
            tokens = shared_tokens(tokenizer, text, templated, least, wanted)
        if len(tokens) >= wanted:
            return tokens[:-UNSURE_TOKENS]
        least *= 2
    [tokens] = encode(tokenizer, [text], templated)
    return tokens


def word_end(tokenizer: TokenizerWrapper, text: str, least: int) -> int:
    """How many characters of a text, `least` or more, end where a token of it does for certain.

    That is at its end, and at the end of a word where no token goes beyond that.

    Returns:
        0 where no such place is near.
    """
    if len(text) <= least:
        return len(text)
    found = ends_tokens_with_words(tokenizer) and WORD_END.search(text, least, 2 * least)
    return found.end() if found else 0


@lru_cache(maxsize=1)
def ends_tokens_with_words(tokenizer: TokenizerWrapper) -> bool:
    """Whether no token goes on from a letter to a space.

    Either words are taken apart before they are made tokens, or no token of the vocabulary has a
    letter and then what stands for a space, " ", "▁" or "Ġ".
    """
    if not is_plain(tokenizer):
        return False
    backend, pieces = tokenizer.backend_tokenizer, "a b"
    if backend.normalizer:
        pieces = backend.normalizer.normalize_str(pieces)
    if backend.pre_tokenizer:
        pieces = "\n".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(pieces))
    if not (seen := re.search("a(.?)", pieces)):
        return False
    spaces = re.escape(" " + seen[1])
    # What is beyond ASCII may be a letter, or a byte of one.
    letter_and_space = re.compile(f"(?![{spaces}])[a-zA-Z\x80-\U0010ffff][{spaces}]")
    return not any(map(letter_and_space.search, tokenizer.get_vocab()))


def shared_tokens(
    tokenizer: TokenizerWrapper, text: str, templated: bool, least: int, number: int
) -> list[int]:
    """What the tokens of all parts of a text that end within a certain stretch of it begin with.

    The stretch is longer than any token, so some token of the whole text ends in it; and in BPE,
    Unigram and WordPiece a text has, up to where one of its tokens ends, the tokens of the part
    that ends there. So the whole text begins with what all those parts begin with.

    Returns:
        [] where that is fewer than `number`, or takes longer than to tokenize the whole text.
    """
    stretch = to_come = longest_token(tokenizer)
    if least * stretch > len(text):
        return []
    shared, previous = None, None
    for end in range(least, least + 4 * stretch):
        [tokens] = encode(tokenizer, [text[:end]], templated)
        shared = tokens if shared is None else os.path.commonprefix([shared, tokens])
        if len(shared) < number:
            return []
        # Characters of which any number may become a single one, or vanish, do not count.
        to_come -= tokens != previous and not joins(text[end])
        if not to_come:
            return shared
        previous = tokens
    return []


@lru_cache(maxsize=1)
def longest_token(tokenizer: TokenizerWrapper) -> int:
    """Characters of the longest token or word, or bytes."""
    return max(LONGEST_WORD, *map(len, tokenizer.get_vocab()))


def joins(character: str) -> bool:
    """Whether a character is of those that may become one with any number of others around it.

    Unicode composes and reorders marks and the parts of Hangul; tokenizers drop what is not to be
    seen, or make spaces of it, and a special token can take up the spaces around it.
    """
    return unicodedata.category(character)[0] in "MZC" or "\u1160" <= character <= "\u11ff"
