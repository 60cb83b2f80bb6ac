"""Fine-tune a language model with LoRA on your own text, test it and generate with it, in MLX.

    python train_lora.py --train --test --prompt "질문"

The file tells a run in the order in which it happens: the command line, the data, the loss,
evaluation, training, generation, and `main`, which calls them. models.py holds what is done to the
model: loading it, putting LoRA into it, adapter files.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from lora_finetune.command_line import (
    Interrupted,
    Parser,
    Stop,
    UserError,
    first_line,
    in_project,
    is_unicode,
    let_ctrl_c_end_imports,
    run_and_tell,
    warn,
    whole_number,
)

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
        setattr(args, name, in_project(getattr(args, name)))
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
from lora_finetune import adapters, checkpoint, dataset

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
    examples: dataset.Examples,
    batch_size: int,
    num_batches: int,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss in nats over all target tokens that count in the batches (-1: in all examples).

    Calls `check` before each batch; what it raises ends the evaluation.
    """
    model.eval()
    total, number = 0.0, 0
    batches = dataset.evaluation_batches(examples, batch_size, num_batches)
    for rows in tqdm(batches, "Evaluating", leave=False, disable=None):
        check()
        mean, tokens = loss(model, *map(mx.array, examples.batch(rows)))
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


def warm_up(model: nn.Module, examples: dataset.Examples, batch_size: int) -> None:
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
        mx.eval(state, step(*map(mx.array, examples.batch(rows))))
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
        training: dataset.Examples,
        validation: dataset.Examples,
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
        batches = dataset.training_batches(self.training, schedule.batch_size, schedule.seed, first)
        numbers = range(first + 1, schedule.iters + 1)
        bar = tqdm(numbers, "Training", initial=first, total=schedule.iters, disable=None)
        for iteration in bar:
            start = time.perf_counter()
            mean, number, size = step(*map(mx.array, next(batches)))
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
    [ids] = dataset.encode(tokenizer, [prompt])
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
        split: sum(1 for _ in dataset.read_entries(file, args.mask_prompt))
        for split, file in files.items()
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
    examples = dataset.load_examples(
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
        padding = dataset.padding_share(training.lengths, args.batch_size, args.seed)
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


def main() -> int:
    return run_and_tell(partial(run, ARGUMENTS), "the run")


if __name__ == "__main__":
    sys.exit(main())
