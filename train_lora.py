"""Fine-tune a language model with LoRA on your own text, test it and generate with it, in MLX.

    python train_lora.py --train --test --prompt "질문"

The file tells a run in the order in which it happens: the command line, the data, the loss,
evaluation, training, generation, and `main`, which calls them. models.py holds what is done to the
model: loading it, putting LoRA into it, adapter files.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_finetune.command_line import (
    Interrupted,
    Parser,
    Stop,
    UserError,
    first_line,
    is_unicode,
    let_ctrl_c_end_imports,
    run_and_tell,
    warn,
    whole_number,
)

ROOT = Path(__file__).resolve().parent

# --- The command line ---------------------------------------------------------------------------


def nonnegative_number(text: str) -> float:
    """An argparse type: a finite real number that is not negative."""
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or more, not {text}")
    return number


nonnegative_number.__name__ = "number"


def build_parser() -> argparse.ArgumentParser:
    """The command line, flag by flag as specified; what goes beyond stands in its own group."""
    parser = Parser(
        prog="train_lora.py",
        description="Fine-tune a language model with LoRA on your own text, in MLX.",
        epilog="Phases run in the order train, test, generate; ask for at least one of them.",
        allow_abbrev=False,
    )
    beyond = parser.add_argument_group("beyond the specification")
    positive = whole_number(1)

    def add(*names: str, help: str, group=parser, default=None, **options) -> None:
        help += "" if default is None else " (default: %(default)s)"
        group.add_argument(*names, help=help, default=default, **options)

    add(
        "--model",
        help="path of a local model folder, or a Hugging Face repository such as "
        "GuminiResearch/Gumini-1B-Base (default: SmolLM2-135M-Instruct in lora_finetune/, fetched "
        "where it is missing)",
    )
    add(
        "--max-tokens",
        "-m",
        type=positive,
        default=100,
        help="maximum number of tokens to generate",
    )
    add(
        "--temp",
        type=nonnegative_number,
        default=0.8,
        help="sampling temperature for generation, 0 is greedy",
    )
    add("--prompt", "-p", help="prompt for text generation, after training or loading an adapter")
    parser.add_argument("--train", action="store_true", help="train")
    add(
        "--add-eos-token",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: end each training, validation and test text with the end-of-text token; 0: do not",
    )
    add(
        "--data",
        default="lora_finetune/data",
        help="directory with train.jsonl, valid.jsonl and test.jsonl",
    )
    add(
        "--lora-layers",
        type=positive,
        default=16,
        help="number of layers, from the last, to fine-tune",
    )
    add("--batch-size", type=positive, default=10, help="mini-batch size")
    add(
        "--epochs",
        type=positive,
        default=1,
        help="number of epochs to train for; overrides --iters",
    )
    add("--iters", type=positive, help="number of iterations to train for, in place of epochs")
    add(
        "--start-iter",
        type=whole_number(0),
        default=0,
        help="iteration to start from; without it, a resumed run goes on where it was",
    )
    add(
        "--val-batches",
        type=whole_number(1, also=-1),
        default=25,
        help="number of validation batches, -1 for the entire set",
    )
    add(
        "--learning-rate",
        type=nonnegative_number,
        default=2e-5,
        help="learning rate of the Adam optimizer",
    )
    add("--steps-per-report", type=positive, default=10, help="iterations between training reports")
    add("--steps-per-eval", type=positive, default=200, help="iterations between validations")
    add("--resume-adapter-file", help="adapter file to resume training from")
    add(
        "--adapter-file",
        default="lora_finetune/lora_adapters.npz",
        help="file to save the trained adapter to, or load it from",
    )
    add("--save-every", type=positive, default=100, help="iterations between saves of the adapter")
    parser.add_argument(
        "--test",
        action="store_true",
        help="evaluate on the test set after training or loading an adapter",
    )
    add(
        "--test-batches",
        type=whole_number(1, also=-1),
        default=500,
        help="number of test batches, -1 for the entire set",
    )
    add("--seed", type=whole_number(0), default=0, help="seed of all that is random")
    add(
        "--max-seq-length",
        group=beyond,
        type=whole_number(2),
        default=2048,
        help="cut longer texts to this many tokens",
    )
    beyond.add_argument(
        "--mask-prompt",
        action="store_true",
        help="count the loss on answers only: completions, last messages, and what follows "
        "### 답변: in a text",
    )
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and settle what depends on which flags were typed.

    A default path is one in this project, wherever the program is called from. `iters` is left
    None where epochs count; `lora_layers` is None where an adapter file is to decide, and
    `start_iter` where the state beside it is.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # keeps argparse from its defaults
    typed = {
        name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None
    }

    if not (args.train or args.test or args.prompt is not None):
        parser.error("nothing to do: ask for --train, --test or --prompt, or several of them")
    for name in typed:
        if isinstance(text := getattr(args, name), str):
            flag = "--" + name.replace("_", "-")
            if not text:
                parser.error(f"argument {flag}: is empty")
            if name == "prompt" and not is_unicode(text):
                parser.error(f"argument {flag}: is not UTF-8")
    if args.resume_adapter_file and not args.train:
        parser.error("argument --resume-adapter-file: resumes training, so it needs --train")
    for name in {"data", "adapter_file"} - typed:
        setattr(args, name, os.path.relpath(ROOT / getattr(args, name)))
    if args.iters and "epochs" in typed:
        warn(f"--iters {args.iters} is ignored, since --epochs {args.epochs} is given too")
        args.iters = None
    if args.resume_adapter_file and "lora_layers" not in typed:
        args.lora_layers = None
    if "start_iter" not in typed:
        args.start_iter = None
    return args


if __name__ == "__main__":  # --help and a wrong flag answer at once: the imports take seconds
    ARGUMENTS = parse_arguments()
    let_ctrl_c_end_imports()

import models
from lora_finetune import adapters, checkpoint

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

# --- The data -----------------------------------------------------------------------------------

# The kinds of examples by their keys; the first that an object has counts, as in mlx-lm.
KINDS = (("prompt", "completion"), ("messages",), ("text",))

# All of a text of questions and answers but the last answer.
UP_TO_ANSWER = re.compile(r"\s*### 질문:.*\n### 답변:\s*(?=\S)", re.DOTALL)

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


def parse_line(line: bytes, mask_prompt: bool) -> Entry:
    """The object of one line of a JSON Lines file, with the keys of its kind alone, and "tools".

    Raises:
        ValueError: says what is wrong; with `mask_prompt`, also of a text without an answer.
    """
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
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
        raise ValueError('for --mask-prompt its "text" needs a "### 질문:" and a "### 답변:"')
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


# --- Tokens and batches -------------------------------------------------------------------------


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

    def batch(self, rows: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """The given texts, padded on the right, as `loss` takes them.

        Returns:
            Tokens int32 (rows, width), lengths int32 (rows,), prompts int32 (rows,).
        """
        lengths = self.lengths[rows]
        tokens = np.zeros((len(rows), padded_width(lengths)), np.int32)
        for row, start, length in zip(tokens, self.starts[rows], lengths, strict=True):
            row[:length] = self.tokens[start : start + length]
        return mx.array(tokens), mx.array(lengths.astype(np.int32)), mx.array(self.prompts[rows])


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
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
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


# --- Loss and evaluation ------------------------------------------------------------------------


# The log-sum-exp is taken over as many rows at a time as make a float32 copy of 256 MB.
COPIED_NUMBERS = 2**26


@mx.custom_function
def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """−log softmax(logits)[target] in float32, with no float32 copy of all the logits.

    Such copies, and those of their gradient, would take most of the memory of a training step.

    Args:
        logits: (rows, vocabulary), of any floating-point type.
        targets: integers (rows,).

    Returns:
        float32 (rows,), in nats.
    """
    rows = max(1, COPIED_NUMBERS // logits.shape[1])
    parts = mx.split(logits, range(rows, len(logits), rows))
    log_sums = mx.concatenate([mx.logsumexp(p.astype(mx.float32), axis=-1) for p in parts])
    return log_sums - at(logits, targets)


@cross_entropy.vjp
def cross_entropy_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, losses: mx.array
) -> tuple[mx.array, mx.array]:
    """Softmax − one-hot, times the cotangent: elementwise, so it compiles to a single kernel."""
    logits, targets = primals
    log_sums = losses + at(logits, targets)
    softmax = mx.exp(logits.astype(mx.float32) - log_sums[:, None])
    one_hot = mx.arange(logits.shape[1]) == targets[:, None]
    return ((softmax - one_hot) * cotangent[:, None]).astype(logits.dtype), mx.zeros_like(targets)


def at(logits: mx.array, targets: mx.array) -> mx.array:
    """The logit of each row's target, float32 (rows,)."""
    return mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0].astype(mx.float32)


def loss(
    model: nn.Module, tokens: mx.array, lengths: mx.array, prompts: mx.array
) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy over the target tokens of a batch that count, in float32.

    Args:
        tokens: int32 (rows, width), padded on the right; token t predicts token t + 1.
        lengths: int32 (rows,), real tokens of each row; targets beyond them do not count.
        prompts: int32 (rows,), tokens at the start of each row that do not count as targets.

    Returns:
        The loss in nats per token, and the number of targets that count; both scalars.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    losses = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    places = mx.arange(1, tokens.shape[1])
    counted = (places >= prompts[:, None]) & (places < lengths[:, None])
    total = (losses * counted.flatten()).sum()
    number = counted.sum()
    return total / mx.maximum(number, 1), number


def evaluate(
    model: nn.Module,
    examples: Examples,
    batch_size: int,
    num_batches: int,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss in nats over all target tokens that count in the batches (-1: in all examples).

    Calls `check` before each batch; what it raises ends the evaluation.
    """
    model.eval()
    total, number = 0.0, 0
    batches = evaluation_batches(examples, batch_size, num_batches)
    for rows in tqdm(batches, "Evaluating", leave=False, disable=None):
        check()
        mean, tokens = loss(model, *examples.batch(rows))
        total += mean.item() * tokens.item()
        number += tokens.item()
    return total / max(number, 1)


# --- Training -----------------------------------------------------------------------------------


def make_optimizer(
    model: nn.Module, learning_rate: float, saved: dict[str, np.ndarray]
) -> optim.Adam:
    """Adam for the model's trainable parameters, with the moments and the step that were saved.

    Adam is as in Kingma and Ba (2015) and PyTorch: β 0.9 and 0.999, ε 1e-8, bias corrected (which
    MLX leaves off by default; the first steps are then three times too long).

    Args:
        saved: as MLX names them; parameters without moments start fresh.

    Raises:
        ValueError: what was saved is not for these parameters, or not finite.
    """
    optimizer = optim.Adam(learning_rate, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    fresh = dict(tree_flatten(optimizer.state))
    for name in saved.keys() & fresh.keys() - {"learning_rate"}:
        numbers, expected = saved[name], np.array(fresh[name])
        if (numbers.shape, numbers.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{name} is not for this model")
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name} is not finite")
        fresh[name] = mx.array(numbers)
    optimizer.state = tree_unflatten(list(fresh.items()))
    return optimizer


def make_step(
    model: nn.Module, optimizer: optim.Optimizer
) -> tuple[Callable[..., tuple[mx.array, mx.array, mx.array]], list]:
    """A compiled step that updates the model's trainable parameters on one batch.

    Returns:
        The step, and the state to evaluate after it. The step takes what `loss` takes and returns
        what it returns, and the sum of the updated parameters: where a gradient or a parameter is
        not finite, that is not. It raises UserError where MLX has no gradient of
        something in the model.
    """
    loss_and_gradients = nn.value_and_grad(model, loss)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*batch: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        try:
            (mean, number), gradients = loss_and_gradients(model, *batch)
        except ValueError as error:  # of an operation that MLX has no gradient of
            why = first_line(error)
            raise UserError(f"this architecture cannot be trained: {why}") from error
        optimizer.update(model, gradients)
        parameters = tree_flatten(model.trainable_parameters())
        return mean, number, sum(parameter.sum() for _, parameter in parameters)

    return step, state


def warm_up(model: nn.Module, examples: Examples, batch_size: int) -> None:
    """Do a step on the largest batch that can come, and undo it: what memory it takes shows now.

    Where memory runs out, some systems kill the process without a word. So steps on one and two of
    the longest texts foretell what the whole batch takes, where that might be too much.

    Raises:
        UserError: it takes more than there is.
    """
    longest = np.argsort(examples.lengths)[-batch_size:]
    before = model.trainable_parameters()
    step, state = make_step(model, make_optimizer(model, 0.0, {}))

    def peak_memory(rows: np.ndarray) -> int:
        mx.reset_peak_memory()
        mx.eval(state, step(*examples.batch(rows)))
        return mx.get_peak_memory()

    total, base, rows = models.memory_size(), mx.get_active_memory(), len(longest)
    what = f"a batch of {rows} texts, the longest of {examples.lengths.max()} tokens,"
    way_out = "lower --batch-size, --max-seq-length or --lora-layers"
    try:
        one = peak_memory(longest[-1:])
        if base + (one - base) * rows > total and rows > 2:
            foreseen = one + (peak_memory(longest[-2:]) - one) * (rows - 1)
            if foreseen > total:
                raise UserError(
                    f"{what} would take {foreseen / 1e9:.1f} GB of memory, and there are "
                    f"{total / 1e9:.1f} GB; {way_out}"
                )
        if rows > 1:
            peak_memory(longest)
    except (RuntimeError, MemoryError) as error:
        peak = mx.get_peak_memory() / 1e9
        why = first_line(error)
        raise UserError(f"{what} is too much after {peak:.1f} GB ({why}); {way_out}") from None
    model.update(before)


@dataclass(frozen=True)
class Schedule:
    """When a run does what, counted in iterations, and on how many examples and batches."""

    iters: int
    batch_size: int
    seed: int
    val_batches: int
    steps_per_report: int
    steps_per_eval: int
    save_every: int


class Trainer:
    """The iterations of a run that are left after `progress`, and what is due between them.

    The adapter is in `adapter_file` at the end and as often before as scheduled; beside it are the
    state of the run and the adapter with the lowest validation loss. `settings` go into the state,
    for a later run to see what has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        training: Examples,
        validation: Examples,
        schedule: Schedule,
        progress: checkpoint.Progress,
        log: checkpoint.Log,
        adapter_file: Path,
        settings: dict[str, Any],
    ):
        self.model, self.optimizer = model, optimizer
        self.training, self.validation = training, validation
        self.schedule, self.progress = schedule, progress
        self.log, self.adapter_file, self.settings = log, adapter_file, settings
        self.best_file = adapter_file.with_suffix(f".best{adapter_file.suffix}")
        self.stop = Stop()

    def train(self) -> None:
        """Do all that is left.

        Raises:
            UserError: a loss, a gradient or a parameter is not finite; nothing of it is saved.
            Interrupted: a signal asked for a stop; the last whole iteration is saved.
        """
        first = self.progress.iteration
        with self.stop:
            try:
                warm_up(self.model, self.training, self.schedule.batch_size)
                self.stop.check()
                if self.progress.validated < 0:
                    self.validate(first + 1)
                if not self.progress.finished or first == self.schedule.iters:
                    self.finish_iteration()
                self.iterate()
            except Interrupted as interrupted:
                if self.progress.iteration == first:
                    raise
                self.save(finished=False)
                saved = (
                    f"iteration {self.progress.iteration} is saved; the same command with "
                    f"--resume-adapter-file {self.adapter_file} goes on"
                )
                raise Interrupted(interrupted.args[0], saved) from None

    def iterate(self) -> None:
        progress, schedule, first = self.progress, self.schedule, self.progress.iteration
        step, state = make_step(self.model, self.optimizer)
        batches = training_batches(self.training, schedule.batch_size, schedule.seed, first)
        numbers = range(first + 1, schedule.iters + 1)
        bar = tqdm(numbers, "Training", initial=first, total=schedule.iters, disable=None)
        for iteration in bar:
            start = time.perf_counter()
            mean, number, size = step(*next(batches))
            mx.eval(state, mean, number, size)
            progress.seconds += time.perf_counter() - start
            progress.iteration = iteration
            self.check_finite(mean.item(), "the loss")
            self.check_finite(size.item(), "a gradient or a parameter")
            progress.total += mean.item() * number.item()
            progress.tokens += number.item()
            progress.steps += 1
            self.finish_iteration()

    def check_finite(self, number: float, what: str) -> None:
        if not math.isfinite(number):
            raise UserError(
                f"{what} is not finite ({number}) at iteration {self.progress.iteration}; a lower "
                f"--learning-rate may help, and what {self.adapter_file} held before is still there"
            )

    def finish_iteration(self) -> None:
        """Do what is due after the step of an iteration, as far as it is not done yet."""
        iteration, schedule = self.progress.iteration, self.schedule
        last = iteration == schedule.iters
        self.stop.check()
        if (iteration % schedule.steps_per_report == 0 or last) and self.progress.steps:
            self.report()
        due = iteration % schedule.steps_per_eval == 0 or last
        if due and self.progress.validated != iteration:
            self.validate(iteration)
        if iteration % schedule.save_every == 0 or last:
            self.save(finished=True)

    def report(self) -> None:
        progress = self.progress
        numbers = {
            "train_loss": progress.total / max(progress.tokens, 1),
            "it_per_sec": progress.steps / progress.seconds,
            "tokens_per_sec": progress.tokens / progress.seconds,
            "peak_mem_gb": mx.get_peak_memory() / 1e9,
        }
        self.log.report(
            f"Iter {progress.iteration}: Train loss {numbers['train_loss']:.3f}, "
            f"It/sec {numbers['it_per_sec']:.3f}, Tokens/sec {numbers['tokens_per_sec']:.3f}, "
            f"Peak mem {numbers['peak_mem_gb']:.3f} GB",
            iter=progress.iteration,
            **numbers,
        )
        progress.total, progress.tokens, progress.steps, progress.seconds = 0.0, 0, 0, 0.0

    def validate(self, named: int) -> None:
        """Validate, report it as of iteration `named`, and keep the adapter if it is the best."""
        progress, schedule = self.progress, self.schedule
        start = time.perf_counter()
        mean = evaluate(
            self.model,
            self.validation,
            schedule.batch_size,
            schedule.val_batches,
            self.stop.check,
        )
        self.model.train()
        took = time.perf_counter() - start
        self.check_finite(mean, "the validation loss")
        line = f"Iter {named}: Val loss {mean:.3f}, Val took {took:.3f}s"
        self.log.report(line, iter=named, val_loss=mean)
        progress.validated = progress.iteration
        if mean < progress.best_loss:
            progress.best_loss, progress.best_iteration = mean, progress.iteration
            adapters.write_adapter(self.best_file, self.model)

    def save(self, finished: bool) -> None:
        """Save the adapter and the state; `finished` tells if all that was due is done."""
        progress = self.progress
        progress.finished, progress.log_size = finished, self.log.size()
        notes = {"progress": asdict(progress), "settings": self.settings}
        checkpoint.write_checkpoint(self.adapter_file, self.model, self.optimizer.state, notes)
        line = f"Iter {progress.iteration}: Saved adapter weights to {self.adapter_file}."
        if finished and progress.iteration == self.schedule.iters:
            line += f" The best is of iteration {progress.best_iteration} "
            line += f"(validation {progress.best_loss:.3f}), in {self.best_file}."
        checkpoint.say(line)


# --- Generation ---------------------------------------------------------------------------------


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Print the prompt, its continuation as it is made, and a line with tokens per second.

    Raises:
        UserError: the prompt holds no tokens, or some that do not belong to the model.
    """
    model.eval()
    mx.random.seed(seed)
    [ids] = encode(tokenizer, [prompt])
    if not ids:
        raise UserError("the prompt holds no tokens")
    if max(ids) >= models.vocabulary_size(model):
        raise UserError("the prompt holds tokens that the model does not know")
    print(prompt, end="", flush=True)
    tokens, begun = [], False
    for part in stream(model, tokenizer, ids, max_tokens, temperature):
        text = part.text
        tokens.append(part.token)
        if text and not begun and continues_with_space(tokenizer, ids, tokens):
            text = " " + text.lstrip(" ")  # which mlx-lm strips from the first word
        begun = begun or bool(text)
        if part.finish_reason:
            text = text.rstrip("\ufffd")  # a character that --max-tokens cut through
        print(text, end="", flush=True)
    print(f"\n========== {part.generation_tokens} tokens, {part.generation_tps:.3f} tokens/sec")


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    ids: list[int],
    max_tokens: int,
    temperature: float,
) -> Iterator[GenerationResponse]:
    """The continuation of a prompt, token by token.

    Raises:
        UserError: the model generated a token that the tokenizer does not have.
    """
    sampler = make_sampler(temp=temperature)
    try:
        yield from stream_generate(model, tokenizer, ids, max_tokens=max_tokens, sampler=sampler)
    except TypeError as error:  # mlx-lm's, where there is a gap in the vocabulary
        raise UserError("the model generated a token that its tokenizer does not have") from error


def continues_with_space(tokenizer: TokenizerWrapper, ids: list[int], tokens: list[int]) -> bool:
    """Whether a space comes between a prompt and the tokens generated after it."""
    return tokenizer.decode(ids + tokens).startswith(tokenizer.decode(ids) + " ")


# --- The run ------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for; what is wrong with it is told before anything is fetched.

    Raises:
        UserError, OSError: something that the user can put right.
    """
    data, adapter_file = Path(args.data), Path(args.adapter_file)
    splits = (["train", "valid"] if args.train else []) + (["test"] if args.test else [])
    files = {split: data / f"{split}.jsonl" for split in splits}
    numbers = {
        split: sum(1 for _ in read_entries(file, args.mask_prompt)) for split, file in files.items()
    }
    log = checkpoint.Log(adapter_file.with_suffix(".log.jsonl"))
    source = Path(args.resume_adapter_file or adapter_file)
    if not args.train and not source.exists():
        raise UserError(f"there is no adapter file {source}; --train makes one")
    resumes = bool(args.resume_adapter_file)
    state = checkpoint.read_state(source) if resumes else None
    if state:
        adapter = state.adapter
    else:
        adapter = adapters.read_adapter(source) if resumes or not args.train else {}
    if args.train:
        check_writable(adapter_file)
        if log.size():
            log.lock()
        iters = args.iters or args.epochs * math.ceil(numbers["train"] / args.batch_size)
        progress = checkpoint.find_start(state, source, args.start_iter)
        if progress.iteration > iters or (progress.iteration == iters and not state):
            raise UserError(
                f"of {iters} iterations {progress.iteration} are done already, as --start-iter or "
                "the file to resume from says; raise --epochs or --iters"
            )

    if models.lacks_fast_blas():
        warn(
            "no fast BLAS was found, so MLX will be some 20 times slower than this CPU; get one "
            "with `pip install ngsolve-openblas` (x86-64), `apt install libopenblas0` or conda"
        )
    # MLX keeps freed buffers to use again; over batches of many shapes they would fill the memory.
    mx.set_cache_limit(models.memory_size() // 8)
    path_or_repo = args.model or str(fetch_demo_model())
    print("Loading pretrained model", flush=True)
    model, tokenizer = models.load(path_or_repo)
    total = models.count_parameters(model)
    identity = checkpoint.fingerprint(model)
    mx.random.seed(args.seed)
    adapters.adapt(model, args.lora_layers if args.train else None, adapter, source)
    print(f"Total parameters {total / 1e6:.3f}M")
    print(f"Trainable parameters {models.count_trainable(model) / 1e6:.3f}M", flush=True)
    examples = load_examples(
        files,
        numbers,
        tokenizer,
        vocabulary=models.vocabulary_size(model),
        end=bool(args.add_eos_token),
        mask_prompt=args.mask_prompt,
        max_length=args.max_seq_length,
    )

    if args.train:
        settings = {f"--{name.replace('_', '-')}": getattr(args, name) for name in DECISIVE}
        for split in ("train", "valid"):
            settings[files[split].name] = checkpoint.file_checksum(files[split])
        settings["the model"] = identity
        log.lock()
        if resumes:
            progress = checkpoint.take_up(progress, state, settings, source)
        if not resumes or source.resolve() == adapter_file.resolve():
            log.shorten(progress)
        saved = state.optimizer if state else {}
        try:
            optimizer = make_optimizer(model, args.learning_rate, saved)
        except ValueError:
            raise checkpoint.damaged_state(source) from None
        numbers = {field.name: getattr(args, field.name) for field in fields(Schedule)}
        schedule = Schedule(**numbers | {"iters": iters})
        training = examples["train"]
        trainer = Trainer(
            model,
            optimizer,
            training,
            examples["valid"],
            schedule,
            progress,
            log,
            adapter_file,
            settings,
        )
        padding = padding_share(training.lengths, args.batch_size, args.seed)
        print(
            f"Training: {len(training)} examples, {len(training.tokens)} tokens,",
            f"longest {training.lengths.max()}, {training.cut} cut, {padding:.1%} padding an epoch",
            flush=True,
        )
        trainer.train()
    if args.test:
        print("Testing", flush=True)
        mean = evaluate(model, examples["test"], args.batch_size, args.test_batches)
        perplexity = math.exp(mean) if mean < 700 else math.inf
        log.report(
            f"Test loss {mean:.3f}, Test ppl {perplexity:.3f}.",
            test_loss=mean,
            test_ppl=perplexity,
        )
    if args.prompt is not None:
        print("Generating", flush=True)
        generate(model, tokenizer, args.prompt, args.max_tokens, args.temp, args.seed)


# What decides, with the data and the model, what a run computes.
DECISIVE = (
    "batch_size",
    "learning_rate",
    "seed",
    "val_batches",
    "add_eos_token",
    "max_seq_length",
    "mask_prompt",
)


def check_writable(file: Path) -> None:
    """Raise UserError where the adapter could not be saved at the end of the run."""
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"the adapter file {file} cannot be written: {error.strerror}") from None


def fetch_demo_model() -> Path:
    from lora_finetune import demo_model

    return demo_model.fetch()


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


def main() -> int:
    return run_and_tell(partial(run, ARGUMENTS), "the run")


if __name__ == "__main__":
    sys.exit(main())
