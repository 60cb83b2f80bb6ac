"""What a training run came to: a picture of its losses, a summary, and what to do next."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from lora_finetune.base.errors import UserError, first_line, warn
from lora_finetune.base.files import atomic_write
from lora_finetune.run.checkpoint import Progress, best_file, sibling

import numpy as np

# --- The picture --------------------------------------------------------------------------------


def draw_losses(log: Path, picture: Path) -> None:
    """Draw the training and validation loss of a run over its iterations, as its log has them.

    Nothing is drawn of fewer than two training reports; a picture that cannot be drawn is a
    warning.
    """
    reports = read_log(log)
    training, validation = losses(reports, "train_loss"), losses(reports, "val_loss")
    if len(training) < 2:
        return
    if validation and validation[0]["iter"] == 1:
        validation[0]["iter"] = 0  # it came before the first step
    try:
        from matplotlib.figure import Figure  # not above: it takes long, and not every run draws

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        plot_losses(figure, training, validation)
        with atomic_write(picture) as [stream]:
            figure.savefig(stream, format="png", dpi=150)
    except (ImportError, UserError, RuntimeError, ValueError, OSError) as error:
        warn(f"the losses are in {log}, but not drawn: {first_line(error)}")


def read_log(log: Path) -> list[dict[str, Any]]:
    """The reports in a log; what is no report is left out."""
    reports = []
    with suppress(OSError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
                reports += [entry] if isinstance(entry, dict) else []
    return reports


def losses(reports: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The reports with a loss of this name; where the log goes back, what came later counts."""
    found: list[dict[str, Any]] = []
    kept = 1 if name == "val_loss" else 0  # that before the first step has the step's number too
    for report in reports:
        loss = report.get(name)
        if type(loss) is float and abs(loss) < 1e9 and is_count(report.get("iter")):
            while len(found) > kept and found[-1]["iter"] >= report["iter"]:
                found.pop()
            found.append(report)
    return found


def is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**53


def plot_losses(figure: Any, training: list[dict], validation: list[dict]) -> None:
    """Training as a thin line, validation as a dashed one with points, the best of it marked.

    Told apart without colour. On the upper axis are the target tokens seen.
    """
    axes = figure.subplots()
    iterations = [report["iter"] for report in training]
    axes.plot(
        iterations, [r["train_loss"] for r in training], color="0.55", linewidth=1, label="training"
    )
    if validation:
        points = [report["iter"] for report in validation], [r["val_loss"] for r in validation]
        marker = "o" if len(validation) <= 60 else None
        axes.plot(*points, "--", color="black", marker=marker, markersize=4, label="validation")
        best = min(validation, key=lambda report: report["val_loss"])
        axes.plot(
            best["iter"], best["val_loss"], "*", color="black", markersize=14,
            label=f"best: {best['val_loss']:.3f} at iteration {best['iter']}",
        )  # fmt: skip
    axes.set_xlabel("Iteration")
    axes.set_ylabel("Loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend()
    tokens = [report.get("tokens") for report in training]
    if all(map(is_count, tokens)) and sorted(set(tokens)) == tokens:
        upper = axes.secondary_xaxis("top")
        ticks = nice_ticks(tokens[-1])
        upper.set_xticks(
            np.interp(ticks, [0, *tokens], [0, *iterations]), [f"{n:,}" for n in ticks]
        )
        upper.set_xlabel("Target tokens seen")


def nice_ticks(most: int) -> list[int]:
    """Some five round numbers up to this one."""
    step = 10 ** int(np.log10(max(most / 5, 1)))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (factor * step) <= 6)
    return list(range(0, most + 1, step))


# --- In words -----------------------------------------------------------------------------------


def summary(progress: Progress) -> str:
    """A run in one line: its validation losses, iterations, tokens and time."""
    found = [
        f"{loss:.3f} {when}"
        for loss, when in [
            (progress.first_loss, "before"),
            (progress.last_loss, "after"),
            (progress.best_loss, f"at best (iteration {progress.best_iteration})"),
        ]
        if np.isfinite(loss)
    ]
    minutes, seconds = divmod(round(progress.trained_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    time = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
    time = time.removeprefix("0 min ")
    return (
        f"Validation loss {', '.join(found)}; {progress.iteration} iterations, "
        f"{progress.trained_tokens:,} tokens, {time} of training."
    )


# The flags with a value that a run which goes on has again, where they were typed.
OF_TRAINING = (
    *("model", "add_eos_token", "data", "lora_layers", "batch_size", "epochs", "iters"),
    *("val_batches", "learning_rate", "steps_per_report", "steps_per_eval", "adapter_file"),
    *("save_every", "seed", "max_seq_length", "lora_rank", "lora_scale", "patience"),
)


def next_commands(args: argparse.Namespace, adapter: Path, progress: Progress) -> list[str]:
    """Command lines that ask the model, go on with its training, and export it.

    Args:
        adapter: where it was saved; where the best is another, that is asked and exported.
    """
    best = best_file(adapter)
    if progress.best_iteration == progress.iteration or not best.is_file():
        best = adapter
    use = {"model": args.model, "adapter_file": best}
    typed = {name: value for name, value in vars(args).items() if name in args.typed}
    more = {"iters": 2 * args.iters} if args.iters else {"epochs": 2 * args.epochs}
    again = {name: typed[name] for name in OF_TRAINING if name in typed} | more
    again |= {"train": True, "mask_prompt": args.mask_prompt, "resume_adapter_file": adapter}
    folders = (sibling(adapter, f"merged{number or ''}") for number in count())
    folder = next(folder for folder in folders if not folder.exists())
    return [
        f"Ask it:    {command(use | {'prompt': '안녕하세요?'})}",
        f"Go on:     {command(again)}",
        f"Export it: {command(use | {'export': ['merged', folder]})}",
    ]


def command(flags: dict[str, Any]) -> str:
    """A command line of this program, quoted for the shell; what is None or False is left out."""
    words = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [] if value is True else [value]
        values = [str(value) for value in values]
        if len(values) == 1 and values[0].startswith("-"):
            words.append(f"{flag}={values[0]}")
        else:
            words += [flag, *(f"./{v}" if v.startswith("-") else v for v in values)]
    return shlex.join(words)
