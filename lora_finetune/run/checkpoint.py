"""What a run resumes from: its progress and its state, beside the adapter."""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import models
from lora_finetune.adapters import npz
from lora_finetune.base.errors import UserError, hint, warn
from lora_finetune.base.files import atomic_write, file_checksum

import numpy as np

# --- Names --------------------------------------------------------------------------------------


def sibling(adapter_file: Path, ending: str) -> Path:
    """NAME.ending beside an adapter, where NAME is the adapter's file name without .npz."""
    return adapter_file.with_name(f"{adapter_file.name.removesuffix('.npz')}.{ending}")


def state_file(adapter_file: Path) -> Path:
    return sibling(adapter_file, "state.npz")


def log_file(adapter_file: Path) -> Path:
    return sibling(adapter_file, "log.jsonl")


def variant(adapter_file: Path, kind: str) -> Path:
    """The "best" adapter of a run, that of the "previous" run, or of one "stopped" early."""
    is_safetensors = adapter_file.suffix == ".safetensors"
    return sibling(adapter_file, kind + (".safetensors" if is_safetensors else ".npz"))


def picture_file(adapter_file: Path) -> Path:
    return sibling(adapter_file, "png")


def best_file(adapter_file: Path) -> Path:
    return variant(adapter_file, "best")


class RunPaths(NamedTuple):
    """All that a run leaves: adapter, state, best adapter, log and the picture of its losses."""

    adapter: Path
    state: Path
    best: Path
    log: Path
    picture: Path


def files_of_run(adapter_file: Path) -> RunPaths:
    others = state_file, best_file, log_file, picture_file
    return RunPaths(adapter_file, *(file(adapter_file) for file in others))


# --- Progress -----------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come, saved with each adapter for a resumed run to go on from.

    Attributes:
        iteration: the last one done.
        finished: whether all that was due at it is done: report, validation, save.
        total, tokens, steps, seconds: sums since the last training report; `total` is of the loss
            in nats over all target tokens.
        trained_tokens, trained_seconds: sums since the first iteration.
        validated: the iteration of the last validation, -1 before the first.
        first_loss, last_loss: of the first and the last validation.
        best_loss, best_iteration: of the validation with the lowest loss.
        not_better: how many validations in a row, the last included, brought no lower loss.
        ended_for: the iterations that training was to have where it ended early for lack of better
            losses; 0 where it did not.
        parts: how many each batch is computed in, for its memory.
        has_room: whether the states of frozen layers, if any, can be kept for later epochs.
        log_size: bytes of the log; what is after them belongs to no saved iteration.
    """

    iteration: int = 0
    finished: bool = True
    total: float = 0.0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    trained_tokens: int = 0
    trained_seconds: float = 0.0
    validated: int = -1
    first_loss: float = math.inf
    last_loss: float = math.inf
    best_loss: float = math.inf
    best_iteration: int = 0
    not_better: int = 0
    ended_for: int = 0
    parts: int = 1
    has_room: bool = True
    log_size: int = 0

    def add_step(self, total: float, tokens: int, seconds: float) -> None:
        """Count one iteration: the sum of its loss, and its target tokens."""
        self.iteration, self.finished = self.iteration + 1, False
        self.total += total
        self.tokens += tokens
        self.steps += 1
        self.seconds += seconds
        self.trained_tokens += tokens
        self.trained_seconds += seconds

    def add_validation(self, loss: float) -> bool:
        """Count a validation after the last iteration; returns whether it is the best so far."""
        is_best = loss < self.best_loss
        if self.validated < 0:
            self.first_loss = loss
        self.validated, self.last_loss = self.iteration, loss
        self.not_better = 0 if is_best else self.not_better + 1
        if is_best:
            self.best_loss, self.best_iteration = loss, self.iteration
        return is_best

    def go_on(self, iters: int, patience: int | None) -> int:
        """The iterations to train to, where the run ended early for lack of better losses or not.

        With more iterations it goes on and counts anew, with more patience or none it goes on.
        """
        if iters > self.ended_for:
            self.not_better = 0 if self.ended_for else self.not_better
        elif patience and self.not_better >= patience:
            hint(
                f"training ended at iteration {self.iteration}, since {self.not_better} "
                "validations in a row brought no better loss; more --iters or --patience goes on"
            )
            return self.iteration
        self.ended_for = 0
        return iters

    def reset_sums(self) -> None:
        self.total, self.tokens, self.steps, self.seconds = 0.0, 0, 0, 0.0

    def reset_losses(self) -> None:
        """Keep only the iteration: earlier losses are not comparable."""
        self.reset_sums()
        self.finished, self.validated = True, -1
        self.first_loss = self.last_loss = self.best_loss = math.inf
        self.best_iteration = self.not_better = self.ended_for = 0


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


# --- The state ----------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run needs beside its data and its model to go on as if it had never stopped.

    Attributes:
        file: where it was read.
        adapter: A and B of each adapted path, for the scale of its training.
        optimizer: Adam's moments and step, by the names that MLX gives them.
        progress: how far the run has come.
        settings: what its result depends on.
        save_interrupted: whether its save was cut short: the adapter file is still the one before.
        best, log: what else that save had not written yet; mostly {} and None.
    """

    file: Path
    adapter: npz.Adapter
    optimizer: dict[str, np.ndarray]
    progress: Progress
    settings: dict[str, Any]
    save_interrupted: bool
    best: dict[str, np.ndarray]
    log: str | None


def write_state(
    adapter_file: Path,
    saved: dict[str, np.ndarray],
    adapter: dict[str, np.ndarray],
    optimizer: dict,
    progress: Progress,
    settings: dict[str, Any],
    best: dict[str, np.ndarray],
    log: str | None,
) -> None:
    """Write the state of a run, before its adapter file and the other files of the save.

    It holds all that they will, and the checksums of the adapter file that it belongs to and of the
    one that this replaces, so a crash between the writes is detected and nothing is missing.

    Args:
        saved: what the adapter file will hold, by names.
        adapter: the same as it is trained, for the scale of training.
        optimizer: Adam's moments and step, by the names that MLX gives them.
        best, log: what of these is not in files yet.
    """
    content = npz.npz_content(saved)
    notes = {
        "progress": asdict(progress),
        "settings": settings,
        "checksums": {
            "adapter": hashlib.sha256(content).hexdigest(),
            "replaced": file_checksum(adapter_file),
            "replaced_at": mtime_ns(adapter_file),
        },
        "log": log,
    }
    arrays = adapter | {f"best.{name}": array for name, array in best.items()}
    arrays |= {f"optimizer.{name}": np.array(array) for name, array in optimizer.items()}
    arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    with atomic_write(state_file(adapter_file)) as [stream]:
        np.savez(stream, **arrays)


def mtime_ns(file: Path) -> int | None:
    """When a file was last written, in nanoseconds; None where there is none."""
    return file.stat().st_mtime_ns if file.is_file() else None


def read(adapter_file: Path) -> State | None:
    """The state that belongs to an adapter file, None where there is none.

    Raises:
        UserError: the state file is damaged.
    """
    file = state_file(adapter_file)
    return read_state(file, adapter_file) if file.is_file() else None


def read_or_none(adapter_file: Path) -> State | None:
    """The state that belongs to an adapter file, None where there is none or it is damaged."""
    try:
        return read(adapter_file)
    except UserError:
        return None


def read_state(file: Path, adapter_file: Path | None) -> State | None:
    """The state in a file, None where it does not belong to the adapter file (None: to any)."""
    try:
        arrays = npz.read_arrays(file)
        notes = json.loads(arrays.pop("notes").tobytes())
        checksums, log = notes["checksums"], notes.get("log")
        digest = file_checksum(adapter_file) if adapter_file else checksums["adapter"]
        is_whole = digest == checksums["adapter"]
        mtime = mtime_ns(adapter_file) if adapter_file else None
        if not is_whole and digest != checksums["replaced"]:
            return None
        if not is_whole and checksums.get("replaced_at", mtime) != mtime:
            return None  # a copy of what the save replaced was put back
        optimizer, best = pop_prefix(arrays, "optimizer."), pop_prefix(arrays, "best.")
        check_optimizer(optimizer, arrays)
        adapter = npz.pair_arrays(file, arrays)
        if is_whole:
            best, log = {}, None
        elif best:
            npz.pair_arrays(file, best)
        if not isinstance(log, str | None):
            raise TypeError
        progress, settings = read_progress(notes["progress"]), dict(notes["settings"])
        if not 0 < settings.setdefault("--lora-scale", models.SCALE) < math.inf:
            raise ValueError
    except (UserError, KeyError, ValueError, TypeError, RecursionError):
        raise UserError(f"{file} is damaged; delete it to resume with fresh Adam moments") from None
    return State(file, adapter, optimizer, progress, settings, not is_whole, best, log)


def pop_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Remove the arrays whose names start with a prefix, and return them without it."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays.pop(name) for name in names}


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
        warn(f"{source} has no training state beside it, so Adam starts with fresh moments")
        warn_of_other_model(source, settings_of(source), settings)
        return False
    if state.save_interrupted:
        iteration = state.progress.iteration
        warn(
            f"the last save of {source} was cut short; its state, of iteration {iteration}, is used"
        )
    changed = [
        f"{name} ({state.settings[name]!r:.50}, now {value})" if name[:2] == "--" else name
        for name, value in settings.items()
        if state.settings.get(name, value) != value
    ]
    if changed:
        warn(
            f"since {source} was saved, these have changed: {', '.join(changed)}; with "
            "--start-iter 0 training begins anew from its adapter"
        )
    return bool(changed)


def settings_of(source: Path) -> dict[str, Any]:
    """What a state tells of the run that an adapter, or best adapter, is of; {} where none does."""
    state = read_or_none(source)
    state_of_best = source.with_name(re.sub(r"\.best\.\w+$", ".state.npz", source.name))
    if not state and state_of_best != source and state_of_best.is_file():
        with suppress(UserError):  # a damaged state tells nothing
            state = read_state(state_of_best, None)
    return state.settings if state else {}


def warn_of_other_model(source: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Warn where the saved settings of an adapter tell that it was trained on another model."""
    names = [name for name in settings if name.startswith("the model")]
    if other := [name for name in names if saved.get(name, settings[name]) != settings[name]]:
        differs = ", ".join(name.removeprefix("the model's ") for name in other)
        differs = differs.replace("the model", "weights")
        warn(f"{source} was trained on a different model (its {differs} differ)")
