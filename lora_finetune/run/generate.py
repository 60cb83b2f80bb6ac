"""Prompts and their continuations, printed as they are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import models
from lora_finetune.base import memory
from lora_finetune.base.errors import UserError, first_line, warn
from lora_finetune.mlx_patches import rope
from lora_finetune.run.config import Config
from lora_finetune.texts import prompts
from lora_finetune.training.distributed import Group, LostError

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper


def generate_all(
    config: Config, model: nn.Module, tokenizer: TokenizerWrapper, asked: list[prompts.Prompt],
    vocab_size: int, group: Group,
) -> None:  # fmt: skip
    """Generate after each prompt, with LoRA in the weights where they are not quantized.

    Where weights are shared out, all processes generate, and the first one's tokens count.
    """
    if not asked:
        return
    model.eval()
    sample = sampling(config.temp, vocab_size, group)
    with nullcontext() if group.shares_weights else models.merged(model):
        for prompt in asked:
            print("Generating", flush=True)
            tokenizer.eos_token_ids |= prompt.end_tokens
            group.compute(generate, model, tokenizer, prompt, sample, config.seed)


def sampling(temp: float, vocab_size: int, group: Group) -> Callable[[mx.array], mx.array]:
    """A function of logits (1, …) to a token (1,), the first process's where all share a model."""
    sampler = make_sampler(temp=temp)
    # Some models have logits for more tokens than there are.
    return lambda logits: group.of_first(sampler(logits[..., :vocab_size]))


AT_MOST = 40  # tokens of an answer that is watched


def begin(
    model: nn.Module, tokenizer: TokenizerWrapper, asked: list[prompts.Prompt], vocab_size: int,
    group: Group,
) -> list[str]:  # fmt: skip
    """The greedy beginnings of the answers to prompts, of a model in training.

    What cannot be generated is a warning, since training goes on without; then there are none.
    """
    model.eval()
    try:
        own = model, tokenizer, sampling(0.0, vocab_size, group)
        return [group.compute(greedy_text, *own, prompt) for prompt in asked]
    except LostError:
        raise
    except UserError as error:
        warn(f"the answer is not shown: {first_line(error)}")
        asked.clear()
        return []
    finally:
        model.train()


def greedy_text(
    model: nn.Module, tokenizer: TokenizerWrapper, greedy: Callable, prompt: prompts.Prompt
) -> str:
    tokenizer.eos_token_ids |= prompt.end_tokens
    short = prompt._replace(max_tokens=min(prompt.max_tokens, AT_MOST))
    responses = stream(model, tokenizer, short, greedy)
    # A character that the end cut through is left out.
    return "".join(response.text for response in responses).strip().rstrip("\ufffd")


def generate(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt: prompts.Prompt, sample: Callable,
    seed: int,
) -> None:  # fmt: skip
    """Print the prompt, its continuation as it is generated, and a line with tokens per second."""
    mx.random.seed(seed)
    print(prompt.text, end="", flush=True)
    tokens, begun, before_space = [], False, tokenizer.decode(prompt.tokens) + " "
    for response in stream(model, tokenizer, prompt, sample):
        text = response.text
        tokens.append(response.token)
        if text and not begun and tokenizer.decode(prompt.tokens + tokens).startswith(before_space):
            text = " " + text.lstrip(" ")  # which mlx-lm strips from the first word
        begun = begun or bool(text)
        if response.finish_reason:
            text = text.rstrip("\ufffd")  # a character that --max-tokens cut through
        print(text, end="", flush=True)
    number, speed = response.generation_tokens, response.generation_tps
    cut = ", cut at --max-tokens" if response.finish_reason == "length" else ""
    print(f"\n========== {number} tokens, {speed:.3f} tokens/sec{cut}")


def stream(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt: prompts.Prompt, sample: Callable
) -> Iterator[GenerationResponse]:
    """The continuation of a prompt; raises UserError at a token that the tokenizer lacks."""
    advice = memory.device_errors("shorten the prompt or lower --max-tokens")
    try:
        with advice, rope.text_lengths(len(prompt.tokens)):
            yield from stream_generate(
                model, tokenizer, prompt.tokens, max_tokens=prompt.max_tokens, sampler=sample
            )
    except (TypeError, IndexError) as error:  # mlx-lm's, by the kind of its detokenizer
        raise UserError(
            "the model generated a token that its tokenizer does not have; download both again"
        ) from error
