"""What a run leaves behind and takes up again: its progress, its log, its state."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from lora_finetune.adapters import (
    Adapter,
    adapter_content,
    pair_arrays,
    read_arrays,
    trainable_arrays,
)
from lora_finetune.command_line import UserError, replace_files, warn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm


@dataclass
class Progress:
    """How far a run has come; it is saved with each adapter, for a resumed run to go on the same.

    Attributes:
        iteration: the last one done.
        finished: whether all that was due at it is done: report, validation, save.
        total, tokens, steps, seconds: the sums since the last training report.
        validated: the iteration of the last validation.
        best_loss, best_iteration: of the validation with the lowest loss.
        log_size: bytes of the log; what is behind them belongs to no saved iteration.
    """

    iteration: int = 0
    finished: bool = True
    total: float = 0.0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    validated: int = -1
    best_loss: float = math.inf
    best_iteration: int = 0
    log_size: int = 0


def read_progress(saved: object) -> Progress:
    """A Progress that was saved as JSON; raises TypeError or ValueError where it is none."""
    progress = Progress(**saved)
    for field in fields(Progress):
        number, default = getattr(progress, field.name), field.default
        if type(number) is not type(default):
            raise TypeError
        if not min(default, 0) <= number <= max(default, 2**63):
            raise ValueError
    return progress


class Log:
    """Reports on standard output, and each with its numbers in full in a JSON Lines file.

    While a run trains it holds a lock on that file, which ends with the process.
    """

    def __init__(self, file: Path):
        self.file = file
        self.held = None

    def lock(self) -> None:
        """Keep others from training the same adapter; raises UserError where one does already."""
        self.held = self.held or self.file.open("ab")
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is training this adapter (it writes {self.file}); wait for its end, "
                "or give another --adapter-file"
            ) from None
        except OSError:
            pass  # a file system without locks

    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def shorten(self, progress: Progress) -> None:
        """Take away what was written after a run had come so far; all, if it is at its start."""
        if (progress.log_size or not progress.iteration) and self.size() > progress.log_size:
            os.truncate(self.file, progress.log_size)

    def report(self, line: str, **numbers: float) -> None:
        say(line)
        finite = {name: n if math.isfinite(n) else None for name, n in numbers.items()}
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(finite) + "\n")
        except OSError as error:
            warn(f"the log {self.file} cannot be written: {error.strerror}")


def say(line: str) -> None:
    """Print a line at once, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


class State(NamedTuple):
    """What a run needs beside its data and its model to go on as if it had never stopped.

    Attributes:
        adapter: A and B of each adapted path.
        optimizer: the optimizer's state, flattened as MLX names it.
        notes: what else the run wrote down, as JSON has it.
    """

    adapter: Adapter
    optimizer: dict[str, np.ndarray]
    notes: dict[str, Any]


def state_file(adapter_file: Path) -> Path:
    return adapter_file.with_suffix(".state.npz")


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file_checksum(file: Path) -> str | None:
    """The checksum of a file, None where there is none."""
    if not file.is_file():
        return None
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A checksum of names, shapes and some numbers of all parameters, to tell models apart."""
    sample = [(name, a.shape, a.flatten()[:16]) for name, a in tree_flatten(model.parameters())]
    mx.eval([numbers for _, _, numbers in sample])
    described = [(name, shape, numbers.tolist()) for name, shape, numbers in sample]
    return checksum(repr(described).encode())


def write_checkpoint(
    file: Path, model: nn.Module, optimizer_state: dict, notes: dict[str, Any]
) -> None:
    """Write the adapter file, and before it the state of the run beside it.

    The state holds the adapter too. It knows by their checksums the adapter file that it belongs
    to and the one that this replaces, so a process that dies between the two files leaves no doubt
    which they are.
    """
    arrays = trainable_arrays(model)
    content = adapter_content(arrays, file.suffix)
    sums = {"adapter": checksum(content), "replaced": file_checksum(file)}
    arrays |= {f"optimizer.{name}": np.array(a) for name, a in tree_flatten(optimizer_state)}
    arrays["notes"] = np.frombuffer(json.dumps(notes | {"checksums": sums}).encode(), np.uint8)
    with replace_files(state_file(file)) as [stream]:
        np.savez(stream, **arrays)
    with replace_files(file) as [stream]:
        stream.write(content)


def read_state(file: Path) -> State | None:
    """The state that belongs to an adapter file, None where there is none.

    Raises:
        UserError: the state file is damaged.
    """
    state = state_file(file)
    if not state.is_file():
        return None
    try:
        arrays = read_arrays(state)
        notes = json.loads(arrays.pop("notes").tobytes())
        sums = notes["checksums"]
        belongs = file_checksum(file) in (sums["adapter"], sums["replaced"])
        optimizer = {
            name.removeprefix("optimizer."): arrays.pop(name)
            for name in list(arrays)
            if name.startswith("optimizer.")
        }
        adapter = pair_arrays(state, arrays)
    except (UserError, KeyError, ValueError, TypeError, RecursionError):
        raise damaged_state(file) from None
    return State(adapter, optimizer, notes) if belongs else None


def damaged_state(file: Path) -> UserError:
    """The error that the state of an adapter file is damaged."""
    return UserError(
        f"{state_file(file)} is damaged; without it (delete it) training resumes with fresh moments"
    )


def find_start(state: State | None, source: Path, start_iter: int | None) -> Progress:
    """Where a run starts: where the state read from beside `source` is, unless at `start_iter`.

    Raises:
        UserError: the state is damaged.
    """
    try:
        progress = read_progress(state.notes["progress"]) if state else Progress()
    except (KeyError, TypeError, ValueError):
        raise damaged_state(source) from None
    return progress if start_iter in (None, progress.iteration) else Progress(start_iter)


def take_up(
    progress: Progress, state: State | None, settings: dict[str, Any], source: Path
) -> Progress:
    """Say what of the run that is resumed is missing, or has changed since its state was saved.

    Returns:
        The progress; with a change, no more of it than its place, since sums and losses of before
        are not to be compared with those to come.
    """
    if not state:
        warn(f"{source} has no state of its run beside it, so Adam starts with fresh moments")
        return progress
    saved = state.notes.get("settings")
    saved = saved if isinstance(saved, dict) else {}
    changed = [
        f"{name} ({saved.get(name)!r:.50}, now {value})" if name.startswith("--") else name
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if not changed:
        return progress
    warn(f"since {source} was saved, these have changed: {', '.join(changed)}")
    return Progress(progress.iteration, log_size=progress.log_size)
