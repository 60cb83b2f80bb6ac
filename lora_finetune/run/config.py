"""The configuration of a run: the command line's flags, and what is derived from them alone."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from lora_finetune.base.command_line import in_project
from lora_finetune.base.errors import is_unicode, warn

FORMS = ("mlx-lm", "peft", "gguf", "merged", "merged-float")  # of --export
PROMPT_FORMATS = ("auto", "raw", "chat", "qa")


# Marks of flags: those that change the result of training, which a resumed run compares; those that
# the command to go on repeats; and those that the command to ask repeats.
RESULT, TRAINING, ASKING = {"result": True, "training": True}, {"training": True}, {"asking": True}


@dataclass(frozen=True)
class Config:
    """The flags of the command line under their own names, as `train_lora.py --help` has them.

    `iters` is None where epochs count, `lora_layers` and `targets` where the adapter file to resume
    decides, and `start_iter` where the state beside it does. `typed` names the flags that were
    typed.
    """

    train: bool
    test: bool
    model: str | None = field(metadata=TRAINING)
    data: str = field(metadata=TRAINING)
    adapter_file: str = field(metadata=TRAINING)
    resume_adapter_file: str | None
    no_adapter: bool
    add_eos_token: int = field(metadata=RESULT)
    seed: int = field(metadata=RESULT)
    batch_size: int = field(metadata=RESULT)
    learning_rate: float = field(metadata=RESULT)
    lr_schedule: str = field(metadata=RESULT)
    warmup: str = field(metadata=RESULT)
    max_grad_norm: float | None = field(metadata=RESULT)
    optimizer: str = field(metadata=RESULT)
    weight_decay: float = field(metadata=RESULT)
    bias_correction: bool = field(metadata=RESULT)
    val_batches: int = field(metadata=RESULT)
    max_seq_length: int = field(metadata=RESULT)
    mask_prompt: bool = field(metadata=RESULT)
    lora_scale: float | None = field(metadata=RESULT)
    plain: bool = field(metadata=RESULT)
    shard: bool = field(metadata=TRAINING | ASKING)
    chat_template_args: str | None = field(metadata=TRAINING)
    lora_layers: int | None = field(metadata=TRAINING)
    targets: str | None = field(metadata=TRAINING)
    lora_rank: int | None = field(metadata=TRAINING)
    epochs: int = field(metadata=TRAINING)
    iters: int | None = field(metadata=TRAINING)
    steps_per_report: int = field(metadata=TRAINING)
    steps_per_eval: int = field(metadata=TRAINING)
    save_every: int = field(metadata=TRAINING)
    patience: int | None
    start_iter: int | None
    test_batches: int
    prompt: list[str] | None
    prompt_format: str = field(metadata=ASKING)
    system: str | None = field(metadata=ASKING)
    max_tokens: int = field(metadata=ASKING)
    temp: float = field(metadata=ASKING)
    export: list[list[str]] | None
    show_texts: int | None
    typed: frozenset[str]

    def flags(self, mark: str = "") -> dict[str, Any]:
        """All flags, or those with a mark: "result", "training" or "asking"."""
        marked = [f.name for f in fields(self) if f.name != "typed" and mark in ("", *f.metadata)]
        return {flag_name(name): getattr(self, name) for name in marked}

    def typed_flags(self, mark: str) -> dict[str, Any]:
        """The flags with a mark whose defaults do not do."""
        typed = {flag_name(name) for name in self.typed}
        return {n: v for n, v in self.flags(mark).items() if n in typed or v is True}

    def command_to_go_on(self, adapter: str) -> str:
        """The command line that trains this adapter for twice as long."""
        length = {"--iters": 2 * self.iters} if self.iters else {"--epochs": 2 * self.epochs}
        return command(
            {"--train": True}
            | self.typed_flags("training")
            | length
            | {"--resume-adapter-file": adapter}
        )


def flag_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def command(flags: dict[str, Any]) -> str:
    """A command line of this program, quoted for the shell; None and False are left out."""
    words = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    for flag, value in flags.items():
        if value is True:
            words.append(flag)
        elif isinstance(value, list):  # --export, whose path may begin with a dash
            words += [flag, *(f"./{word}" if word.startswith("-") else word for word in value)]
        elif value is not None and value is not False:
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """A word quoted for the shell, in one line: with line ends as bash and zsh have them."""
    if "\n" not in word:
        return shlex.quote(word)
    for plain, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n")):
        word = word.replace(plain, escaped)
    return f"$'{word}'"


def read_config(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> Config:
    """Parse the command line, and check the flags against each other; errors end the program.

    A default path is one in this project, wherever the program is called from.
    """
    args = parser.parse_args(argv)
    check_flags(parser, args)
    for name in {"data", "adapter_file"} - args.typed:
        setattr(args, name, in_project(getattr(args, name)))
    if {"iters", "epochs"} <= args.typed:
        warn(f"--iters {args.iters} is ignored, since --epochs {args.epochs} is given too")
        args.iters = None
    # os.path's answer False for a name that is too long, where a Path raises.
    is_there = os.path.isdir if args.train else os.path.exists
    if not args.adapter_file.endswith(".npz") and not is_there(args.adapter_file):
        args.adapter_file += ".npz"
        if args.train:
            warn(f"adapters are saved as .npz files, so this one is {args.adapter_file}")
    if "weight_decay" not in args.typed:
        args.weight_decay = 0.01 if args.optimizer == "adamw" else 0.0  # PyTorch's default
    for name in {"lora_layers", "targets"} - args.typed if args.resume_adapter_file else ():
        setattr(args, name, None)
    if "start_iter" not in args.typed:
        args.start_iter = None
    return Config(**vars(args))


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error where flags do not go together."""
    if not (args.train or args.test or args.prompt or args.export or args.show_texts):
        parser.error("nothing to do: ask for --train, --test, --prompt, --export or --show-texts")
    if not all(map(is_unicode, [*(args.prompt or []), args.system or ""])):
        parser.error("argument --prompt or --system: is not UTF-8")
    if args.system and not (args.prompt and args.prompt_format in ("auto", "chat")):
        parser.error("argument --system: is for a --prompt in the chat form")
    if args.resume_adapter_file and not args.train:
        parser.error("argument --resume-adapter-file: resumes training, so it needs --train")
    if args.no_adapter and (args.train or args.export):
        parser.error("argument --no-adapter: is for --test and --prompt, without --train, --export")
    if args.weight_decay is not None and args.optimizer == "adam":
        parser.error("argument --weight-decay: is for --optimizer adamw")
    if not args.train and (flags := {"lora_rank", "lora_scale", "targets"} & args.typed):
        parser.error(f"argument {flag_name(min(flags))}: is for training; an adapter has its own")
    for form, path in args.export or []:
        if form not in FORMS or not path:
            parser.error(f"argument --export: takes a form ({', '.join(FORMS)}) and a folder")
        if args.shard and form.startswith("merged"):
            parser.error(
                f"argument --export: {form} takes a machine that holds the whole model; run it "
                "there, later and without --shard"
            )
        if form == "gguf" and not path.endswith(".gguf"):
            parser.error(f"argument --export: gguf takes a file, such as {path}.gguf")
