"""What a run leaves behind and resumes from: its progress, its log, its state."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from lora_finetune import adapters
from lora_finetune.command_line import UserError, warn
from lora_finetune.files import file_checksum, num_bytes, replace_files

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

    def add_step(self, total: float, tokens: int, seconds: float) -> None:
        """Count one more iteration, and the sum of its loss over so many target tokens."""
        self.iteration, self.finished = self.iteration + 1, False
        self.total += total
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


# --- The files ----------------------------------------------------------------------------------


def beside(adapter_file: Path, ending: str) -> Path:
    """A file beside an adapter: it bears the adapter's whole name, but for the ending .npz."""
    return adapter_file.with_name(f"{adapter_file.name.removesuffix('.npz')}.{ending}")


def state_file(adapter_file: Path) -> Path:
    return beside(adapter_file, "state.npz")


def log_file(adapter_file: Path) -> Path:
    return beside(adapter_file, "log.jsonl")


def other_adapter(adapter_file: Path, kind: str) -> Path:
    """The "best" adapter of a run, that of the "previous" run, or of one "stopped" early."""
    is_safetensors = adapter_file.suffix == ".safetensors"
    return beside(adapter_file, kind + (".safetensors" if is_safetensors else ".npz"))


def best_file(adapter_file: Path) -> Path:
    return other_adapter(adapter_file, "best")


def files_of_run(adapter_file: Path) -> list[Path]:
    """All that a run leaves."""
    return [adapter_file, state_file(adapter_file), best_file(adapter_file), log_file(adapter_file)]


class RunFiles:
    """Where a run saves and reports; a lock keeps other runs from training the same adapter.

    What an earlier run left there stays as it is until this run first saves. It is then copied to
    NAME.previous…, all of it, before the first of its files is replaced. Until then the best
    adapter and the log are kept in memory.
    """

    def __init__(self, adapter_file: Path):
        self.adapter = adapter_file
        self.log = log_file(adapter_file)
        self.lock_stream = None
        self.keeps_earlier = False  # until the first save
        self.iterations_here = 0.0  # of the adapter of an earlier run
        self.unsaved_log: str | None = None  # None: reports go to the log file
        self.unsaved_best: dict[str, np.ndarray] = {}

    def lock(self) -> None:
        """Take the lock, which ends with the process.

        Raises:
            UserError: another run holds it, or the files of another adapter have the same names.
        """
        for name in {f"{self.adapter.name}.npz", self.adapter.name.removesuffix(".npz")}:
            other = self.adapter.with_name(name)
            if other != self.adapter and other.is_file():
                raise UserError(
                    f"{self.adapter} and {other} would share {state_file(other)}; give another "
                    "--adapter-file"
                )
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

    def begin(self) -> None:
        """Begin a new run here."""
        here = [file for file in files_of_run(self.adapter) if num_bytes(file)]
        self.keeps_earlier, self.unsaved_log = bool(here), "" if here else None
        if self.adapter in here:
            try:
                state = read(self.adapter)
            except UserError:
                state = None
            self.iterations_here = state.progress.iteration if state else math.inf

    def resume(self, state: State | None, progress: Progress, as_it_was: bool) -> None:
        """Go on with the run that is here; `as_it_was`: with all that its state tells of it."""
        if not progress.iteration:
            return self.begin()
        self.keeps_earlier = not as_it_was
        for old, new in zip(old_names(self.adapter), files_of_run(self.adapter), strict=True):
            if num_bytes(old) and not num_bytes(new):
                shutil.copyfile(old, new)
        if state and state.unsaved_log is not None:  # a kill cut its first save short
            self.write_best(state.unsaved_best)
            self.log.write_text(state.unsaved_log, encoding="utf-8")
        if progress.log_size and num_bytes(self.log) > progress.log_size:
            os.truncate(self.log, progress.log_size)  # the rest belongs to no saved iteration

    def report(self, line: str, **numbers: float) -> None:
        """Print a line, and append its numbers, in full, to the log, a JSON Lines file."""
        print_line(line)
        finite = {name: n if math.isfinite(n) else None for name, n in numbers.items()}
        entry = json.dumps(finite) + "\n"
        if self.unsaved_log is not None:
            self.unsaved_log += entry
            return
        try:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(entry)
        except OSError as error:
            warn(f"the log {self.log} cannot be written: {error.strerror}")

    def keep_best(self, model: nn.Module) -> None:
        """Keep the adapter as it is now as the best."""
        arrays = adapters.trainable_arrays(model)
        if self.keeps_earlier:
            self.unsaved_best = arrays
        else:
            self.write_best(arrays)

    def write_best(self, arrays: dict[str, np.ndarray]) -> None:
        if arrays:
            adapters.write_arrays(best_file(self.adapter), arrays)

    def save(
        self, model: nn.Module, optimizer_state: dict, progress: Progress, settings: dict[str, Any]
    ) -> None:
        """Write the state of the run, and then the adapter file.

        The state holds the adapter too, and at the first save the best adapter and the log. It
        knows by their checksums the adapter file that it belongs to and the one that this replaces,
        so a process that dies in between leaves no doubt, and nothing is missing.
        """
        if self.keeps_earlier:
            self.copy_earlier()
        unsaved = self.unsaved_log is not None
        progress.log_size = len(self.unsaved_log) if unsaved else num_bytes(self.log)
        arrays = adapters.trainable_arrays(model)
        content = adapters.adapter_content(arrays, self.adapter.suffix)
        digest = hashlib.sha256(content).hexdigest()
        notes = {
            "progress": asdict(progress),
            "settings": settings,
            "checksums": {"adapter": digest, "replaced": file_checksum(self.adapter)},
            "log": self.unsaved_log,
        }
        arrays |= {f"best.{name}": array for name, array in self.unsaved_best.items()}
        arrays |= {f"optimizer.{name}": np.array(a) for name, a in tree_flatten(optimizer_state)}
        arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
        with replace_files(state_file(self.adapter)) as [stream]:
            np.savez(stream, **arrays)
        self.write_best(self.unsaved_best)
        if unsaved:  # in place, since the lock is on this file
            self.log.write_text(self.unsaved_log, encoding="utf-8")
        with replace_files(self.adapter) as [stream]:
            stream.write(content)
        self.keeps_earlier, self.unsaved_log, self.unsaved_best = False, None, {}

    def copy_earlier(self) -> None:
        """Copy the files of the earlier run to NAME.previous…, in place of those that are there."""
        previous = other_adapter(self.adapter, "previous")
        copies = dict(zip(files_of_run(self.adapter), files_of_run(previous), strict=True))
        earlier = [file for file in copies if num_bytes(file)]
        with replace_files(*(copies[file] for file in earlier)) as streams:
            for file, stream in zip(earlier, streams, strict=True):
                stream.write(file.read_bytes())
        for file in copies.keys() - set(earlier):
            copies[file].unlink(missing_ok=True)
        warn(f"{self.adapter} held an earlier run; its files are kept as {previous} and beside it")

    def stop_early(self, iteration: int) -> None:
        """Save elsewhere from now on where the adapter that is here has more iterations."""
        if self.keeps_earlier and iteration < self.iterations_here:
            self.adapter = other_adapter(self.adapter, "stopped")
            self.log = log_file(self.adapter)
            self.keeps_earlier = any(map(num_bytes, files_of_run(self.adapter)))

    def fail(self, progress: Progress) -> None:
        """Save the best adapter of a run that cannot be saved itself."""
        if self.unsaved_best and progress.best_iteration > 0:
            self.stop_early(progress.iteration)
            if self.keeps_earlier:
                self.copy_earlier()
            self.write_best(self.unsaved_best)


def old_names(adapter_file: Path) -> list[Path]:
    """`files_of_run` as they were named before: without the ending of the adapter's name."""
    endings = [".state.npz", f".best{adapter_file.suffix}", ".log.jsonl"]
    return [adapter_file, *map(adapter_file.with_suffix, endings)]


def print_line(line: str) -> None:
    """Print a line at once, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


# --- The state ----------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run needs beside its data and its model to go on as if it had never stopped.

    Attributes:
        adapter: A and B of each adapted path.
        optimizer: Adam's moments and step, by the names that MLX gives them.
        progress: how far the run has come.
        settings: what its result depends on.
        unsaved_best, unsaved_log: what is not in files of their own yet; {} and None mostly.
    """

    adapter: adapters.Adapter
    optimizer: dict[str, np.ndarray]
    progress: Progress
    settings: dict[str, Any]
    unsaved_best: dict[str, np.ndarray]
    unsaved_log: str | None


def read(file: Path) -> State | None:
    """The state that belongs to an adapter file, None where there is none.

    Raises:
        UserError: the state file is damaged.
    """
    for state in dict.fromkeys([state_file(file), old_names(file)[1]]):
        if state.is_file() and (found := read_state(state, file)):
            return found
    return None


def read_state(file: Path, adapter_file: Path | None) -> State | None:
    """The state in a file, None where it does not belong to the adapter file (None: to any)."""
    try:
        arrays = adapters.read_arrays(file)
        notes = json.loads(arrays.pop("notes").tobytes())
        sums, log = notes["checksums"], notes.get("log")
        digest = file_checksum(adapter_file) if adapter_file else sums["adapter"]
        if digest not in (sums["adapter"], sums["replaced"]):
            return None
        optimizer, best = take_out(arrays, "optimizer."), take_out(arrays, "best.")
        check_optimizer(optimizer, arrays)
        adapter = adapters.pair_arrays(file, arrays)
        if digest == sums["adapter"]:
            best, log = {}, None
        elif best:
            adapters.pair_arrays(file, best)
        if not isinstance(log, str | None):
            raise TypeError
        progress, settings = read_progress(notes["progress"]), dict(notes["settings"])
    except (UserError, KeyError, ValueError, TypeError, RecursionError):
        raise UserError(
            f"{file} is damaged; without it (delete it) training resumes with fresh moments"
        ) from None
    return State(adapter, optimizer, progress, settings, best, log)


def take_out(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
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
        warn(f"{source} has no state of its run beside it, so Adam starts with fresh moments")
        return False
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


def warn_of_other_model(source: Path, fingerprints: dict[str, str]) -> None:
    """Warn where a state beside an adapter tells that it was trained on another model."""
    state_of_best = source.with_name(re.sub(r"\.best\.\w+$", ".state.npz", source.name))
    try:
        state = read(source) if state_of_best == source else read_state(state_of_best, None)
    except UserError:
        return  # a damaged state tells nothing
    saved = state.settings if state else {}
    if other := [name for name, found in fingerprints.items() if saved.get(name, found) != found]:
        warn(f"{source} was trained on another model: not the same are {', '.join(other)}")
