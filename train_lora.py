"""Fine-tune a language model with LoRA on your own text, test it and generate with it, in MLX.

    python train_lora.py --train --test --prompt "질문"

The file follows a run: the command line, `run` with its phases in turn, training, test.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import date, datetime
from functools import partial
from pathlib import Path

import lora_finetune  # noqa: F401  first: on a Linux CPU it loads a fast BLAS for MLX
import models
from lora_finetune.adapters import export, loading
from lora_finetune.base import errors, linux_cpu, memory
from lora_finetune.base.command_line import (
    Parser,
    iterations_or_share,
    json_object,
    nonempty,
    nonnegative_number,
    positive_number,
    scale_number,
    whole_number,
    words_of,
)
from lora_finetune.base.errors import Interrupted, UserError, first_line, hint, print_line
from lora_finetune.base.signals import begin_process, process_rank
from lora_finetune.demo import demo_model
from lora_finetune.mlx_patches import attention, patches
from lora_finetune.mlx_patches.loading import Limits, find_limits
from lora_finetune.model_folder.files import context_length, fingerprints
from lora_finetune.model_folder.hub import find_model, public_name
from lora_finetune.model_folder.targets import ROLES, WORDS
from lora_finetune.run import checkpoint, generate, ollama, report, show
from lora_finetune.run.config import FORMS, PROMPT_FORMATS, Config, read_config
from lora_finetune.run.run import Run, must_agree, open_run
from lora_finetune.texts import batching, dataset, prompts, tokenizing
from lora_finetune.texts.chat import Template, template_of
from lora_finetune.training import distributed, frozen_prefix, losses, shard
from lora_finetune.training import step as training_step
from lora_finetune.training.distributed import ALONE, Group
from lora_finetune.training.losses import Loss
from lora_finetune.training.optimizer import SCHEDULES
from lora_finetune.training.step import NotFiniteError, Trainer

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import get_total_parameters
from tqdm import tqdm

# --- The command line ---------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The flags, phase by phase; those of no single phase stand in a group of their own."""
    parser = Parser(
        prog="train_lora.py",
        usage="%(prog)s [--train] [--test] [--prompt TEXT] [--export FORM PATH] [other flags]",
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
    add("--model", nonempty, None, "folder, or hub repository OWNER/NAME[@REVISION] (default: demo "
        "model)")  # fmt: skip
    add("--data", nonempty, "lora_finetune/data", "folder of {train,valid,test}.jsonl",
        metavar="FOLDER")  # fmt: skip
    add("--add-eos-token", int, 1, "append the end-of-text token to each text: 1, or 0",
        choices=(0, 1))  # fmt: skip
    add("--seed", whole_number(0), 0, "random seed")

    parser.section("training")
    add("--lora-layers", positive, 16, "layers to adapt, counted from the last")
    add("--batch-size", positive, 10, "texts in a batch")
    add("--epochs", positive, 1, "passes over the texts; overrides --iters")
    add("--iters", positive, None, "iterations, in place of epochs")
    add("--start-iter", whole_number(0), 0, "iterations done before; the checkpoint has them too")
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
    add("--targets", words_of(*WORDS, *ROLES), "qv", f"adapt {', '.join(WORDS)}, or roles such as "
        "q,v,down", metavar="ROLES")  # fmt: skip
    add("--lora-rank", whole_number(1, below=2**16), None, "rank of the LoRA update (default: 8)")
    add("--lora-scale", scale_number, None, "scale of the LoRA update (default: 20.0)")
    add("--lr-schedule", str, "constant", f"rate over the run: {', '.join(SCHEDULES)}",
        choices=SCHEDULES, metavar="FORM")  # fmt: skip
    add("--warmup", iterations_or_share, "0", "iterations of rising learning rate, or N%% of all")
    add("--max-grad-norm", positive_number, None, "scale gradients of a larger norm down to it")
    add("--optimizer", str, "adam", "adam or adamw", choices=("adam", "adamw"), metavar="FORM")
    add("--weight-decay", nonnegative_number, None, "weight decay of adamw (default: 0.01)")
    switch("--bias-correction", "correct Adam's moments for their start at 0, as PyTorch does")
    add("--patience", positive, None, "early-stopping patience, in validations")
    add("--chat-template-args", json_object, None, "arguments of the chat template, such as "
        "'{\"enable_thinking\": false}'", metavar="JSON")  # fmt: skip
    switch("--no-adapter", "test and ask the model without an adapter, to compare")
    add("--show-texts", positive, None, "show so many training texts as they are learnt, and end")
    switch("--shard", "with mlx.launch: hold only a part of the model in each process")
    switch("--plain", "use MLX's own attention, activations, losses and recurrences")
    add("--prompt-format", str, "auto", f"prompt format: {', '.join(PROMPT_FORMATS)}",
        choices=PROMPT_FORMATS, metavar="FORM")  # fmt: skip
    add("--system", nonempty, None, "system message for the chat form of a prompt", metavar="TEXT")
    add("--export", str, None, f"write the result as {', '.join(FORMS)}", action="append", nargs=2,
        metavar=("FORM", "PATH"))  # fmt: skip
    return parser


def main() -> None:
    begin_process()
    config = read_config(build_parser())
    # Several processes, where a launcher has started them, share these, or with --shard all.
    shares_work = config.train or config.test or config.shard
    if not shares_work and process_rank() > 0:
        return
    if config.show_texts:
        return show.show(config)
    with distributed.join() if shares_work else nullcontext(ALONE) as group:
        run_phases(config, group)


# --- The run ------------------------------------------------------------------------------------

Files = dict[str, dataset.File]  # by the names of their splits
Splits = dict[str, batching.Examples]

# Names among the settings of a run.
LEARNT_FORMAT, DAY = "the form of the texts", "the day of the first run"
ARGUMENTS = "the arguments of the chat template"
SMALLER_BATCHES = "lower --batch-size, --max-seq-length or --lora-layers"


def run_phases(config: Config, group: Group) -> None:
    """Check, load, adapt, read, train, test, generate, export; raises UserError or OSError.

    Several processes share all up to the test; the first does the rest.
    """
    files = read_files(config)
    run = open_run(config, files, group)
    texts, exports = read_requests(config) if group.is_first else ([], [])

    prepare_device(config, group)
    folder, model, tokenizer, identity = load(run, group)
    with memory.device_errors("take a smaller or a quantized model"):
        limits = find_limits(model)
        adapt(run, model)
    export.check_forms(exports, model, folder)

    if config.train:
        run.settings |= identity | {LEARNT_FORMAT: prompts.learnt_format(files["train"], tokenizer)}
    template = read_template(run, files, tokenizer)
    asked = encode_prompts(run, texts, tokenizer, template, limits)
    examples = read_examples(config, files, tokenizer, template, limits)
    prompts.warn_beyond_context(examples, asked, context_length(folder))
    if not (config.train or config.no_adapter):
        checkpoint.warn_of_changes(run.adapter, run.start.settings, identity)
    if group.size > 1:
        group.compare(must_agree(run, model, examples, identity))

    plain = config.plain or losses.disagree_on_metal(examples, model)
    with nullcontext() if plain else patches.applied():
        loss = losses.make_loss(model, plain) if files else None
        if config.train:
            answers = partial(generate.begin, model, tokenizer, asked, limits.vocab_size, group)
            train(run, model, loss, examples, answers)
        if config.test:
            test(run, model, loss, examples["test"])
    group.leave()
    generate.generate_all(config, model, tokenizer, asked, limits.vocab_size, group)
    if group.is_first:
        write_exports(run, exports, model, folder, tokenizer, template)
        report.print_outcome(run, examples)


def read_files(config: Config) -> Files:
    """The data files of the phases that are asked for, by their splits."""
    splits = ["train", "valid"] * config.train + ["test"] * config.test
    files = {split: Path(config.data, f"{split}.jsonl") for split in splits}
    if config.train and files["train"].exists() and not files["valid"].exists():
        del files["valid"]  # some training texts are held out in its place
    return {split: dataset.read(file, config.mask_prompt) for split, file in files.items()}


def read_requests(config: Config) -> tuple[list[str], list[export.Export]]:
    """The prompts and the exports asked for, checked before a model is fetched for them."""
    exports = [(form, Path(path)) for form, path in config.export or []]
    export.check_paths(exports, Path(config.adapter_file))
    return prompts.read(config.prompt or []), exports


def prepare_device(config: Config, group: Group) -> None:
    """Let MLX, and on a CPU the libraries below it, take what there is, and no more."""
    memory.processes, memory.processes_here = group.size, group.processes_here
    group.compare({"--shard": config.shard})  # on which it depends what they exchange
    if config.shard:
        group.share_weights()
    if mx.default_device() == mx.cpu:
        linux_cpu.prepare()
        linux_cpu.can_compile()  # if MLX cannot, this turns it off
    memory.set_limits(memory.available())


def load(run: Run, group: Group) -> tuple[Path, nn.Module, TokenizerWrapper, dict[str, str]]:
    """The folder of the model, which is fetched if need be, the model, its tokenizer, checksums."""
    with group.first_ahead():
        folder = find_model(run.model or str(demo_model.fetch()), models.check_settings)
    print_line("Loading pretrained model")
    known = {}  # first numbers of what other processes hold
    share_out = partial(shard.share_out, group=group, numbers=known)
    model, tokenizer = models.load(folder, share_out if group.shares_weights else None)
    return folder, model, tokenizer, fingerprints(model, folder, known)


def adapt(run: Run, model: nn.Module) -> None:
    """Put LoRA into the model, with the adapter to start from."""
    print_line(f"Total parameters {get_total_parameters(model) / 1e6:.3f}M")
    config, start = run.config, run.start
    mx.random.seed(config.seed)
    layers, targets = (config.lora_layers, config.targets) if config.train else (None, None)
    rank, scale = config.lora_rank, start.scale
    roles = loading.adapt(model, start.adapter, start.source, layers, rank, scale, targets)
    if config.train:
        run.settings["--targets"] = roles
    print_line(f"Trainable parameters {models.count_trainable(model) / 1e6:.3f}M")


def read_template(run: Run, files: Files, tokenizer: TokenizerWrapper) -> Template | None:
    """The model's chat template, with the arguments and the day that an adapter's texts have."""
    typed, saved = run.config.chat_template_args, run.start.settings
    if typed and not tokenizer.has_chat_template:
        raise UserError("--chat-template-args: this model has no chat template")
    if run.config.train:  # a row's own arguments count more, and are for prompts if all have them
        of_rows = files["train"].arguments
        run.settings[ARGUMENTS] = json.dumps(json.loads(typed or "{}") | of_rows, sort_keys=True)
    template = template_of(tokenizer, typed or run.settings.get(ARGUMENTS))
    if template and template.has_date and (run.config.train or DAY in saved):
        day = saved.get(DAY) or date.today().isoformat()
        run.settings |= {DAY: day} if run.config.train else {}
        template.now = datetime.fromisoformat(day)
    return template


def encode_prompts(
    run: Run, texts: list[str], tokenizer: TokenizerWrapper, template: Template | None,
    limits: Limits,
) -> list[prompts.Prompt]:  # fmt: skip
    config, learnt = run.config, run.settings.get(LEARNT_FORMAT)
    if run.group.shares_weights:  # then all take part
        texts = run.group.texts_of_first(texts)
    form, system, most = config.prompt_format, config.system, config.max_tokens
    template = template and replace(template, now=None)  # a prompt is of today
    return prompts.encode(texts, form, learnt, system, tokenizer, template, most, limits)


def read_examples(
    config: Config, files: Files, tokenizer: TokenizerWrapper, template: Template | None,
    limits: Limits,
) -> Splits:  # fmt: skip
    add_eos, length = bool(config.add_eos_token), min(config.max_seq_length, limits.max_positions)
    return tokenizing.load(
        files, tokenizer, template, limits.vocab_size, add_eos, config.mask_prompt, length
    )


def write_exports(
    run: Run, exports: list[export.Export], model: nn.Module, folder: Path,
    tokenizer: TokenizerWrapper, template: Template | None,
) -> None:  # fmt: skip
    """Write the adapter in the forms asked for, so that prompts go in as the texts were."""
    learnt, (name, _) = run.settings.get(LEARNT_FORMAT), public_name(run.model, folder)
    own = prompts.own_template(learnt, tokenizer)
    told = {n: run.settings[n] for n in (LEARNT_FORMAT, ARGUMENTS, DAY) if n in run.settings}
    export.write_all(exports, model, folder, run.model, own, told)
    ollama.write_all(exports, name, learnt, template, tokenizer)


# --- Training -----------------------------------------------------------------------------------


Answers = Callable[[], list[str]]  # their beginnings, to the prompts, as the model is now


def train(run: Run, model: nn.Module, loss: Loss, examples: Splits, answers: Answers) -> None:
    """Train to the last iteration, or to the one at which a signal asks for a stop.

    Raises:
        UserError: a loss, a gradient or a parameter is not finite; nothing of it is saved. Or the
            device failed, or another process; the last whole iteration is saved.
        Interrupted: a signal asked for a stop; the last whole iteration is saved.
    """
    config, group, texts = run.config, run.group, examples["train"]
    run.begin()
    longest, cut = texts.lengths.max(), texts.num_truncated
    size = f"{len(texts)} examples, {len(texts.tokens)} tokens, longest {longest}, {cut} cut"
    print_line(f"Training: {size}")
    if number := models.count_trainable(model, of_experts=True):
        hint(f"{number / 1e6:.3f}M of the trainable parameters are the experts', each has its own")
    if told := attention.repeats():
        hint(told)
    # Each process keeps states of other texts, so with --shard they would not gather together.
    if prefix := not group.shares_weights and frozen_prefix.find(model):
        loss = prefix.loss(loss)
        examples = {s: frozen_prefix.WithStates(prefix, examples[s]) for s in ("train", "valid")}
    model.train()  # before the step is traced: some layers have kernels without a gradient else
    moments = run.start.state.optimizer if run.start.state else {}
    trainer = Trainer(model, loss, run.optimizer, moments, group, run.progress.iteration)
    with saved_on_failure(run, trainer), memory.device_errors(SMALLER_BATCHES):
        rows, progress = -(-config.batch_size // group.size), run.progress
        progress.micro_batches = training_step.fit_memory(
            model, loss, examples["train"], rows, progress.micro_batches, group
        )
        if prefix:
            frozen_prefix.keep_states(examples, run)
        training_loop(run, model, loss, examples, trainer, answers)
    report.draw_losses(run)


def training_loop(
    run: Run, model: nn.Module, loss: Loss, examples: Splits, trainer: Trainer, answers: Answers
) -> None:
    """Step after step to the last iteration; once in a while report, validate and save.

    A resumed run begins with what was left undone at the iteration at which it was stopped.
    """
    config, progress, group = run.config, run.progress, run.group
    batches = batching.training_batches(
        examples["train"], config.batch_size, config.seed, progress.iteration,
        progress.micro_batches, group.rank, group.size,
    )  # fmt: skip
    steps = trainer.steps(batches, ahead=partial(may_begin_next, run))
    start, options = progress.iteration, errors.bar_options()
    bar = tqdm(desc="Training", initial=start, total=run.iters, **options)
    for iteration in range(progress.iteration, run.iters + 1):
        last = iteration == run.iters
        if iteration > progress.iteration:
            progress.add(*next(steps))  # raises where it is not finite
            report.warn_of_jump(run, examples["train"])
            bar.update()
            group.check_stop()
        if progress.steps and (last or progress.every(config.steps_per_report)):
            report.report_training(run)
        due = progress.validated < 0 or last or progress.every(config.steps_per_eval)
        if due and progress.validated != iteration:
            validate(run, model, loss, examples["valid"], answers)
        if config.patience and progress.not_improved >= config.patience and not last:
            report.report_early_stop(run)
            last = True
        if last or (progress.every(config.save_every) and not progress.finished):
            progress.finished = True
            save(run, trainer, last)
        group.check_stop()
        if last:
            break
    bar.close()


def may_begin_next(run: Run) -> bool:
    """Whether nothing is due after the present step, nor does it wait in its middle."""
    config, progress, following = run.config, run.progress, run.progress.iteration + 1
    every = config.steps_per_report, config.steps_per_eval, config.save_every
    is_due = following == run.iters or any(following % number == 0 for number in every)
    is_whole = run.group.size == progress.micro_batches == 1
    return training_step.AHEAD and is_whole and not is_due


def validate(
    run: Run, model: nn.Module, loss: Loss, examples: batching.Examples, answers: Answers
) -> None:
    """Report the validation loss and the answers to prompts; keep the adapter if it is the best.

    The validation before the first step is reported with the number of that step.
    """
    progress, start = run.progress, time.perf_counter()
    batches = run.config.batch_size, run.config.val_batches
    mean = losses.evaluate(model, loss, examples, *batches, run.group, progress.micro_batches)
    model.train()
    took = time.perf_counter() - start
    training_step.check_finite(mean, "the validation loss")
    iteration = progress.iteration + (progress.validated < 0)
    print_line(f"Iter {iteration}: Val loss {mean:.3f}, Val took {took:.3f}s")
    told = answers()
    for text in told:
        print_line(f"Iter {iteration}: Answer: {' '.join(text.split())}")
    run.add_to_log({"iter": iteration, "val_loss": mean} | ({"answers": told} if told else {}))
    if progress.add_validation(mean):
        run.keep_best(model)


def save(run: Run, trainer: Trainer, last: bool = False) -> None:
    """Save the adapter and the state of the run, and say so."""
    progress = run.progress
    run.save(trainer.model, trainer.named_moments())
    line = f"Iter {progress.iteration}: Saved adapter weights to {run.adapter}."
    if last and run.best.is_file():
        line += f" The best is of iteration {progress.best_iteration} "
        line += f"(validation {progress.best_loss:.3f}), in {run.best}."
    print_line(line)


@contextmanager
def saved_on_failure(run: Run, trainer: Trainer) -> Iterator[None]:
    """While it lasts, whatever ends training saves the last whole iteration first.

    After a loss that is not finite only the best adapter is saved: those before it may be bad too.
    """
    save_now = partial(save_unfinished, run, trainer, run.progress.iteration)
    with run.group.hear_stops():  # during the save too
        try:
            yield
        except Interrupted as interrupted:
            raise Interrupted(interrupted.signal, save_now()) from None
        except (memory.DeviceError, OSError) as error:
            why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
            raise UserError(f"{why}; {save_now()}") from error
        except NotFiniteError as error:
            at, best = run.progress.iteration, run.progress.best_iteration
            kept = f"what {run.adapter} held before is still there"
            if best > 0 and run.save_best():
                kept = f"the best adapter, of iteration {best}, is {run.best}"
            raise UserError(
                f"{error} after iteration {at}; a lower --learning-rate may help, and {kept}"
            ) from None


def save_unfinished(run: Run, trainer: Trainer, first: int) -> str:
    """Save the last whole iteration after the `first`, and return the words that say so."""
    iteration = run.progress.iteration
    if not run.group.is_first:
        return "process 0 saves what there is, if it has not gone"
    if iteration == first:
        return "nothing new was saved"
    try:
        save(run, trainer)
        report.draw_losses(run)
    except Exception as error:  # a full disk, or a device that lets nothing be read any more
        return f"iteration {iteration} could not be saved: {first_line(error)}"
    without = "" if run.config.start_iter is None else " and without --start-iter"
    return (
        f"iteration {iteration} is saved; the same command with "
        f"--resume-adapter-file {run.adapter}{without} goes on"
    )


# --- Test ---------------------------------------------------------------------------------------


def test(run: Run, model: nn.Module, loss: Loss, examples: batching.Examples) -> None:
    """Report the loss and the perplexity on the test set."""
    config, group = run.config, run.group
    print_line("Testing")
    with memory.device_errors("lower --batch-size or --max-seq-length"), group.hear_stops():
        mean = losses.evaluate(model, loss, examples, config.batch_size, config.test_batches, group)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    print_line(f"Test loss {mean:.3f}, Test ppl {perplexity:.3f}.")
    run.add_to_log({"test_loss": mean, "test_ppl": perplexity})


if __name__ == "__main__":
    main()
