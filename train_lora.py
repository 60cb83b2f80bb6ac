"""Fine-tune a language model with LoRA on your own text, test it and generate with it, in MLX.

    python train_lora.py --train --test --prompt "질문"

The file follows a run: the command line, evaluation, the training loop (one step of it is in
lora_finetune/training/training_step.py), generation, and `run`, which calls them in turn.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice

from lora_finetune.base.command_line import (
    Parser,
    import_or_exit,
    in_project,
    nonempty,
    nonnegative_number,
    scale_number,
    whole_number,
)
from lora_finetune.base.errors import (
    Interrupted,
    UserError,
    first_line,
    is_unicode,
    run_and_report_errors,
    warn,
)
from lora_finetune.base.signals import begin_process, process_rank

# --- The command line ---------------------------------------------------------------------------


FORMS = ("mlx-lm", "peft", "merged", "merged-float")  # of --export
PROMPT_FORMATS = ("auto", "raw", "chat", "qa")


def build_parser() -> argparse.ArgumentParser:
    """The flags, phase by phase; those of no single phase stand in a group of their own."""
    parser = Parser(
        prog="train_lora.py",
        usage="%(prog)s [--train] [--test] [--prompt TEXT] [--export FORM FOLDER] [other flags]",
        description="Fine-tune a language model with LoRA on your own text, in MLX.",
        epilog="Phases run in the order train, test, generate, export; ask for at least one.",
    )
    add, switch = parser.add, parser.switch
    positive, all_or_positive = whole_number(1), whole_number(1, also=-1)

    parser.section("what to do")
    switch("--train", "train an adapter")
    switch("--test", "evaluate on the test set, after training or loading an adapter")
    add("--prompt -p", nonempty, None, "generate after this text; repeatable; - is standard input",
        action="append", metavar="TEXT")  # fmt: skip

    parser.section("model and texts")
    add("--model", nonempty, None, "model folder, or Hugging Face repository (default: demo model)")
    add("--data", nonempty, "lora_finetune/data", "folder of {train,valid,test}.jsonl",
        metavar="FOLDER")  # fmt: skip
    add("--add-eos-token", int, 1, "1: texts end in the end-of-text token; 0: in none",
        choices=(0, 1))  # fmt: skip
    add("--seed", whole_number(0), 0, "seed of all that is random")

    parser.section("training")
    add("--lora-layers", positive, 16, "layers to adapt, counted from the last")
    add("--batch-size", positive, 10, "texts in a batch")
    add("--epochs", positive, 1, "passes over the texts; overrides --iters")
    add("--iters", positive, None, "iterations, in place of epochs")
    add("--start-iter", whole_number(0), 0, "iterations done before; a resumed run knows them")
    add("--learning-rate", nonnegative_number, 2e-5, "learning rate of Adam")
    add("--steps-per-report", positive, 10, "iterations between training reports")
    add("--steps-per-eval", positive, 200, "iterations between validations")
    add("--val-batches", all_or_positive, 25, "validation batches, -1 for all")
    add("--save-every", positive, 100, "iterations between saves of the adapter")
    add("--adapter-file", nonempty, "lora_finetune/lora_adapters.npz", "adapter to save or load",
        metavar="FILE")  # fmt: skip
    add("--resume-adapter-file", nonempty, None, "adapter to go on training from", metavar="FILE")

    parser.section("test")
    add("--test-batches", all_or_positive, 500, "test batches, -1 for all")

    parser.section("generation")
    add("--max-tokens -m", positive, 100, "tokens to generate at most")
    add("--temp", nonnegative_number, 0.8, "sampling temperature, 0 is greedy")

    parser.section("more options")
    add("--max-seq-length", whole_number(2), 2048, "cut texts to so many tokens")
    switch("--mask-prompt", "count the loss on answers only, not on questions")
    add("--lora-rank", whole_number(1, below=2**16), None, "rank of the LoRA update (default: 8)")
    add("--lora-scale", scale_number, None, "scale of the LoRA update (default: 20.0)")
    add("--patience", positive, None, "end after so many validations without a better loss")
    add("--prompt-format", str, "auto", f"how a prompt is put: {', '.join(PROMPT_FORMATS)}",
        choices=PROMPT_FORMATS, metavar="FORM")  # fmt: skip
    add("--system", nonempty, None, "system message for the chat form of a prompt", metavar="TEXT")
    add("--export", str, None, f"write the result as {', '.join(FORMS)}", action="append", nargs=2,
        metavar=("FORM", "FOLDER"))  # fmt: skip
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and settle what depends on which flags were typed.

    A default path is one in this project, wherever the program is called from. `iters` is None
    where epochs count, `lora_layers` where the adapter file decides, and `start_iter` where the
    state beside it does.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.train or args.test or args.prompt or args.export):
        parser.error(
            "nothing to do: ask for --train, --test, --prompt or --export, or several of them"
        )
    for name, texts in {"prompt": args.prompt or [], "system": [args.system or ""]}.items():
        if not all(map(is_unicode, texts)):
            parser.error(f"argument --{name}: is not UTF-8")
    if args.prompt and args.prompt.count("-") > 1:
        parser.error("argument --prompt: - can be given once")
    if args.system and not (args.prompt and args.prompt_format in ("auto", "chat")):
        parser.error("argument --system: is for a --prompt in the chat form")
    if args.resume_adapter_file and not args.train:
        parser.error("argument --resume-adapter-file: resumes training, so it needs --train")
    if not args.train and (flags := {"lora_rank", "lora_scale"} & args.typed):
        flag = min(flags).replace("_", "-")
        parser.error(f"argument --{flag}: is for training; an adapter file brings its own")
    for form, folder in args.export or []:
        if form not in FORMS or not folder:
            parser.error(f"argument --export: takes a form ({', '.join(FORMS)}) and a folder")
    for name in {"data", "adapter_file"} - args.typed:
        setattr(args, name, in_project(getattr(args, name)))
    if {"iters", "epochs"} <= args.typed:
        warn(f"--iters {args.iters} is ignored, since --epochs {args.epochs} is given too")
        args.iters = None
    if args.resume_adapter_file and "lora_layers" not in args.typed:
        args.lora_layers = None
    if "start_iter" not in args.typed:
        args.start_iter = None
    return args


if __name__ == "__main__":  # parsed before the imports, which take seconds: --help answers at once
    begin_process()
    args = parse_arguments()
    import_or_exit("mlx.core", "mlx_lm")
    # Hide PyTorch, where it is installed, from transformers: seconds and 180 MB for nothing here.
    sys.modules.setdefault("torch", None)

import models
from lora_finetune.adapters import adapters, export
from lora_finetune.base import linux_cpu, memory
from lora_finetune.demo import demo_model
from lora_finetune.mlx_patches import patches, rope
from lora_finetune.model_folder import model_folder
from lora_finetune.run import checkpoint, outcome, run_files
from lora_finetune.run.plan import Plan, check, to_compare
from lora_finetune.texts import dataset, prompts
from lora_finetune.training import distributed, frozen_prefix, losses
from lora_finetune.training.distributed import ALONE, Group
from lora_finetune.training.losses import Loss
from lora_finetune.training.training_step import (
    AHEAD,
    fit_memory,
    make_optimizer,
    make_step,
    named_state,
    run_steps,
)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import get_total_parameters
from tqdm import tqdm

if sys.modules.get("torch") is None:
    sys.modules.pop("torch", None)  # no longer hidden

# --- Evaluation ---------------------------------------------------------------------------------


def evaluate(
    model: nn.Module,
    loss: Loss,
    examples: dataset.Examples,
    batch_size: int,
    num_batches: int,
    group: Group = ALONE,
    parts: int = 1,
) -> float:
    """Mean loss in nats per target token over the first batches (-1: over all examples).

    Args:
        group: the processes that the batches are shared out among.
        parts: how many each of them computes its share of a batch in.

    Raises:
        Interrupted: a signal asked for a stop.
    """
    model.eval()
    total, num_targets = 0.0, 0
    batches = dataset.evaluation_batches(examples, batch_size, num_batches, parts * group.size)
    for rows in tqdm(group.deal(batches), "Evaluating", leave=False, disable=None):
        group.check_stop()
        own = (0.0, 0)
        if rows is not None:
            batch = map(mx.array, examples.batch(rows))
            own = (n.item() for n in rope.by_length(loss)(model, *batch))
        for batch_total, number in group.gather(*own):
            total += batch_total
            num_targets += number
    return total / max(num_targets, 1)


def test(
    model: nn.Module,
    loss: Loss,
    examples: dataset.Examples,
    batch_size: int,
    num_batches: int,
    group: Group,
    report_line: Callable[..., None],
) -> None:
    """Report the loss and the perplexity on the test set."""
    print("Testing", flush=True)
    stops = group.hear_stops() if group.size > 1 else nullcontext()  # one alone ends at once
    with memory.device_errors("lower --batch-size or --max-seq-length"), stops:
        mean = evaluate(model, loss, examples, batch_size, num_batches, group)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    line = f"Test loss {mean:.3f}, Test ppl {perplexity:.3f}."
    report_line(line, test_loss=mean, test_ppl=perplexity)


# --- The training loop --------------------------------------------------------------------------


MEMORY_ADVICE = "lower --batch-size, --max-seq-length or --lora-layers"


def train(
    model: nn.Module,
    loss: Loss,
    examples: dict[str, dataset.Examples],
    plan: Plan,
    group: Group = ALONE,
) -> None:
    """Train to the last iteration, or to the one at which a signal asks for a stop.

    Raises:
        UserError: a loss, a gradient or a parameter is not finite; nothing of it is saved. Or the
            device failed, or another process; the last whole iteration is saved.
        Interrupted: a signal asked for a stop; the last whole iteration is saved.
    """
    training, first = examples["train"], plan.progress.iteration
    optimizer = start_or_resume(model, plan)
    padding = dataset.padding_share(
        training.lengths, plan.batch_size, plan.seed, training.max_length
    )
    print(
        f"Training: {len(training)} examples, {len(training.tokens)} tokens, longest",
        f"{training.lengths.max()}, {training.num_truncated} cut, {padding:.1%} padding an epoch",
        flush=True,
    )
    if prefix := frozen_prefix.find(model):
        loss = prefix.loss(loss)
        examples = {split: prefix.examples(examples[split]) for split in ("train", "valid")}
    model.train()  # before the step is traced: some layers have kernels without a gradient else
    group.rescue = partial(save_unfinished, model, optimizer, plan, first)
    with group.hear_stops():
        try:
            with memory.device_errors(MEMORY_ADVICE):
                rows = -(-plan.batch_size // group.size)
                parts = fit_memory(model, loss, examples["train"], rows, plan.progress.parts)
                plan.progress.parts = max(number for _, number in group.gather(count=parts))
                if parts < plan.progress.parts:
                    warn(
                        "another process has less memory, so each share of a batch is computed in "
                        f"{plan.progress.parts} parts, with the same result"
                    )
                if prefix:
                    examples = keep_states(prefix, examples, plan, group)
                training_loop(model, loss, optimizer, examples, plan, group)
            plan.files.draw_losses()
        except Interrupted as interrupted:
            outcome = save_unfinished(model, optimizer, plan, first)
            raise Interrupted(interrupted.signal, outcome) from None
        except memory.DeviceError as error:
            outcome = save_unfinished(model, optimizer, plan, first)
            raise UserError(f"{error}; {outcome}") from error
        except UserError:
            plan.files.save_best_after_error(plan.progress)
            raise


def keep_states(
    prefix: frozen_prefix.Prefix, examples: dict[str, dataset.Examples], plan: Plan, group: Group
) -> dict[str, dataset.Examples]:
    """Keep the frozen states of all texts that come more than once, if there is room.

    They are computed in the batches of the first epoch, and of one validation. So that epoch takes
    no longer, and is the same to the last bit as without keeping. Later epochs have other batches,
    so their last bits do depend on it: a run that had no room must not begin to keep when it is
    resumed. Of several processes, each meets texts in later epochs that were another's before, so
    the more there are, the more epochs it takes to pay.
    """
    training, validation, progress = examples["train"], examples["valid"], plan.progress
    keep = partial(frozen_prefix.keep, prefix, folder=plan.files.adapter.parent)
    batches = dataset.evaluation_batches(
        validation, plan.batch_size, plan.val_batches, progress.parts * group.size
    )
    kept = {"valid": keep(validation, batches) or validation, "train": training}
    lengths = training.lengths
    batches = dataset.epoch_batches(lengths, plan.batch_size, plan.seed, epoch=0)
    if plan.iters > len(batches) * max(1, group.size - 1) and progress.has_room:
        groups = [
            part
            for rows in batches
            for share in dataset.shares(rows, lengths[rows], group.size)
            for part in dataset.split_batch(share, progress.parts)
        ]
        kept["train"] = keep(training, groups) or training
        progress.has_room = kept["train"] is not training
    return kept


def start_or_resume(model: nn.Module, plan: Plan) -> optim.Adam:
    """Begin a new run, or take up the one to resume, with a warning of what has changed since.

    Returns:
        The optimizer, with the moments of the run to resume.
    """
    plan.files.lock()
    changed = bool(plan.source) and checkpoint.warn_of_changes(
        plan.source, plan.state, plan.settings
    )
    if changed:
        plan.progress.reset_losses()
    start = plan.state.progress.iteration if plan.state else None
    unchanged = plan.progress.iteration == start and not changed
    plan.files.begin(plan.source, plan.state, plan.progress, unchanged)
    saved_moments = plan.state.optimizer if plan.state else {}
    return make_optimizer(model, plan.learning_rate, saved_moments)


def training_loop(
    model: nn.Module,
    loss: Loss,
    optimizer: optim.Optimizer,
    examples: dict[str, dataset.Examples],
    plan: Plan,
    group: Group,
) -> None:
    """Step after step to the last iteration; once in a while report, validate and save.

    What is due comes before the next step, so that a resumed run begins with what an interrupted
    one left undone.

    Raises:
        UserError: a loss, a gradient or a parameter is not finite.
        Interrupted: a signal asked for a stop.
    """
    progress = plan.progress
    step = make_step(model, loss, optimizer, group)
    batches = dataset.training_batches(
        examples["train"], plan.batch_size, plan.seed, progress.iteration, progress.parts,
        group.rank, group.size,
    )  # fmt: skip
    bar = tqdm(desc="Training", initial=progress.iteration, total=plan.iters, disable=None)
    while True:
        group.check_stop()
        iteration, last = progress.iteration, progress.iteration == plan.iters

        # once in a while: report the training loss since the last report
        if progress.steps and (last or iteration % plan.steps_per_report == 0):
            report(progress, plan.files)

        # once in a while, and before the first step: validate, and keep the adapter if it is best
        due = last or progress.validated < 0 or iteration % plan.steps_per_eval == 0
        if due and progress.validated != iteration:
            validate(model, loss, examples["valid"], plan, group)

        # end early where validation has not become better for so long
        if plan.patience and progress.not_better >= plan.patience and not last:
            last, progress.ended_for = True, plan.iters
            if progress.steps:
                report(progress, plan.files)
            run_files.print_line(
                f"Iter {iteration}: Training ends, since {progress.not_better} validations in a "
                f"row brought no better loss than that of iteration {progress.best_iteration}."
            )

        # once in a while: save the adapter, and what it takes to go on from here
        if last or (iteration % plan.save_every == 0 and not progress.finished):
            save(model, optimizer, plan, finished=True)
        if last:
            break

        # steps until something is due; what is not finite must never reach a save, so it ends all
        few = islice(batches, next_due(iteration, plan) - iteration)
        ahead = AHEAD and group.size == progress.parts == 1
        with closing(run_steps(step, few, ahead)) as results:
            start = time.perf_counter()
            for total, num_targets, parameter_sum in results:
                progress.add_step(total, num_targets, time.perf_counter() - start)
                check_finite(total, "the loss", plan)
                check_finite(parameter_sum, "a gradient or a parameter", plan)
                bar.update()
                group.check_stop()
                start = time.perf_counter()
    bar.close()


def next_due(iteration: int, plan: Plan) -> int:
    """The next iteration after which there is something to report, validate or save."""
    every = plan.steps_per_report, plan.steps_per_eval, plan.save_every
    return min(plan.iters, *((iteration // number + 1) * number for number in every))


def check_finite(number: float, what: str, plan: Plan) -> None:
    """Raise UserError where a number is not finite."""
    if not math.isfinite(number):
        raise UserError(
            f"{what} is not finite ({number}) at iteration {plan.progress.iteration}; a lower "
            f"--learning-rate may help, and what {plan.files.adapter} held before is still there"
        )


def report(progress: checkpoint.Progress, files: run_files.RunFiles) -> None:
    """Report the training loss and speed since the last report, and begin new sums."""
    numbers = {
        "train_loss": progress.total / max(progress.tokens, 1),
        "it_per_sec": progress.steps / progress.seconds,
        "tokens_per_sec": progress.tokens / progress.seconds,
        "peak_mem_gb": mx.get_peak_memory() / 1e9,
        "tokens": progress.trained_tokens,
    }
    files.report(
        f"Iter {progress.iteration}: Train loss {numbers['train_loss']:.3f}, "
        f"It/sec {numbers['it_per_sec']:.3f}, Tokens/sec {numbers['tokens_per_sec']:.3f}, "
        f"Peak mem {numbers['peak_mem_gb']:.3f} GB",
        iter=progress.iteration,
        **numbers,
    )
    progress.reset_sums()


def validate(
    model: nn.Module, loss: Loss, examples: dataset.Examples, plan: Plan, group: Group
) -> None:
    """Report the validation loss, and keep the adapter if it is the best so far.

    The validation before the first step is reported with the number of that step.
    """
    progress, start = plan.progress, time.perf_counter()
    mean = evaluate(model, loss, examples, plan.batch_size, plan.val_batches, group, progress.parts)
    model.train()
    took = time.perf_counter() - start
    check_finite(mean, "the validation loss", plan)
    iteration = progress.iteration + (progress.validated < 0)
    line = f"Iter {iteration}: Val loss {mean:.3f}, Val took {took:.3f}s"
    plan.files.report(line, iter=iteration, val_loss=mean)
    if progress.add_validation(mean):
        plan.files.keep_best(model)


def save(model: nn.Module, optimizer: optim.Optimizer, plan: Plan, finished: bool) -> None:
    """Save the adapter and the state; `finished` says if all that was due at it is done."""
    progress = plan.progress
    progress.finished = finished
    plan.files.save(model, named_state(model, optimizer), progress, plan.settings)
    best = checkpoint.best_file(plan.files.adapter)
    line = f"Iter {progress.iteration}: Saved adapter weights to {plan.files.adapter}."
    is_last = progress.iteration == plan.iters or progress.ended_for
    if finished and is_last and best.is_file():
        line += f" The best is of iteration {progress.best_iteration} "
        line += f"(validation {progress.best_loss:.3f}), in {best}."
    run_files.print_line(line)


def save_unfinished(model: nn.Module, optimizer: optim.Optimizer, plan: Plan, first: int) -> str:
    """Save the last whole iteration of a run that ends early; returns the words that say so.

    Args:
        first: the iteration that it started from.
    """
    progress = plan.progress
    if not plan.files.writes:
        return "process 0 saves what there is, if it has not gone"
    if progress.iteration == first:
        return "nothing new was saved"
    try:
        plan.files.save_elsewhere_if_shorter(progress.iteration)
        save(model, optimizer, plan, finished=progress.finished)
        plan.files.draw_losses()
    except Exception as error:  # a full disk, or a device that lets nothing be read any more
        return f"iteration {progress.iteration} could not be saved: {first_line(error)}"
    without = "" if plan.start_iter is None else " and without --start-iter"
    return (
        f"iteration {progress.iteration} is saved; the same command with "
        f"--resume-adapter-file {plan.files.adapter}{without} goes on"
    )


# --- Generation ---------------------------------------------------------------------------------


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: prompts.Prompt,
    vocab_size: int,
    temperature: float,
    seed: int,
) -> None:
    """Print the prompt, its continuation as it is generated, and a line with tokens per second."""
    print("Generating", flush=True)
    model.eval()
    mx.random.seed(seed)
    tokenizer.eos_token_ids |= prompt.end_tokens
    print(prompt.text, end="", flush=True)
    tokens, begun, before_space = [], False, tokenizer.decode(prompt.tokens) + " "
    for part in stream(model, tokenizer, prompt, vocab_size, temperature):
        text = part.text
        tokens.append(part.token)
        if text and not begun and tokenizer.decode(prompt.tokens + tokens).startswith(before_space):
            text = " " + text.lstrip(" ")  # which mlx-lm strips from the first word
        begun = begun or bool(text)
        if part.finish_reason:
            text = text.rstrip("\ufffd")  # a character that --max-tokens cut through
        print(text, end="", flush=True)
    print(f"\n========== {part.generation_tokens} tokens, {part.generation_tps:.3f} tokens/sec")


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: prompts.Prompt,
    vocab_size: int,
    temperature: float,
) -> Iterator[GenerationResponse]:
    """The continuation of a prompt; raises UserError at a token that the tokenizer lacks.

    Args:
        vocab_size: some models have logits for more tokens, which never come.
    """
    sample = make_sampler(temp=temperature)
    try:
        advice = memory.device_errors("shorten the prompt or lower --max-tokens")
        with advice, rope.text_lengths(len(prompt.tokens)):
            yield from stream_generate(
                model, tokenizer, prompt.tokens, max_tokens=prompt.max_tokens,
                sampler=lambda log_probabilities: sample(log_probabilities[..., :vocab_size]),
            )  # fmt: skip
    except (TypeError, IndexError) as error:  # mlx-lm's, by the kind of its detokenizer
        raise UserError(
            "the model generated a token that its tokenizer does not have; download both again"
        ) from error


# --- The run ------------------------------------------------------------------------------------


def warn_beyond_context(
    examples: dict[str, dataset.Examples], asked: list[prompts.Prompt], context_length: float
) -> None:
    """Warn where a text, or a prompt with its continuation, exceeds the model's context length."""
    lengths = [max(split.lengths) for split in examples.values()]
    lengths += [len(prompt.tokens) + prompt.max_tokens for prompt in asked]
    if max(lengths, default=0) > context_length:
        warn(
            f"the longest text, or the prompt with --max-tokens, has {max(lengths)} tokens, and "
            f"the model's context length is {context_length:.0f} (max_position_embeddings or the "
            "like in its config.json); quality may degrade beyond: lower --max-seq-length or "
            "--max-tokens"
        )


# Among the settings of a run, how a prompt is to be put to its adapter.
LEARNT_FORMAT = "the form of the texts"


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for, phase after phase.

    Where a launcher has started several processes, each takes its share of training, validation
    and test, and the first one does the rest.

    Raises:
        UserError, OSError: something that the user can put right.
    """
    if args.train or args.test:
        with distributed.join() as group:
            run_in(group, args)
    elif process_rank() == 0:
        run_in(ALONE, args)


def run_in(group: Group, args: argparse.Namespace) -> None:
    """The run of one of the processes."""
    plan = check(args, group.is_first)
    on_cpu = mx.default_device() == mx.cpu
    memory.processes_here = len(group.here)
    if on_cpu:
        linux_cpu.warn_of_slow_blas()
        linux_cpu.share_cores(len(group.here))
        linux_cpu.keep_freed_memory()
        linux_cpu.can_compile()  # or turns it off
    memory.set_limits(memory.available())
    with group.first_here():
        folder = model_folder.find_model(args.model or str(demo_model.fetch()))
    print("Loading pretrained model", flush=True)
    model, tokenizer = models.load(folder)
    with memory.device_errors("take a smaller or a quantized model"):
        limits, fingerprints = models.find_limits(model), models.fingerprints(model, folder)
        print(f"Total parameters {get_total_parameters(model) / 1e6:.3f}M")
        mx.random.seed(args.seed)
        layers = args.lora_layers if args.train else None
        adapters.adapt(model, plan.adapter, plan.source, layers, args.lora_rank, plan.scale)
        export.check_forms(plan.exports, model, folder)
        print(f"Trainable parameters {models.count_trainable(model) / 1e6:.3f}M", flush=True)
    if args.train:
        learnt = prompts.learnt_format(plan.data["train"], tokenizer)
    else:
        saved = checkpoint.settings_of(plan.source)
        learnt = saved.get(LEARNT_FORMAT)
    asked = prompts.encode(
        plan.prompts, args.prompt_format, learnt, args.system, tokenizer, args.max_tokens, limits
    )
    examples = dataset.load(
        plan.data, tokenizer, limits.vocab_size, bool(args.add_eos_token), args.mask_prompt,
        dataset.text_length(
            args.max_seq_length, "max_seq_length" in args.typed, limits.max_positions
        ),
    )  # fmt: skip
    warn_beyond_context(examples, asked, model_folder.context_length(folder))
    if group.size > 1:
        group.compare(to_compare(args, plan, model, examples, fingerprints))
    with patches.applied():
        with memory.device_errors("take a smaller or a quantized model"):
            # In here, so that a GPU compiles the kernels of these forms alone.
            loss = losses.make_loss(model) if plan.data else None
        if args.train:
            plan.settings.update(fingerprints | {LEARNT_FORMAT: learnt})
            train(model, loss, examples, plan, group)
        else:
            checkpoint.warn_of_other_model(plan.source, saved, fingerprints)
        if args.test:
            batches = args.batch_size, args.test_batches
            test(model, loss, examples["test"], *batches, group, plan.files.report)
    group.leave()
    if not group.is_first:
        return
    with models.merged(model) if asked else nullcontext():
        for prompt in asked:
            generate(model, tokenizer, prompt, limits.vocab_size, args.temp, args.seed)
    if plan.exports:
        export.write_all(plan.exports, model, folder, model_folder.public_name(args.model, folder))
    if args.train:
        commands = outcome.next_commands(args, plan.files.adapter, plan.progress)
        print(outcome.summary(plan.progress), *commands, sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_and_report_errors(partial(run, args), "the run"))
