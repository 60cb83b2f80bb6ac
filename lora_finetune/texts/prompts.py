"""Prompts, from the command line to tokens, in the form of the texts that an adapter learnt."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from lora_finetune.base.errors import UserError, hint, warn
from lora_finetune.texts import dataset, encoding
from lora_finetune.texts.chat import Template

import numpy as np

if TYPE_CHECKING:
    from lora_finetune.mlx_patches.loading import Limits

    from mlx_lm.tokenizer_utils import TokenizerWrapper


class Prompt(NamedTuple):
    """What to continue.

    Attributes:
        text: what is printed of it, up to the answer.
        tokens: its token ids.
        max_tokens: how many more there may be at most.
        end_tokens: token ids that end an answer, beside those that the tokenizer has for it.
    """

    text: str
    tokens: list[int]
    max_tokens: int
    end_tokens: frozenset[int] = frozenset()


# --- Reading ------------------------------------------------------------------------------------


def read(given: Iterable[str]) -> list[str]:
    """The prompts that were given; "-" stands for all of standard input.

    Raises:
        UserError: there is nothing in it, or no UTF-8.
    """
    prompts = [read_standard_input() if prompt == "-" else prompt for prompt in given]
    if any("\\n" in prompt and "\n" not in prompt for prompt in prompts):
        hint(
            r"\n in the prompt is a backslash and an n, not the end of a line; in most shells "
            r"--prompt $'…\n…' has one, or --prompt - takes the prompt from standard input"
        )
    return prompts


def read_standard_input() -> str:
    if sys.stdin.isatty():
        hint("type the prompt, then Ctrl-D in a line of its own")
    try:
        prompt = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("the prompt on standard input is not UTF-8") from None
    if not prompt.strip():
        raise UserError("standard input holds no prompt (--prompt -)")
    return prompt


# --- The form -----------------------------------------------------------------------------------

# How a prompt can be put: as it stands, as a user's message through the chat template, or as the
# question of a text of question and answer.
RAW, CHAT, QA = "raw", "chat", "qa"


def learnt_format(file: dataset.File, tokenizer: TokenizerWrapper) -> str:
    """The form of a prompt that goes with the texts of a data file."""
    if file.kind == "messages" or (file.kind == "pairs" and tokenizer.has_chat_template):
        return CHAT
    return QA if file.kind == "questions" else RAW


def choose_format(text: str, asked: str, learnt: str | None, tokenizer: TokenizerWrapper) -> str:
    """The form to put a prompt in: the one asked for, where that is not "auto".

    Otherwise chat where the adapter learnt chats, but not for a prompt that begins with a special
    token and so went through a template already; else raw.
    """
    if asked != "auto":
        return asked
    special = tuple(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    is_chat = learnt == CHAT and tokenizer.has_chat_template
    return CHAT if is_chat and not text.lstrip().startswith(special) else RAW


def encode(
    texts: list[str],
    asked: str,
    learnt: str | None,
    system: str | None,
    tokenizer: TokenizerWrapper,
    max_tokens: int,
    limits: Limits,
) -> list[Prompt]:
    """Prompts as tokens, with no more to come than the model has positions for.

    Args:
        asked: the form asked for, or "auto".
        learnt: the form that the adapter learnt, None where nothing tells.
        system: a system message for the chat form.

    Raises:
        UserError: the form does not suit the model, or a prompt has no tokens, some that the model
            does not have, or too many.
    """
    prompts, hinted = [], False
    if texts and learnt == CHAT and asked == "auto" and not tokenizer.has_chat_template:
        warn(
            "the adapter learnt chats, but this model has no chat template; the prompt goes in raw"
        )
    for text in texts:
        format = choose_format(text, asked, learnt, tokenizer)
        if system and format != CHAT:
            raise UserError("--system is for the chat form of a prompt (--prompt-format chat)")
        if asked == "auto" and learnt == QA and dataset.QUESTION_HEADING not in text and not hinted:
            hint(
                f"the adapter learnt texts with {dataset.QUESTION_HEADING} and "
                f"{dataset.ANSWER_HEADING}, and the prompt has none; --prompt-format qa adds them"
            )
            hinted = True
        prompt = encode_one(text, format, system, tokenizer, max_tokens)
        prompts.append(limit(prompt, limits))
    return prompts


def encode_one(
    text: str, format: str, system: str | None, tokenizer: TokenizerWrapper, max_tokens: int
) -> Prompt:
    """A prompt in one of the forms, with the tokens that training has at the same place."""
    if format == RAW:
        tokens = encode_raw(text, tokenizer)
        return Prompt(text, tokens, max_tokens)
    if format == QA:
        question = dataset.question_of(text)
        example = dataset.render({"text": dataset.join_question(question, ANSWER)}, None, True)
        shown = example.whole[: example.answers[0][0]]
        return Prompt(shown, tokens_of_prompt(example, tokenizer)[0], max_tokens)
    if not tokenizer.has_chat_template:
        raise UserError("this model has no chat template; give --prompt-format raw or qa, not chat")
    text = text.rstrip("\n")  # a line end is the shell's or the pipe's
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
    try:
        example = dataset.render({"messages": messages}, Template(tokenizer), True)
    except ValueError as error:
        raise UserError(f"the prompt in the chat form: {error}") from None
    tokens, rest = tokens_of_prompt(example, tokenizer)
    return Prompt(text + "\n", tokens, max_tokens, end_tokens(rest, tokenizer))


# Stands for the answer where a prompt is made as training makes it.
ANSWER = "a"


def tokens_of_prompt(
    example: dataset.Text, tokenizer: TokenizerWrapper
) -> tuple[list[int], list[int]]:
    """The tokens of an example up to its answer, and the rest."""
    examples = dataset.tokenize([example], tokenizer, add_eos=False, max_length=math.inf)
    tokens, first = examples.tokens.tolist(), int(np.argmax(examples.is_target))
    return tokens[:first], tokens[first:]


def end_tokens(answer: list[int], tokenizer: TokenizerWrapper) -> frozenset[int]:
    """The special token that the template ends an answer with, if it does."""
    last = answer[encoding.before_blanks(answer, tokenizer) - 1]
    added = tokenizer.added_tokens_decoder
    return frozenset([last]) if last in added and added[last].special else frozenset()


def encode_raw(text: str, tokenizer: TokenizerWrapper) -> list[int]:
    """The tokens of a prompt as it stands.

    In most vocabularies a space belongs to the token of the word after it, so a space at the end
    of the prompt is left for the model to say.
    """
    encoding.warn_of_other_tokens(tokenizer, [text], False)
    [tokens] = encoding.encode(tokenizer, [text])
    if text.endswith(" "):
        continued = encoding.encode(tokenizer, [text + word for word in ("a", "가")])
        tokens = os.path.commonprefix([tokens, *continued]) or tokens
    return tokens


def limit(prompt: Prompt, limits: Limits) -> Prompt:
    """A prompt with no more tokens to come than the model has positions for; see `encode`."""
    if not prompt.tokens:
        raise UserError("the prompt holds no tokens; give a text that the tokenizer knows")
    dataset.check_tokens(prompt.tokens, limits.vocab_size, "the prompt")
    length, room = len(prompt.tokens), limits.max_positions - len(prompt.tokens)
    if room < 1:
        raise UserError(
            f"the prompt has {length} tokens, and the model {limits.max_positions} positions, "
            "which leaves none for a token after it; shorten the prompt"
        )
    if room < prompt.max_tokens:
        warn(
            f"the prompt has {length} tokens, and the model {limits.max_positions} positions, "
            f"so at most {room} tokens are generated and not {prompt.max_tokens} (--max-tokens)"
        )
    return prompt._replace(max_tokens=min(prompt.max_tokens, room))
