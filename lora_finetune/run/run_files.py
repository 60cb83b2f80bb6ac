"""Where a run saves and reports: its adapter, and beside it state, best adapter and log."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import sys
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from lora_finetune.adapters import npz
from lora_finetune.base.errors import UserError, warn
from lora_finetune.base.files import atomic_write, file_size, same_file
from lora_finetune.run import checkpoint, outcome
from lora_finetune.run.checkpoint import (
    Progress,
    State,
    best_file,
    files_of_run,
    log_file,
    state_file,
)

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

# What the files of a run are called beside its adapter; an adapter of such a name is part of a run.
RESERVED = re.compile(r"\.(state|best|stopped|previous(\.\d+)?)(\.npz|\.safetensors)?$")


class RunFiles:
    """The files of a run; a lock keeps other runs from training the same adapter.

    What another run left under their names stays as it is until this run first saves. It is then
    copied to NAME.previous…, all of it, before the first of the files is replaced. The best adapter
    is kept in memory until the next save; so is the log until the first, where one is there.

    Attributes:
        adapter: the adapter file.
        earlier: iterations of the previous adapter as long as it is not backed up, infinite if
            unknown; None where there is none.
        writes: whether this process writes them.
    """

    writes = True

    def __init__(self, adapter_file: Path):
        self.adapter = adapter_file
        self.log = log_file(adapter_file)
        self.earlier: float | None = None
        self.pending_log: str | None = None  # None: reports go to the file
        self.pending_best: dict[str, np.ndarray] = {}
        self.lock_stream = None
        self.log_failed = False

    def lock(self) -> None:
        """Take the lock, which ends with the process; raises UserError if another run has it."""
        self.lock_stream = self.lock_stream or self.log.open("ab")
        try:
            fcntl.flock(self.lock_stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is training this adapter (it writes {self.log}); wait for its end, "
                "or give another --adapter-file"
            ) from None
        except OSError:
            pass  # a file system without locks

    def begin(
        self, source: Path | None, state: State | None, progress: Progress, unchanged: bool
    ) -> None:
        """Begin a new run here, or go on with one, from here or from elsewhere.

        Args:
            source: the adapter file to start from, None for a new run.
            state: the state of the run that it is of, None where there is none.
            progress: where to start.
            unchanged: whether all that the state tells of that run still holds.
        """
        in_place = source is not None and (
            source == self.adapter or same_file(source, self.adapter)
        )
        old = files_of_run(source) if source else None
        if in_place and unchanged:
            self.pending_best = state.best
            log = committed_log(self.log, progress.log_size)
            self.write_log(log if state.log is None else state.log)  # a kill cut its save short
            return
        self.earlier = iterations_of(self.adapter)
        if unchanged or (in_place and progress.iteration):
            self.pending_log = committed_log(old.log, progress.log_size)
        elif self.earlier is not None:
            self.pending_log = ""
        else:
            self.write_log("")  # what is there is of a run that never saved
        if unchanged:
            self.pending_best = state.best or best_of(old.best)

    def report(self, line: str, **numbers: float) -> None:
        """Print a line, and append its numbers, in full, to the log, a JSON Lines file."""
        print_line(line)
        finite = {name: n if math.isfinite(n) else None for name, n in numbers.items()}
        entry = json.dumps(finite) + "\n"
        if self.pending_log is not None:
            self.pending_log += entry
            return
        try:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write("\n" * self.log_failed + entry)  # after what may be half a line
            self.log_failed = False
        except OSError as error:
            if not self.log_failed:
                warn(f"the log {self.log} cannot be written: {error.strerror}")
            self.log_failed = True

    def write_log(self, content: str) -> None:
        """Make this the log, in place, since the lock is on the file; rewrite only what differs."""
        old, new = self.log.read_bytes() if self.log.is_file() else b"", content.encode()
        same = len(os.path.commonprefix([old, new]))
        if len(old) > same:
            os.truncate(self.log, same)
        if len(new) > same:
            with self.log.open("ab") as stream:
                stream.write(new[same:])

    def keep_best(self, model: nn.Module) -> None:
        """Keep the adapter as it is now as the best, to be written with the next save."""
        self.pending_best = npz.file_arrays(model)

    def save(
        self, model: nn.Module, optimizer: dict, progress: Progress, settings: dict[str, Any]
    ) -> None:
        """Save the run: first its state, which holds all, and the adapter file last."""
        if self.earlier is not None:
            self.back_up_previous()
        in_memory = self.pending_log is not None
        progress.log_size = len(self.pending_log) if in_memory else file_size(self.log)
        arrays = npz.file_arrays(model)
        checkpoint.write_state(
            self.adapter, arrays, npz.trainable_arrays(model), optimizer, progress, settings,
            self.pending_best, self.pending_log,
        )  # fmt: skip
        if self.pending_best:
            npz.write_arrays(best_file(self.adapter), self.pending_best)
        if in_memory:
            self.write_log(self.pending_log)
        npz.write_arrays(self.adapter, arrays)
        self.earlier, self.pending_log, self.pending_best = None, None, {}

    def draw_losses(self) -> None:
        """Draw the losses of the run, if its log is in its place."""
        if self.pending_log is None:
            outcome.draw_losses(self.log, checkpoint.picture_file(self.adapter))

    def back_up_previous(self) -> None:
        """Copy the files of the other run to NAME.previous…; what is there goes to previous.2 …"""
        previous = checkpoint.variant(self.adapter, "previous")
        if any(map(file_size, files_of_run(previous))):
            numbered = (checkpoint.variant(self.adapter, f"previous.{n}") for n in count(2))
            copy_run(
                previous, next(p for p in numbered if not any(map(file_size, files_of_run(p))))
            )
        copy_run(self.adapter, previous)
        self.earlier = None
        warn(f"the earlier run of {self.adapter} is kept as {previous}, with all its files")

    def save_elsewhere_if_shorter(self, iteration: float) -> None:
        """Save as NAME.stopped… from now on, where the adapter that is here has more iterations."""
        if self.earlier is not None and iteration < self.earlier:
            self.adapter = checkpoint.variant(self.adapter, "stopped")
            self.log = log_file(self.adapter)
            self.earlier = iterations_of(self.adapter)

    def save_best_after_error(self, progress: Progress) -> None:
        """Save at least the best adapter of a run that ends in an error; never beside another."""
        if self.pending_best and progress.best_iteration > 0:
            if iterations_of(self.adapter) is not None:
                self.adapter = checkpoint.variant(self.adapter, "stopped")
                if any(map(file_size, files_of_run(self.adapter))):
                    self.back_up_previous()
            best = best_file(self.adapter)
            npz.write_arrays(best, self.pending_best)
            warn(f"the best adapter, of iteration {progress.best_iteration}, is in {best}")


class NoFiles(RunFiles):
    """The files of a process that writes none, since another one writes those of their run."""

    writes = False

    def nothing(self, *_: object, **__: object) -> None:
        """What this process does where that one locks, reports, saves or draws."""

    lock = begin = report = keep_best = save = draw_losses = nothing
    save_elsewhere_if_shorter = save_best_after_error = nothing


def check_writable(adapter_file: Path) -> None:
    """Check that a run can save there, before it trains.

    Raises:
        UserError: it cannot, or its files would be those of another run.
    """
    if adapter_file.is_dir():
        raise UserError(f"the adapter file {adapter_file} is a folder; name a file in it")
    if RESERVED.search(adapter_file.name):
        raise UserError(
            f"{adapter_file} is a name reserved for the files of a run (.best, .state, .stopped, "
            ".previous); give another --adapter-file"
        )
    for name in (f"{adapter_file.name}.npz", adapter_file.name.removesuffix(".npz")):
        other = adapter_file.with_name(name)
        shared = other != adapter_file and state_file(other) == state_file(adapter_file)
        if shared and other.is_file() and checkpoint.read_or_none(other):
            raise UserError(
                f"{adapter_file} and {other} would share {state_file(other)}; give another "
                "--adapter-file"
            )
    kept = files_of_run(checkpoint.variant(adapter_file, "previous.99"))
    longest = max((file.name for file in kept), key=len)
    try:
        with suppress(FileNotFoundError):
            adapter_file.with_name(longest + ".part").lstat()  # raises where a name is too long
        with tempfile.TemporaryFile(dir=adapter_file.parent):
            pass
    except OSError as error:
        raise UserError(
            f"the adapter file {adapter_file} cannot be written: {error.strerror}"
        ) from None


def best_of(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a best adapter, none where they cannot be read."""
    try:
        return npz.read_arrays(file)
    except UserError:
        return {}


def iterations_of(adapter_file: Path) -> float | None:
    """Iterations of the adapter that a run left, infinite if unknown; None where none was saved."""
    if not adapter_file.is_file() and not state_file(adapter_file).is_file():
        return None
    state = checkpoint.read_or_none(adapter_file)
    return state.progress.iteration if state else math.inf


def copy_run(adapter_file: Path, target: Path) -> None:
    """Copy all that a run has left under another name, in place of what has it."""
    there = files_of_run(adapter_file)
    copies = dict(zip(there, files_of_run(target), strict=True))
    existing = [file for file in there if file_size(file)]
    with atomic_write(*(copies[file] for file in existing)) as streams:
        for file, stream in zip(existing, streams, strict=True):
            stream.write(file.read_bytes())
    for file in copies.keys() - set(existing):
        copies[file].unlink(missing_ok=True)


def committed_log(log: Path, num_saved: int) -> str:
    """The first bytes of a log, 0 for all of it, and the lines of tests behind them.

    What training reported behind them belongs to no saved iteration, and will come again.
    """
    content = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    saved = content[: num_saved or None]
    rest = content[len(saved) :].splitlines(keepends=True)
    return saved + "".join(line for line in rest if '"test_loss"' in line)


def print_line(line: str) -> None:
    """Print a line at once, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()
