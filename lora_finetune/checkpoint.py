"""What a run leaves behind and resumes from: its progress, its log, its state."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from lora_finetune import adapters
from lora_finetune.command_line import UserError, replace_files, warn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm


@dataclass
class Progress:
    """How far a run has come, saved with each adapter for a resumed run to go on from.

    Attributes:
        iteration: the last one done.
        finished: whether all that was due at it is done: report, validation, save.
        total, tokens, steps, seconds: sums since the last training report; `total` is of the loss
            in nats over all target tokens.
        validated: the iteration of the last validation, -1 before the first.
        best_loss, best_iteration: of the validation with the lowest loss.
        log_size: bytes of the log; what is after them belongs to no saved iteration.
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

    def add_step(self, mean: float, tokens: int, seconds: float) -> None:
        """Count one more iteration, its mean loss over so many target tokens."""
        self.iteration, self.finished = self.iteration + 1, False
        self.total += mean * tokens
        self.tokens += tokens
        self.steps += 1
        self.seconds += seconds

    def reset_sums(self) -> None:
        self.total, self.tokens, self.steps, self.seconds = 0.0, 0, 0, 0.0

    def reset_losses(self) -> None:
        """Keep the place alone: the losses of before are not comparable with those to come."""
        self.reset_sums()
        self.finished, self.validated = True, -1
        self.best_loss, self.best_iteration = math.inf, 0


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
    """Reports on standard output, and each with its full numbers in a JSON Lines file.

    While a run trains it holds a lock on that file, which ends with the process.
    """

    def __init__(self, adapter_file: Path):
        self.file = adapter_file.with_suffix(".log.jsonl")
        self.locked = None

    def lock(self) -> None:
        """Keep others from training the same adapter; raises UserError where one does already."""
        self.locked = self.locked or self.file.open("ab")
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is training this adapter (it writes {self.file}); wait for its end, "
                "or give another --adapter-file"
            ) from None
        except OSError:
            pass  # a file system without locks

    def num_bytes(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def truncate(self, progress: Progress) -> None:
        """Remove what was written after a run had come so far; all, if it is at its start."""
        if (progress.log_size or not progress.iteration) and self.num_bytes() > progress.log_size:
            os.truncate(self.file, progress.log_size)

    def report(self, line: str, **numbers: float) -> None:
        print_line(line)
        finite = {name: n if math.isfinite(n) else None for name, n in numbers.items()}
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(finite) + "\n")
        except OSError as error:
            warn(f"the log {self.file} cannot be written: {error.strerror}")


def print_line(line: str) -> None:
    """Print a line at once, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


class State(NamedTuple):
    """What a run needs beside its data and its model to go on as if it had never stopped.

    Attributes:
        adapter: A and B of each adapted path.
        optimizer: Adam's moments and step, by the names that MLX gives them.
        progress: how far the run has come.
        settings: what its result depends on.
    """

    adapter: adapters.Adapter
    optimizer: dict[str, np.ndarray]
    progress: Progress
    settings: dict[str, Any]


def state_file(adapter_file: Path) -> Path:
    return adapter_file.with_suffix(".state.npz")


def best_file(adapter_file: Path) -> Path:
    """Where the adapter with the lowest validation loss is kept."""
    return adapter_file.with_suffix(f".best{adapter_file.suffix}")


def write(
    file: Path,
    model: nn.Module,
    optimizer_state: dict,
    progress: Progress,
    settings: dict[str, Any],
) -> None:
    """Write the adapter file, and before it the state of the run beside it.

    The state holds the adapter too. It knows by their checksums the adapter file that it belongs
    to and the one that this replaces, so it is usable too if the process dies between the two.
    """
    arrays = adapters.trainable_arrays(model)
    content = adapters.adapter_content(arrays, file.suffix)
    digest = hashlib.sha256(content).hexdigest()
    notes = {
        "progress": asdict(progress),
        "settings": settings,
        "checksums": {"adapter": digest, "replaced": file_checksum(file)},
    }
    arrays |= {f"optimizer.{name}": np.array(a) for name, a in tree_flatten(optimizer_state)}
    arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    with replace_files(state_file(file)) as [stream]:
        np.savez(stream, **arrays)
    with replace_files(file) as [stream]:
        stream.write(content)


def read(file: Path) -> State | None:
    """The state that belongs to an adapter file, None where there is none.

    Raises:
        UserError: the state file is damaged.
    """
    state = state_file(file)
    if not state.is_file():
        return None
    try:
        arrays = adapters.read_arrays(state)
        notes = json.loads(arrays.pop("notes").tobytes())
        sums = notes["checksums"]
        belongs = file_checksum(file) in (sums["adapter"], sums["replaced"])
        optimizer = {
            name.removeprefix("optimizer."): arrays.pop(name)
            for name in list(arrays)
            if name.startswith("optimizer.")
        }
        check_optimizer(optimizer, arrays)
        adapter = adapters.pair_arrays(state, arrays)
        progress = read_progress(notes["progress"])
        settings = dict(notes["settings"])
    except (UserError, KeyError, ValueError, TypeError, RecursionError):
        raise UserError(
            f"{state} is damaged; without it (delete it) training resumes with fresh moments"
        ) from None
    return State(adapter, optimizer, progress, settings) if belongs else None


def check_optimizer(optimizer: dict[str, np.ndarray], parameters: dict[str, np.ndarray]) -> None:
    """Raise ValueError unless Adam's moments (`….m`, `….v`) are finite and for these parameters."""
    step = optimizer.get("step", np.array(0, np.uint64))
    if (step.shape, step.dtype) != ((), np.uint64):
        raise ValueError("no step")
    for name in optimizer.keys() - {"step", "learning_rate"}:
        moment, parameter = optimizer[name], parameters[name[:-2]]
        if (moment.shape, moment.dtype) != (parameter.shape, np.float32):
            raise ValueError(f"{name} is not for this adapter")
        if not np.isfinite(moment).all():
            raise ValueError(f"{name} is not finite")


def warn_of_changes(source: Path, state: State | None, settings: dict[str, Any]) -> bool:
    """Warn where the state of the run to resume is missing, or was of other settings.

    Returns:
        Whether something has changed.
    """
    if not state:
        warn(f"{source} has no state of its run beside it, so Adam starts with fresh moments")
        return False
    changed = [
        f"{name} ({state.settings.get(name)!r:.50}, now {value})" if name[:2] == "--" else name
        for name, value in settings.items()
        if state.settings.get(name) != value
    ]
    if changed:
        warn(f"since {source} was saved, these have changed: {', '.join(changed)}")
    return bool(changed)


def file_checksum(file: Path) -> str | None:
    """The SHA-256 of a file, None where there is none."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A checksum of names, shapes and some numbers of all parameters, to tell models apart."""
    sample = [(name, a.shape, a.flatten()[:16]) for name, a in tree_flatten(model.parameters())]
    mx.eval([numbers for _, _, numbers in sample])
    described = [(name, shape, numbers.tolist()) for name, shape, numbers in sample]
    return hashlib.sha256(repr(described).encode()).hexdigest()
