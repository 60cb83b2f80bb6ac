"""The reports of a run: lines while it trains, a picture of its losses, a summary at its end."""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from lora_finetune.base.errors import UserError, first_line, print_line, warn
from lora_finetune.base.files import atomic_write
from lora_finetune.run.config import command
from lora_finetune.run.run import Run
from lora_finetune.texts import batching

import mlx.core as mx


def report_training(run: Run) -> None:
    """Report the training loss and speed since the last report, and begin new sums."""
    progress, optimizer = run.progress, run.optimizer
    numbers = {
        "train_loss": progress.total / max(progress.tokens, 1),
        "it_per_sec": progress.steps / progress.seconds,
        "tokens_per_sec": progress.tokens / progress.seconds,
        "peak_mem_gb": mx.get_peak_memory() / 1e9,
        "learning_rate": optimizer.rate(progress.iteration),  # this and the next of the last step
        "grad_norm": progress.norms[-1],
    }
    rate = f", Learning rate {numbers['learning_rate']:.3e}" if optimizer.varies else ""
    print_line(
        f"Iter {progress.iteration}: Train loss {numbers['train_loss']:.3f}, "
        f"It/sec {numbers['it_per_sec']:.3f}, Tokens/sec {numbers['tokens_per_sec']:.3f}, "
        f"Peak mem {numbers['peak_mem_gb']:.3f} GB{rate}"
    )
    run.add_to_log({"iter": progress.iteration} | numbers)
    progress.total, progress.tokens, progress.steps, progress.seconds = 0.0, 0, 0, 0.0


UNUSUAL = 10.0  # times the median; a text that is broken shows in the norm of the gradient first


def warn_of_jump(run: Run, texts: batching.Examples) -> None:
    """Warn where the gradient of the last iteration is far larger than those before it."""
    progress, config = run.progress, run.config
    if progress.jump <= UNUSUAL:
        return
    rows = batching.rows_of(texts.lengths, config.batch_size, config.seed, progress.iteration)
    lines = ", ".join(map(str, sorted(run.lines[rows])[:10])) + ", …" * (len(rows) > 10)
    warn(
        f"iteration {progress.iteration}: the gradient's norm ({progress.norms[-1]:.3g}) is "
        f"{progress.jump:.0f} times the median of those before; look at "
        f"train.jsonl, lines {lines}"
    )


def report_early_stop(run: Run) -> None:
    """Say that training ends for lack of better losses, after a last report."""
    progress = run.progress
    if progress.steps:
        report_training(run)
    print_line(
        f"Iter {progress.iteration}: Training ends, since the validation loss did not improve in "
        f"{progress.not_improved} validations after iteration {progress.best_iteration}."
    )


# --- The picture --------------------------------------------------------------------------------


def draw_losses(run: Run) -> None:
    """Draw the training and validation losses in the log of a run, from two training reports on.

    A picture that cannot be drawn is a warning.
    """
    if not run.group.is_first or run.replaces:
        return
    try:
        entries = [json.loads(line) for line in run.log_lines]
        training = [entry for entry in entries if entry.get("train_loss") is not None]
        if len(training) < 2:
            return
        from matplotlib.figure import Figure  # not above: it takes long, and not every run draws

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        plot_losses(figure, training, [e for e in entries if e.get("val_loss") is not None])
        with atomic_write(run.picture) as [stream]:
            figure.savefig(stream, format="png", dpi=150)
    except (ImportError, UserError, RuntimeError, ValueError, OSError) as error:
        warn(f"the losses are in {run.log}, but not drawn: {first_line(error)}")


def plot_losses(figure: Any, training: list[dict], validation: list[dict]) -> None:
    """Training as a thin line, validation dashed with points, the best marked with a star.

    Told apart without colour. A learning rate that changes is dotted, with an axis of its own.
    """
    axes = figure.subplots()
    iterations, losses = zip(*((e["iter"], e["train_loss"]) for e in training), strict=True)
    axes.plot(iterations, losses, color="0.55", linewidth=1, label="training")
    if validation:
        # The first comes before the first step, and has its number.
        iterations = [e["iter"] - (i == 0) for i, e in enumerate(validation)]
        losses = [e["val_loss"] for e in validation]
        axes.plot(iterations, losses, "o--", color="black", markersize=4, label="validation")
        best = min(losses)
        at = iterations[losses.index(best)]
        label = f"best: {best:.3f} at iteration {at}"
        axes.plot(at, best, "*", color="black", markersize=14, label=label)
    axes.set_xlabel("Iteration")
    axes.set_ylabel("Loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend()
    iterations, rates = zip(*((e["iter"], e.get("learning_rate")) for e in training), strict=True)
    if len(set(rates)) > 1:
        right = axes.twinx()
        right.plot(iterations, rates, ":", color="0.55", linewidth=1)
        right.set_ylabel("Learning rate (dotted)")


# --- The end ------------------------------------------------------------------------------------


# The best adapter on fewer validation texts may be the best by chance.
MIN_VALIDATED = 20


def print_outcome(run: Run, examples: dict[str, batching.Examples]) -> None:
    """Print the outcome of training if there was any, and commands that use it or go on."""
    config, progress = run.config, run.progress
    if not config.train:
        return
    told = (
        f"Validation loss {progress.first_loss:.3f} before, {progress.last_loss:.3f} after, "
        f"{progress.best_loss:.3f} at best (iteration {progress.best_iteration})"
    )
    adapter = run.adapter
    if progress.best_iteration != progress.iteration and run.best.is_file():
        number = len(examples["valid"])
        if config.val_batches > 0:
            number = min(number, config.batch_size * config.val_batches)
        if number >= MIN_VALIDATED:
            adapter = run.best
        else:
            told += f"; of {number} texts that may be chance, so the last adapter is named below"
    print_line(told, sys.stderr)
    print_line("\n".join(commands(run, adapter)), sys.stderr)


def commands(run: Run, adapter: Path) -> list[str]:
    """Commands that ask and export an adapter, and that go on training."""
    config = run.config
    is_default = adapter == run.adapter and "adapter_file" not in config.typed
    flags = {"--model": config.model, "--adapter-file": None if is_default else adapter}
    asked = [text for text in config.prompt or [] if text != "-"]
    ask = flags | config.typed_flags("asking") | {"--prompt": [*asked, run.question][0]}
    names = (run.adapter.with_suffix(f".merged{number or ''}") for number in count())
    merged = next(name for name in names if not name.exists())
    return [
        f"Ask it:    {command(ask)}",
        f"Go on:     {config.command_to_go_on(run.adapter)}",
        f"Export it: {command(flags | {'--export': ['merged', str(merged)]})}",
    ]
