"""What a run is to do, and every error in that which needs no model, told before one is fetched."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models
from lora_finetune.adapters import adapters, export
from lora_finetune.base.command_line import ROOT
from lora_finetune.base.errors import UserError
from lora_finetune.base.files import real_file
from lora_finetune.run import checkpoint, run_files
from lora_finetune.texts import batching, dataset, prompts

import mlx.nn as nn


@dataclass(frozen=True)
class Plan:
    """What a run is to do, as far as it is known without a model.

    Attributes:
        data: what the data file of each split holds, "train", "valid" and "test" as needed.
        source: the file that the adapter to start from is in, None for a fresh one.
        adapter: its A's and B's.
        state: the rest of the run to resume, None where there is none.
        progress: how far that run has come.
        iters: the iteration to train to.
        settings: what the result of training depends on, by the name to report it under.
        files: where the adapter is saved, and all that is beside it.
        prompts: the prompts to generate after.
        scale: the scale of LoRA that the adapter is for.
        exports: the forms to export to, and their folders.
        start_iter: the iteration to start from that was given, None where none was.
        The rest are flags, under their own names.
    """

    data: dict[str, dataset.File]
    source: Path | None
    adapter: adapters.Adapter
    state: checkpoint.State | None
    progress: checkpoint.Progress
    iters: int
    settings: dict[str, Any]
    files: run_files.RunFiles
    prompts: list[str]
    scale: float
    exports: list[export.Export]
    start_iter: int | None
    batch_size: int
    learning_rate: float
    seed: int
    val_batches: int
    steps_per_report: int
    steps_per_eval: int
    save_every: int
    patience: int | None


def check(args: argparse.Namespace, is_first: bool = True) -> Plan:
    """Read all files but the model's, and check what can be checked without it.

    Args:
        is_first: whether this process writes and generates, for all where there are several.

    Raises:
        UserError: something that the user can put right.
    """
    splits = ["train", "valid"] * args.train + ["test"] * args.test
    data = {s: dataset.read(Path(args.data, f"{s}.jsonl"), args.mask_prompt) for s in splits}
    adapter_file = real_file(Path(args.adapter_file))
    source, state, adapter, scale = read_start(args, adapter_file)
    asked, wanted = (args.prompt or [], args.export or []) if is_first else ([], [])
    exports = [export.Export(form, Path(folder)) for form, folder in wanted]
    export.check_folders(exports, adapter_file)
    progress = state.progress if state else checkpoint.Progress()
    if args.start_iter not in (None, progress.iteration):
        progress = checkpoint.Progress(args.start_iter)
    kind = run_files.RunFiles if is_first else run_files.NoFiles
    files, iters = kind(adapter_file if args.train else source), 0
    if args.train:
        if is_first:
            run_files.check_writable(adapter_file)
        if files.log.exists():
            files.lock()  # a run that is training this adapter is reported at once
        iters = args.iters or args.epochs * math.ceil(len(data["train"]) / args.batch_size)
        iters = progress.go_on(iters, args.patience)
        if progress.iteration > iters or (progress.iteration == iters and not state):
            raise UserError(
                f"iteration {progress.iteration} of {iters} is done already (--start-iter, or the "
                "run to resume); raise --epochs or --iters, or begin anew from its adapter with "
                "--start-iter 0"
            )
    return Plan(
        data=data,
        source=source,
        adapter=adapter,
        state=state,
        progress=progress,
        iters=iters,
        settings={
            "--batch-size": args.batch_size,
            "--learning-rate": args.learning_rate,
            "--seed": args.seed,
            "--lora-scale": scale,
            "--val-batches": args.val_batches,
            "--add-eos-token": args.add_eos_token,
            "--max-seq-length": args.max_seq_length,
            "--mask-prompt": args.mask_prompt,
            **{file.path.name: file.checksum for split, file in data.items() if split != "test"},
        },
        files=files, prompts=prompts.read(asked), scale=scale, exports=exports,
        start_iter=args.start_iter,
        batch_size=args.batch_size, learning_rate=args.learning_rate, seed=args.seed,
        val_batches=args.val_batches, steps_per_report=args.steps_per_report,
        steps_per_eval=args.steps_per_eval, save_every=args.save_every, patience=args.patience,
    )  # fmt: skip


def read_start(
    args: argparse.Namespace, adapter_file: Path
) -> tuple[Path | None, checkpoint.State | None, adapters.Adapter, float]:
    """The adapter to start from: its file, the state of its run, its A's and B's; or none of them.

    And the scale of LoRA, which they are for.

    Raises:
        UserError: it is not there, or damaged.
    """
    if args.train and not args.resume_adapter_file:
        return None, None, {}, args.lora_scale or models.SCALE
    source = real_file(Path(args.resume_adapter_file)) if args.train else adapter_file
    if not args.train and not source.exists():
        raise UserError(f"there is no adapter file {source}; --train makes one")
    source = adapters.find_adapter(source)
    if not args.train:
        return source, None, adapters.read_adapter(source), models.SCALE
    state = checkpoint.read(source)
    settings = state.settings if state else checkpoint.settings_of(source)
    trained = settings.get("--lora-scale", models.SCALE)
    scale = args.lora_scale or trained
    if state:
        return source, state, adapters.rescaled(state.adapter, trained, scale), scale
    adapter = adapters.rescaled(adapters.read_adapter(source), models.SCALE, scale)
    return source, None, adapter, scale


# Flags that may differ: the first process generates and exports, and paths are each machine's own.
OWN_FLAGS = {
    *("model", "data", "adapter_file", "resume_adapter_file", "typed"),
    *("prompt", "system", "prompt_format", "max_tokens", "temp", "export"),
}


def to_compare(
    args: argparse.Namespace,
    plan: Plan,
    model: nn.Module,
    examples: dict[str, batching.Examples],
    fingerprints: dict[str, str],
) -> dict[str, object]:
    """What the result of a run depends on, by the names to report each under where it differs.

    Args:
        model: with the adapter to start from.
        fingerprints: of the model, by names.
    """
    sources = [*ROOT.glob("*.py"), *(ROOT / "lora_finetune").rglob("*.py")]
    trainable = adapters.trainable_arrays(model).values()
    moments = sorted(plan.state.optimizer.items()) if plan.state else []
    contents = {
        "the source of this program": (path.read_bytes() for path in sorted(sources)),
        "the adapter to start from": (array.tobytes() for array in trainable),
        "Adam's moments to start from": (array.tobytes() for _, array in moments),
        **{
            f"the tokens of {split}.jsonl": (e.tokens.tobytes(), e.is_target.tobytes())
            for split, e in examples.items()
        },
    }
    flags = {name: value for name, value in vars(args).items() if name not in OWN_FLAGS}
    return {
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
        **{f"--{name.replace('_', '-')}": value for name, value in flags.items()},
        **{f"the file {file.path.name}": file.checksum for file in plan.data.values()},
        **fingerprints,
        **{name: sha256(b"".join(content)).hexdigest() for name, content in contents.items()},
        "the run to resume": asdict(plan.progress),
        "the iterations": plan.iters,
    }
