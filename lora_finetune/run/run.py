"""Where a run saves: NAME.npz, its adapter, and NAME.run/ beside it with all the rest."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from itertools import count
from pathlib import Path

import models
from lora_finetune.adapters import loading, npz
from lora_finetune.base.command_line import ROOT
from lora_finetune.base.errors import UserError, hint, warn
from lora_finetune.base.files import atomic_write, check_can_make, file_checksum, link, real_file
from lora_finetune.model_folder.hub import public_name
from lora_finetune.run.checkpoint import (
    PINNED,
    Progress,
    Start,
    read_start,
    run_folder,
    settings_of,
    warn_of_changes,
    write_state,
)
from lora_finetune.run.config import Config
from lora_finetune.texts import batching, dataset, prompts
from lora_finetune.training.distributed import Group
from lora_finetune.training.optimizer import Optimizer

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class Run:
    """One run: where it starts, how far it has come, and the files that it saves.

    A lock keeps other runs from training the same adapter. An earlier run under this name stays as
    it is until this one first saves, and this one's log waits in memory; then it is kept under
    NAME.previous-K.

    Attributes:
        start: the adapter to start from, and the state of the run that it is of.
        model: --model, with the revision that was pinned, if one was.
        iters: the iteration to train to.
        settings: what the result depends on, by the names to report each under.
        question: one of the validation texts', to ask.
        lines: of the training texts, in their file.
        pending_best: arrays of the best adapter, to be written with the next save.
        replaces: whether an earlier run is to be kept first.
    """

    def __init__(self, adapter: Path, start: Start, config: Config, group: Group):
        self.adapter, self.folder = adapter, run_folder(adapter)
        self.start, self.config, self.group = start, config, group
        self.best, self.picture = self.folder / "best.npz", self.folder / "losses.png"
        self.log, self.log_lines = self.folder / "log.jsonl", []
        self.progress = start.state.progress if start.state else Progress()
        self.model = pinned_model(config, start)
        self.iters, self.settings = 0, start.settings
        self.question, self.lines = "", np.array([], int)
        self.pending_best: dict[str, np.ndarray] = {}
        self.replaces, self.lock_stream = False, None

    @property
    def optimizer(self) -> Optimizer:
        c = self.config
        return Optimizer(
            c.learning_rate, self.iters, c.lr_schedule, c.warmup, c.max_grad_norm, c.weight_decay,
            c.bias_correction,
        )  # fmt: skip

    def check(self) -> None:
        """Check that a run can save here; raises UserError where it cannot."""
        if not self.group.is_first:
            return
        if self.adapter.is_dir():
            raise UserError(f"the adapter file {self.adapter} is a folder; give another name")
        if self.adapter.parent.suffix == ".run":
            raise UserError(f"{self.adapter} is a file of a run; give another --adapter-file")
        try:
            check_can_make(self.previous(99)[1] / "best.npz.part")
        except OSError as error:
            raise UserError(
                f"the adapter file {self.adapter} cannot be written: {error.strerror}"
            ) from None
        if (self.folder / "lock").exists():  # a run that is training this adapter is told at once
            self.lock()

    def lock(self) -> None:
        """Take the lock, which ends with the process; raises UserError if another run has it."""
        if self.lock_stream:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock_stream = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(self.lock_stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is training this adapter (it writes {self.folder}); wait for its "
                "end, or give another --adapter-file"
            ) from None
        except OSError:
            pass  # a file system without locks

    def begin(self) -> None:
        """Begin to train, or go on as the state tells; warn of what has changed since."""
        source, state = self.start.source, self.start.state
        if self.group.is_first:
            self.lock()
        if source and not state:
            warn(f"{source} has no training state beside it, so Adam starts with fresh moments")
        if source and warn_of_changes(source, self.start.settings, self.settings):
            self.progress = Progress(self.progress.iteration)  # its losses are not comparable
        length, self.settings[LENGTH] = self.start.settings.get(LENGTH), self.iters
        if length not in (None, self.iters) and self.optimizer.depends_on_length:
            hint(f"the learning rate is now that of a run of {self.iters} iterations, not {length}")
        if not self.group.is_first:
            return
        goes_on = bool(state) and self.progress is state.progress
        in_place = bool(source) and run_folder(source).resolve() == self.folder.resolve()
        if goes_on:
            self.log_lines = read_log(run_folder(source) / "log.jsonl", self.progress.log_lines)
            self.pending_best = state.best
            if not (state.best or in_place):
                with suppress(UserError):  # it is not there, or damaged
                    self.pending_best = npz.read_arrays(run_folder(source) / "best.npz")
        self.replaces = not (goes_on and in_place) and any(
            file.exists() for file in (self.adapter, self.folder / "state.npz", self.best)
        )
        if not self.replaces and (self.log_lines or self.log.exists()):
            self.write_log()  # over what a run left that never saved

    def write_log(self) -> None:
        with atomic_write(self.log) as [stream]:
            stream.write("".join(self.log_lines).encode())

    def add_to_log(self, entry: dict[str, float | list[str]]) -> None:
        """Append an entry, its numbers in full, to the log, a JSON Lines file."""
        entry = {n: None if v in (math.inf, -math.inf) or v != v else v for n, v in entry.items()}
        self.log_lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        is_ours = self.adapter.suffix == ".npz" and not self.config.no_adapter
        if self.replaces or not (self.group.is_first and is_ours):
            return
        try:
            self.folder.mkdir(exist_ok=True)
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(self.log_lines[-1])
        except OSError as error:
            warn(f"the log {self.log} cannot be written: {error.strerror}")

    def keep_best(self, model: nn.Module) -> None:
        """Keep the adapter as it is now as the best, to be written with the next save."""
        self.pending_best = npz.file_arrays(model)

    def save(self, model: nn.Module, optimizer: dict[str, mx.array]) -> None:
        """Save the run: first its state, which holds all, then what is written from it."""
        if not self.group.is_first:
            return
        self.progress.log_lines = len(self.log_lines)
        replaces = self.replaces
        if replaces:
            self.keep_earlier()
        content = write_state(
            self.folder / "state.npz", file_checksum(self.adapter), model, optimizer,
            self.progress, self.settings, self.pending_best,
        )  # fmt: skip
        self.save_best()
        with atomic_write(self.adapter) as [stream]:
            stream.write(content)
        if replaces:  # once more, or the earlier adapter, put back, would be taken for this run's
            self.save(model, optimizer)

    def save_best(self) -> bool:
        """Write the best adapter, if there is one that is not written yet; returns whether."""
        if self.replaces or not (self.group.is_first and self.pending_best):
            return False
        npz.write_arrays(self.best, self.pending_best)
        self.pending_best = {}
        return True

    def keep_earlier(self) -> None:
        """Give the files of an earlier run second names, so that those of this one replace none.

        Whenever a kill comes, NAME.npz and its state belong together, and nothing is lost.
        """
        for adapter, folder in map(self.previous, count(1)):
            if not (adapter.exists() or folder.exists()):
                break
        if self.adapter.exists():
            link(self.adapter, adapter)
        ignored = shutil.ignore_patterns("lock", "*.part")
        shutil.copytree(self.folder, folder, copy_function=link, ignore=ignored)
        for file in (self.best, self.picture):
            file.unlink(missing_ok=True)
        self.write_log()
        warn(f"the earlier run of {self.adapter} is kept as {adapter} and {folder}")
        self.replaces = False

    def previous(self, number: int) -> tuple[Path, Path]:
        """The names under which an earlier run is kept: of its adapter and of its folder."""
        adapter = self.adapter.with_name(f"{self.adapter.stem}.previous-{number}.npz")
        return adapter, run_folder(adapter)


def read_log(file: Path, saved: int) -> list[str]:
    """The lines of a log that a save counted, and those of later tests; the others come again."""
    if not file.is_file():
        return []
    lines = file.read_text("utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
    return whole[:saved] + [line for line in whole[saved:] if '"test_loss"' in line]


# Names among the settings of a run.
HELD_OUT = "the texts held out"
LENGTH = "the iterations"


def open_run(config: Config, files: dict[str, dataset.File], group: Group) -> Run:
    """The run of a configuration, checked as far as that goes without a model.

    Args:
        files: the data files, by their splits; without one for validation, some of the training
            texts are put there.

    Raises:
        UserError: there is no such adapter, it is damaged, a run cannot save there, or nothing is
            left to do.
    """
    adapter = real_file(Path(config.adapter_file))
    if not config.train:
        return open_adapter(config, adapter, group)
    if resumed := config.resume_adapter_file:
        start = read_start(real_file(Path(resumed)), config.lora_scale)
    else:
        start = Start(None, {}, config.lora_scale or models.SCALE, {})
    run = Run(adapter, start, config, group)
    run.check()
    if config.start_iter not in (None, run.progress.iteration):
        run.progress = Progress(config.start_iter)
    run.settings = config.flags("result") | {"--lora-scale": start.scale, HELD_OUT: []}
    if "valid" not in files:
        held = start.settings.get(HELD_OUT)
        files["train"], files["valid"], run.settings[HELD_OUT] = dataset.hold_out(
            files["train"], held
        )
    if public_name(run.model, adapter)[1]:
        run.settings[PINNED] = run.model
    run.question = prompts.example(files["valid"])
    run.lines = np.array([number for number, _ in files["train"].rows])
    run.settings |= {files[split].path.name: files[split].checksum for split in ("train", "valid")}
    per_epoch = math.ceil(len(files["train"].rows) / config.batch_size)
    done = run.progress.iteration
    run.iters = config.iters or config.epochs * per_epoch
    if done > run.iters or (done == run.iters and not start.state):
        raise UserError(
            f"iteration {done} of {run.iters} is done already (--start-iter, or the run to "
            "resume); raise --epochs or --iters, or begin anew from its adapter with --start-iter 0"
        )
    return run


def open_adapter(config: Config, adapter: Path, group: Group) -> Run:
    """A run that trains nothing, with an adapter or without; raises UserError where there is none.

    Without, prompts have the form that the adapter learnt all the same, to be compared.
    """
    if config.no_adapter:
        return Run(adapter, Start(None, {}, models.SCALE, settings_of(adapter)), config, group)
    if not adapter.exists():
        raise UserError(
            f"there is no adapter file {adapter}; --train makes one, --no-adapter does without"
        )
    source = loading.find_adapter(adapter)
    start = Start(source, loading.read_adapter(source), models.SCALE, settings_of(source))
    return Run(source, start, config, group)


def pinned_model(config: Config, start: Start) -> str | None:
    """--model, with the revision that was pinned when its adapter was trained if none is typed."""
    pinned = start.settings.get(PINNED, "")
    if not config.model or config.model != pinned.partition("@")[0]:
        return config.model
    source = start.source or config.adapter_file
    hint(f"the model is {pinned}, since that revision was pinned when {source} was trained")
    return pinned


def must_agree(
    run: Run, model: nn.Module, examples: dict[str, batching.Examples], identity: dict[str, str]
) -> dict[str, object]:
    """All that the processes of a run must have the same, by the names to report each under.

    Args:
        model: with the adapter to start from.
        identity: checksums of the model, by names.
    """
    state = run.start.state
    sources = sorted([*ROOT.glob("*.py"), *(ROOT / "lora_finetune").rglob("*.py")])
    contents = {
        "the adapter to start from": npz.trainable_arrays(model).values(),
        "Adam's moments to start from": state.optimizer.values() if state else [],
        "the source of this program": [path.read_bytes() for path in sources],
    }
    for split, texts in examples.items():
        contents[f"the tokens of {split}.jsonl"] = [texts.tokens, texts.is_target]
    return {
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
        **run.config.flags(),
        **(run.settings if run.config.train else {}),
        **identity,
        **{name: sha256(b"".join(map(bytes, held))).hexdigest() for name, held in contents.items()},
        "the run to resume": asdict(run.progress),
        "the iterations": run.iters,
    }
