"""Prompts, from the command line to tokens, in the form of the texts that an adapter learnt."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from lora_finetune.base.errors import UserError, hint, warn
from lora_finetune.texts import batching, dataset, tokenizing
from lora_finetune.texts.chat import Template

if TYPE_CHECKING:
    from lora_finetune.mlx_patches.loading import Limits

    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The formats: as it stands, as a user's message through the chat template, or as the question of a
# text with headings.
RAW, CHAT, QA = "raw", "chat", "qa"


class Prompt(NamedTuple):
    text: str  # what is printed of it
    tokens: list[int]
    max_tokens: int  # that may follow
    end_tokens: frozenset[int] = frozenset()  # end an answer, beside the tokenizer's own


def read(given: Iterable[str]) -> list[str]:
    """The prompts that were given; "-" stands for all of standard input."""
    return [read_standard_input() if prompt == "-" else prompt for prompt in given]


def read_standard_input() -> str:
    try:
        prompt = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("the prompt on standard input is not UTF-8") from None
    if not prompt.strip():
        raise UserError("standard input holds no prompt (--prompt -)")
    return prompt


def learnt_format(file: dataset.File, tokenizer: TokenizerWrapper) -> str:
    """The prompt format that goes with the texts of a data file."""
    if file.kind == "messages" or (
        file.kind == "prompt and completion" and tokenizer.has_chat_template
    ):
        return CHAT
    return QA if file.kind == "questions" else RAW


def choose_format(text: str, asked: str, learnt: str | None, tokenizer: TokenizerWrapper) -> str:
    """The format asked for; for "auto", chat where the adapter learnt chats, else raw."""
    if asked != "auto":
        return asked
    # A prompt that begins with a special token went through a template already.
    special = tuple(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    is_chat = learnt == CHAT and tokenizer.has_chat_template
    return CHAT if is_chat and not text.lstrip().startswith(special) else RAW


def encode(
    texts: list[str], asked: str, learnt: str | None, system: str | None,
    tokenizer: TokenizerWrapper, max_tokens: int, limits: Limits,
) -> list[Prompt]:  # fmt: skip
    """Tokenize prompts; max_tokens is cut to the positions that the model has left for each.

    `asked` is the format asked for, or "auto"; `learnt` the one that the adapter learnt, if known.
    """
    bare = [text for text in texts if dataset.QUESTION_HEADING not in text]
    if bare and asked == "auto" and learnt == QA:
        hint(
            f"the adapter learnt texts with {dataset.QUESTION_HEADING} and "
            f"{dataset.ANSWER_HEADING}, and the prompt has none; --prompt-format qa adds them"
        )
    prompts = []
    for text in texts:
        format = choose_format(text, asked, learnt, tokenizer)
        if system and format != CHAT:
            raise UserError("--system is for the chat form of a prompt (--prompt-format chat)")
        if format == QA:
            text = dataset.join_question(dataset.question_of(text), "")
        if format == CHAT:
            prompt = encode_chat(text, system, tokenizer, max_tokens)
        else:
            prompt = Prompt(text, encode_open(text, tokenizer), max_tokens)
        prompts.append(limit(prompt, limits))
    return prompts


def encode_chat(
    text: str, system: str | None, tokenizer: TokenizerWrapper, max_tokens: int
) -> Prompt:
    """A user's message, up to where training has the answer to it, and what ends that."""
    if not tokenizer.has_chat_template:
        raise UserError("this model has no chat template; give --prompt-format raw or qa, not chat")
    text, template = text.rstrip("\n"), Template(tokenizer)  # a line end is the shell's
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    # Any answer shows where it starts and ends: a generation prompt may differ from training.
    answered = [*messages, {"role": "assistant", "content": "a"}]
    try:
        whole = template.render(answered, None)
        template.leaves_out(answered, None, whole)
        start = template.find_start(messages, None, whole)
    except ValueError as error:
        raise UserError(f"the prompt in the chat form: {error}") from None
    [encoded] = tokenizing.encode(tokenizer, [whole], templated=True)
    last = encoded.ids[tokenizing.before_blanks(encoded.ids, tokenizer) - 1]
    added = tokenizer.added_tokens_decoder
    ends = frozenset([last]) if last in added and added[last].special else frozenset()
    return Prompt(text + "\n", encode_open(whole[:start], tokenizer, True), max_tokens, ends)


def encode_open(text: str, tokenizer: TokenizerWrapper, templated: bool = False) -> list[int]:
    """The tokens of a text that goes on.

    White space at the end may share a token with the word after it, which the model is to say.
    """
    tokenizing.warn_of_other_tokens(tokenizer, [text], templated)
    words = ("a", "가") if text[-1:].isspace() else ()
    whole, *others = tokenizing.encode(tokenizer, [text, *(text + w for w in words)], templated)
    return os.path.commonprefix([each.ids for each in others]) or whole.ids


def limit(prompt: Prompt, limits: Limits) -> Prompt:
    """A prompt with no more tokens to come than the model has positions for; see `encode`."""
    length, most = len(prompt.tokens), limits.max_positions
    if not length:
        raise UserError("the prompt holds no tokens; give a text that the tokenizer knows")
    tokenizing.check_tokens(prompt.tokens, limits.vocab_size, "the prompt")
    too_long = f"the prompt has {length} tokens, and the model {most} positions"
    if length >= most:
        raise UserError(f"{too_long}, which leaves none for a token after it; shorten the prompt")
    if most - length < prompt.max_tokens:
        warn(
            f"{too_long}, so at most {most - length} tokens are generated and not "
            f"{prompt.max_tokens} (--max-tokens)"
        )
    return prompt._replace(max_tokens=min(prompt.max_tokens, most - length))


def warn_beyond_context(
    examples: dict[str, batching.Examples], asked: list[Prompt], context_length: float
) -> None:
    """Warn where a text, or a prompt with its continuation, exceeds the model's context length."""
    lengths = [max(split.lengths) for split in examples.values()]
    lengths += [len(prompt.tokens) + prompt.max_tokens for prompt in asked]
    if max(lengths, default=0) > context_length:
        warn(
            f"the longest text, or the prompt with --max-tokens, has {max(lengths)} tokens, and "
            f"the model's context length is {context_length:.0f}; quality may degrade beyond: "
            "lower --max-seq-length or --max-tokens"
        )
