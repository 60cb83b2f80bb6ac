"""The checkpoint of a run: how far it has come, its adapter and Adam's moments, in one file."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import models
from lora_finetune.adapters import export, loading, npz
from lora_finetune.base.errors import UserError, warn
from lora_finetune.base.files import file_checksum
from lora_finetune.model_folder.files import read_object

import mlx.nn as nn
import numpy as np


def run_folder(adapter_file: Path) -> Path:
    """NAME.run beside the adapter NAME.npz; the best adapter of a run is in its folder itself."""
    if adapter_file.name == "best.npz" and adapter_file.parent.suffix == ".run":
        return adapter_file.parent
    return adapter_file.with_suffix(".run")


# --- Progress -----------------------------------------------------------------------------------


NORMS, LEAST_NORMS = 101, 20  # of gradients: how many are kept, and make a median


@dataclass
class Progress:
    """How far a run has come; saved with each adapter.

    Attributes:
        iteration: the last one done.
        finished: whether all that was due at it is done: report, validation, save.
        total, tokens, steps, seconds: sums since the last training report; `total` is the loss in
            nats over all target tokens.
        validated: the iteration of the last validation, -1 before the first.
        first_loss, last_loss, best_loss: of validations.
        not_improved: validations in a row, the last included, whose loss was not the lowest.
        micro_batches: how many each batch is computed in, for its memory.
        has_room: whether the states of frozen layers, if any, can be kept for later epochs.
        log_lines: how many the log had.
        norms: of the gradients of the last steps, NORMS at most.
    """

    iteration: int = 0
    finished: bool = True
    total: float = 0.0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    validated: int = -1
    first_loss: float = math.inf
    last_loss: float = math.inf
    best_loss: float = math.inf
    best_iteration: int = 0
    not_improved: int = 0
    micro_batches: int = 1
    has_room: bool = True
    log_lines: int = 0
    norms: list[float] = field(default_factory=list)

    def add(self, total: float, tokens: int, seconds: float, norm: float) -> None:
        """Count one iteration: the sum of its loss, its target tokens, its gradient's norm."""
        self.iteration, self.finished = self.iteration + 1, False
        self.total += total
        self.tokens += tokens
        self.steps += 1
        self.seconds += seconds
        self.norms = [*self.norms, norm][-NORMS:]

    @property
    def jump(self) -> float:
        """The last gradient's norm over the median of those before, 0 where they are too few."""
        *before, last = self.norms
        usual = median(before) if len(before) >= LEAST_NORMS else 0
        return last / usual if usual else 0.0

    def add_validation(self, loss: float) -> bool:
        """Count a validation after the last iteration; returns whether it is the best so far."""
        is_best = loss < self.best_loss
        if self.validated < 0:
            self.first_loss = loss
        self.validated, self.last_loss = self.iteration, loss
        self.not_improved = 0 if is_best else self.not_improved + 1
        if is_best:
            self.best_loss, self.best_iteration = loss, self.iteration
        return is_best

    def every(self, number: int) -> bool:
        return self.iteration % number == 0


# --- The state ----------------------------------------------------------------------------------


class State(NamedTuple):
    """A run as it was saved, to go on as if it had never stopped.

    Attributes:
        adapter: A and B of each adapted path, for the scale of training.
        optimizer: Adam's moments and step, by MLX's names.
        settings: what its result depends on, by the names to report each under.
        best: arrays of the best adapter where this save was to write its file; else empty.
    """

    adapter: npz.Adapter
    optimizer: dict[str, np.ndarray]
    progress: Progress
    settings: dict[str, Any]
    best: dict[str, np.ndarray]


def write_state(
    file: Path, replaced: str | None, model: nn.Module, optimizer: dict, progress: Progress,
    settings: dict[str, Any], best: dict[str, np.ndarray],
) -> bytes:  # fmt: skip
    """Write the state of a run, which holds its adapter too: this one replacement is its save.

    The adapter file is written from it afterwards. The checksums of the one to come and of the one
    that it replaces tell a state that belongs to an adapter file from one that does not.

    Returns:
        The bytes for the adapter file.
    """
    content = npz.npz_content(npz.file_arrays(model))
    notes = {
        "progress": asdict(progress),
        "settings": settings,
        "adapter": hashlib.sha256(content).hexdigest(),
        "replaced": replaced,
    }
    arrays = dict(npz.trainable_arrays(model))
    arrays |= {f"best.{name}": array for name, array in best.items()}
    arrays |= {f"optimizer.{name}": np.array(array) for name, array in optimizer.items()}
    arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    npz.write_arrays(file, arrays)
    return content


def read_state(adapter_file: Path) -> State | None:
    """The state that belongs to an adapter file, or is a save ahead of it; None without one.

    Raises:
        UserError: the state file is damaged.
    """
    file = run_folder(adapter_file) / "state.npz"
    if not file.is_file():
        return None
    try:
        arrays = npz.read_arrays(file)
        notes = json.loads(arrays.pop("notes").tobytes())
        if file_checksum(adapter_file) not in (notes["adapter"], notes["replaced"]):
            return None
        optimizer, best = pop_prefix(arrays, "optimizer."), pop_prefix(arrays, "best.")
        adapter, progress = npz.pair_arrays(file, arrays), Progress(**notes["progress"])
        return State(adapter, optimizer, progress, notes["settings"], best)
    except (UserError, KeyError, ValueError, TypeError):
        raise UserError(f"{file} is damaged; delete it to resume with fresh Adam moments") from None


def pop_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Remove the arrays whose names start with a prefix, and return them without it."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays.pop(name) for name in names}


PINNED = "the model's revision"  # its name among the settings


def settings_of(adapter_file: Path) -> dict[str, Any]:
    """The settings of the run that an adapter, or best adapter, is of; {} where no state tells.

    Beside an adapter in another form, it is what that tells, or this program when it exported it.
    """
    folder = run_folder(adapter_file)
    if folder == adapter_file.parent:  # its best adapter
        adapter_file = folder.with_suffix(".npz")
    with suppress(UserError, OSError):
        if state := read_state(adapter_file):
            return state.settings
        file, told = loading.find_adapter(adapter_file), {}
        if (ours := file.with_name(export.PROMPTS)).exists():
            told = read_object(ours)
        config = read_object(file.with_name("adapter_config.json"))
        if file.suffix == ".safetensors" and config.get("revision"):
            base = config.get("base_model_name_or_path") or config.get("model")
            told[PINNED] = f"{base}@{config['revision']}"
        return told
    return {}


# --- Where a run starts -------------------------------------------------------------------------


class Start(NamedTuple):
    """The adapter that a run starts from, if any, and the scale of LoRA that it is for.

    Attributes:
        source: its file, None for a fresh one.
        settings: of the run that it is of, as far as they are known.
        state: of that run, None where it cannot be resumed.
    """

    source: Path | None
    adapter: npz.Adapter
    scale: float
    settings: dict[str, Any]
    state: State | None = None


def read_start(adapter_file: Path, scale: float | None) -> Start:
    """Read the adapter to train on from, and the state of its run.

    Args:
        scale: --lora-scale; without it, that of the run to resume, or the default.

    Raises:
        UserError: it is not there, or damaged.
    """
    source = loading.find_adapter(adapter_file)
    state = read_state(source)
    settings = state.settings if state else settings_of(source)
    trained = settings.get("--lora-scale", models.SCALE)
    scale = scale or trained
    if state:
        adapter = npz.rescaled(state.adapter, trained, scale)
    else:
        adapter = npz.rescaled(loading.read_adapter(source), models.SCALE, scale)
    return Start(source, adapter, scale, settings, state)


def warn_of_changes(source: Path, saved: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Warn of settings that have changed since an adapter was saved; returns whether any has."""
    changed = [
        f"{name} ({saved[name]!r:.50}, now {value})" if name[:2] == "--" else name
        for name, value in settings.items()
        if saved.get(name, value) != value
    ]
    if changed:
        warn(f"since {source} was saved, these have changed: {', '.join(changed)}")
    return bool(changed)
