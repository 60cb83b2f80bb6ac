"""Prompts, from the command line to tokens, in the form of the texts that an adapter learnt."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import islice, takewhile
from typing import TYPE_CHECKING, NamedTuple

from lora_finetune.base.errors import UserError, hint, warn
from lora_finetune.texts import batching, dataset, tokenizing
from lora_finetune.texts.chat import Chat, Template

if TYPE_CHECKING:
    from lora_finetune.mlx_patches.loading import Limits

    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The formats: as it stands, as a user's message through the chat template, or as the question of a
# text with headings.
RAW, CHAT, QA = "raw", "chat", "qa"
NAMES = {CHAT: "messages of a chat", QA: f"questions below {dataset.QUESTION_HEADING}"}


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


def own_template(learnt: str | None, tokenizer: TokenizerWrapper) -> str | None:
    """A chat template of the form of questions below headings, for a model that learnt those."""
    if learnt != QA:
        return None
    [plain] = tokenizing.encode(tokenizer, [dataset.QUESTION_HEADING])
    added = tokenizer.added_tokens_decoder
    first = takewhile(lambda i: i in added and added[i].special, plain.ids)
    start = "".join(tokenizer.convert_ids_to_tokens(list(first)))
    # Some tokenizers put a space before a text, but not behind their own first token.
    texts = [f"{start} {dataset.QUESTION_HEADING}"]
    is_spaced = tokenizing.encode(tokenizer, texts, templated=True) == [plain]
    return (
        start
        + " " * is_spaced
        + "{% for m in messages %}{% if m.role == 'assistant' %}"
        + f"{dataset.ANSWER_HEADING}\n"
        + "{{ m.content }}{{ eos_token }}\n\n{% else %}"
        + "{% if m.role == 'user' %}"
        + f"{dataset.QUESTION_HEADING}\n"
        + "{% endif %}{{ m.content | trim }}\n\n{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}"
        + f"{dataset.ANSWER_HEADING}\n"
        + "{% endif %}"
    )


def example(file: dataset.File) -> str:
    """A prompt, in one line, for a model that learnt texts like those of a file: a short one."""
    questions = (" ".join(asked_in(row).split()) for _, row in islice(file.rows, 100))
    by_length = sorted(filter(None, questions), key=len)
    return min(by_length, key=lambda text: "'" in text, default="")  # it is to be quoted


def asked_in(row: dataset.Row) -> str:
    """What stands before the answer in a row; of a text without one, its first words."""
    if "messages" in row:
        asked = [m["content"] for m in row["messages"] if m["role"] == "user"]
        return (asked or [row["messages"][0]["content"]])[0].strip()
    text = row.get("prompt") or row["text"]
    if "prompt" in row or text.lstrip().startswith(dataset.QUESTION_HEADING):
        return dataset.question_of(text.strip())
    return " ".join(text.split()[:3])


def choose_format(text: str, asked: str, learnt: str | None, tokenizer: TokenizerWrapper) -> str:
    """The format asked for; for "auto" that of the texts that the adapter learnt, or raw."""
    if asked != "auto":
        return asked
    if learnt == QA and dataset.QUESTION_HEADING not in text:
        return QA
    # A prompt that begins with a special token went through a template already.
    special = tuple(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    is_chat = learnt == CHAT and tokenizer.has_chat_template
    return CHAT if is_chat and not text.lstrip().startswith(special) else RAW


def encode(
    texts: list[str], asked: str, learnt: str | None, system: str | None,
    tokenizer: TokenizerWrapper, template: Template | None, max_tokens: int, limits: Limits,
) -> list[Prompt]:  # fmt: skip
    """Tokenize prompts; max_tokens is cut to the positions that the model has left for each.

    `asked` is the format asked for, or "auto"; `learnt` the one that the adapter learnt, if known.
    """
    prompts, formats = [], [choose_format(text, asked, learnt, tokenizer) for text in texts]
    if texts and asked == "auto" and learnt is None and template:
        hint(
            "nothing tells the form of the texts learnt, so prompts go in as they stand; "
            "--prompt-format chat puts them through the model's chat template"
        )
    for format in dict.fromkeys(formats):
        if format not in (asked, RAW):
            hint(f"prompts go in as {NAMES[format]}, as in training (--prompt-format {format})")
    for text, format in zip(texts, formats, strict=True):
        if system and format != CHAT:
            raise UserError("--system is for the chat form of a prompt (--prompt-format chat)")
        if format == QA:
            text = dataset.join_question(dataset.question_of(text), "")
        if format == CHAT:
            prompt = encode_chat(text, system, tokenizer, template, max_tokens)
        else:
            prompt = Prompt(text, encode_open(text, tokenizer), max_tokens)
        prompts.append(limit(prompt, limits))
    return prompts


def encode_chat(
    text: str, system: str | None, tokenizer: TokenizerWrapper, template: Template | None,
    max_tokens: int,
) -> Prompt:  # fmt: skip
    """A user's message, up to where training has the answer to it, and what ends that."""
    if not template:
        raise UserError("this model has no chat template; give --prompt-format raw or qa, not chat")
    text = text.rstrip("\n")  # a line end is the shell's
    asked = Chat([{"role": "system", "content": system}] if system else [])
    asked.messages.append({"role": "user", "content": text})
    # Any answer shows where it starts and ends: a generation prompt may differ from training.
    answered = Chat([*asked.messages, {"role": "assistant", "content": "a"}])
    try:
        opened = template.render(asked, add_generation_prompt=True)
        if whole := template.try_render(answered):  # else it wants thoughts in answers
            template.left_out(answered, whole)
    except ValueError as error:
        raise UserError(f"the prompt in the chat form: {error}") from None
    if not (found := whole and template.find(answered, whole, len(asked.messages))):
        return Prompt(text + "\n", encode_open(opened, tokenizer, True), max_tokens)
    [encoded] = tokenizing.encode(tokenizer, [whole], templated=True)
    last = encoded.ids[tokenizing.before_blanks(encoded.ids, tokenizer) - 1]
    added = tokenizer.added_tokens_decoder
    ends = frozenset([last]) if last in added and added[last].special else frozenset()
    open_ids = encode_open(whole[: found[0]], tokenizer, True)
    return Prompt(text + "\n", open_ids, max_tokens, ends)


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
