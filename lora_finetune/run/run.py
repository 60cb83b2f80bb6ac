"""Where a run saves: NAME.npz, its adapter, and NAME.run/ beside it with all the rest."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from itertools import count
from pathlib import Path

from lora_finetune.adapters import loading, npz
from lora_finetune.base.command_line import ROOT
from lora_finetune.base.errors import UserError, warn
from lora_finetune.base.files import atomic_write, file_checksum, real_file
from lora_finetune.run.checkpoint import (
    FRESH,
    Progress,
    Start,
    read_start,
    run_folder,
    warn_of_changes,
    write_state,
)
from lora_finetune.run.config import Config
from lora_finetune.texts import batching, dataset
from lora_finetune.training.distributed import ALONE, Group

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class Run:
    """One run: where it starts, how far it has come, and the files that it saves.

    A lock keeps other runs from training the same adapter. An earlier run under this name stays as
    it is until this one first saves; then it is renamed to NAME.previous-K, all of it. Until then
    this run keeps its log in memory.

    Attributes:
        adapter: the adapter file.
        path: the folder, with state.npz, best.npz, log.jsonl, losses.png and lock.
        config, group: its flags, and its processes, of which the first writes the files.
        start: the adapter to start from, and the state of the run that it is of.
        progress: how far it has come.
        iters: the iteration to train to.
        settings: what its result depends on, by the names to report each under.
        log_lines: of this run, also those that wait for its first save to be written.
        pending_best: arrays of the best adapter, to be written with the next save.
        replaces: whether an earlier run is to be renamed first.
    """

    def __init__(
        self, adapter: Path, start: Start = FRESH, config: Config | None = None,
        group: Group = ALONE,
    ):  # fmt: skip
        self.adapter, self.path, self.writes = adapter, run_folder(adapter), group.is_first
        self.config, self.group = config, group
        self.best, self.picture = self.path / "best.npz", self.path / "losses.png"
        self.log, self.log_lines = self.path / "log.jsonl", []
        self.start, self.iters, self.settings = start, 0, {}
        self.progress = start.state.progress if start.state else Progress()
        self.pending_best: dict[str, np.ndarray] = {}
        self.replaces, self.lock_stream = False, None

    def check(self) -> None:
        """Check that a run can save here; raises UserError where it cannot."""
        if not self.writes:
            return
        if self.adapter.is_dir():
            raise UserError(f"the adapter file {self.adapter} is a folder; give another name")
        if self.adapter.parent.suffix == ".run":
            raise UserError(f"{self.adapter} is a file of a run; give another --adapter-file")
        try:
            with suppress(FileNotFoundError):
                (self.renamed(99)[1] / "best.npz.part").lstat()  # raises where a name is too long
            with tempfile.TemporaryFile(dir=self.adapter.parent):
                pass
        except OSError as error:
            raise UserError(
                f"the adapter file {self.adapter} cannot be written: {error.strerror}"
            ) from None
        if (self.path / "lock").exists():  # a run that is training this adapter is told at once
            self.lock()

    def lock(self) -> None:
        """Take the lock, which ends with the process; raises UserError if another run has it."""
        if self.lock_stream or not self.writes:
            return
        self.path.mkdir(exist_ok=True)
        self.lock_stream = (self.path / "lock").open("ab")
        try:
            fcntl.flock(self.lock_stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is training this adapter (it writes {self.path}); wait for its end, "
                "or give another --adapter-file"
            ) from None
        except OSError:
            pass  # a file system without locks

    def begin(self) -> None:
        """Begin to train, or go on as the state tells; warn of what has changed since."""
        self.lock()
        start, state = self.start, self.start.state
        changed = bool(start.source) and warn_of_changes(start, self.settings)
        if changed:
            self.progress.reset_losses()
        unchanged = bool(state) and self.progress is state.progress and not changed
        if not self.writes:
            return
        earlier = start.source and Run(start.source)
        in_place = bool(earlier) and earlier.path.resolve() == self.path.resolve()
        lines, iteration = earlier.read_log() if earlier else [], self.progress.iteration
        if unchanged:  # what comes after the save will come again, but for later tests
            saved = self.progress.log_lines
            lines = lines[:saved] + [line for line in lines[saved:] if '"test_loss"' in line]
            self.pending_best = state.best or (read_best(earlier.best) if not in_place else {})
        else:
            is_rewound = in_place and state and iteration
            lines = [
                line
                for line in lines
                if is_rewound and 0 < json.loads(line).get("iter", 0) <= iteration
            ]
        self.log_lines = lines
        self.replaces = not (in_place and unchanged) and any(
            file.exists() for file in (self.adapter, self.path / "state.npz", self.best)
        )
        shutil.rmtree(self.new_path, ignore_errors=True)  # of a run that was killed
        if not self.replaces:
            self.rewrite_log(self.path)  # over what a run left that never saved

    def read_log(self) -> list[str]:
        """The whole lines of the log; a kill may leave half of one."""
        if not self.log.is_file():
            return []
        lines = self.log.read_text("utf-8", errors="replace").splitlines(keepends=True)
        return [line for line in lines if line.startswith("{") and line.endswith("}\n")]

    def rewrite_log(self, folder: Path) -> None:
        if self.log_lines or self.log.exists():
            with atomic_write(folder / self.log.name) as [stream]:
                stream.write("".join(self.log_lines).encode())

    def add_to_log(self, numbers: dict[str, float]) -> None:
        """Append an entry of numbers, in full, to the log, a JSON Lines file."""
        entry = {name: n if math.isfinite(n) else None for name, n in numbers.items()}
        self.log_lines.append(json.dumps(entry) + "\n")
        if self.replaces or not self.writes or self.adapter.suffix != ".npz":
            return
        try:
            self.path.mkdir(exist_ok=True)
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(self.log_lines[-1])
        except OSError as error:
            warn(f"the log {self.log} cannot be written: {error.strerror}")

    def keep_best(self, model: nn.Module) -> None:
        """Keep the adapter as it is now as the best, to be written with the next save."""
        self.pending_best = npz.file_arrays(model)

    def save(self, model: nn.Module, optimizer: dict[str, mx.array]) -> None:
        """Save the run: first its state, which holds all, then what is written from it."""
        if not self.writes:
            return
        self.progress.log_lines = len(self.log_lines)
        folder = self.new_path if self.replaces else self.path
        folder.mkdir(exist_ok=True)
        if self.replaces:
            self.rewrite_log(folder)
        replaced = None if self.replaces else file_checksum(self.adapter)
        content = write_state(
            folder / "state.npz", replaced, model, optimizer, self.progress, self.settings,
            self.pending_best,
        )  # fmt: skip
        self.take_place()
        self.save_best()
        with atomic_write(self.adapter) as [stream]:
            stream.write(content)

    def save_best(self) -> bool:
        """Write the best adapter, if there is one that is not written yet; returns whether."""
        if not (self.writes and self.pending_best):
            return False
        self.take_place()
        npz.write_arrays(self.best, self.pending_best)
        self.pending_best = {}
        return True

    def is_at_end(self) -> bool:
        return self.progress.iteration == self.iters or self.progress.stopped_early > 0

    def take_place(self) -> None:
        """Rename an earlier run, once, and put what this one has so far in its place."""
        if not self.replaces:
            return
        for adapter, folder in map(self.renamed, count(1)):
            # Where there is only such an adapter, a kill came between these two renamings.
            if not folder.exists() and not (adapter.exists() and self.adapter.exists()):
                break
        if self.adapter.exists():
            self.adapter.rename(adapter)
        self.path.rename(folder)
        if self.new_path.exists():
            self.new_path.rename(self.path)
        else:
            self.path.mkdir()
            self.rewrite_log(self.path)
        warn(f"the earlier run of {self.adapter} is kept as {adapter} and {folder}")
        self.replaces, self.lock_stream = False, None
        self.lock()

    @property
    def new_path(self) -> Path:
        """The folder of the first save, until the earlier run is out of the way."""
        return self.path.with_suffix(".run-new")

    def renamed(self, number: int) -> tuple[Path, Path]:
        """The names that an earlier run is given: of its adapter and of its folder."""
        stem = self.adapter.with_name(f"{self.adapter.stem}.previous-{number}.npz")
        return stem, run_folder(stem)


def read_best(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a best adapter, none where they cannot be read."""
    try:
        return npz.read_arrays(file)
    except (UserError, OSError):
        return {}


def open_run(config: Config, files: dict[str, dataset.File], group: Group) -> Run:
    """The run of a configuration, checked as far as that goes without a model.

    Args:
        files: the data files, by their splits.
        group: the processes of the run.

    Raises:
        UserError: there is no such adapter, it is damaged, a run cannot save there, or nothing is
            left to do.
    """
    adapter = real_file(Path(config.adapter_file))
    if not config.train:
        if not adapter.exists():
            raise UserError(f"there is no adapter file {adapter}; --train makes one")
        source = loading.find_adapter(adapter)
        start = Start(source, loading.read_adapter(source), FRESH.scale)
        return Run(source, start, config, group)
    if resumed := config.resume_adapter_file:
        start = read_start(real_file(Path(resumed)), config.lora_scale)
    else:
        start = FRESH._replace(scale=config.lora_scale or FRESH.scale)
    run = Run(adapter, start, config, group)
    run.check()
    if config.start_iter not in (None, run.progress.iteration):
        run.progress = Progress(config.start_iter)
    progress = run.progress
    per_epoch = math.ceil(len(files["train"].rows) / config.batch_size)
    run.iters = config.iters or config.epochs * per_epoch
    if progress.iteration > run.iters or (progress.iteration == run.iters and not start.state):
        raise UserError(
            f"iteration {progress.iteration} of {run.iters} is done already (--start-iter, or the "
            "run to resume); raise --epochs or --iters, or begin anew from its adapter with "
            "--start-iter 0"
        )
    if progress.stopped_early and run.iters > progress.stopped_early:
        progress.not_improved = 0  # with more iterations, patience begins anew
    progress.stopped_early = 0
    run.settings = config.flags("result") | {"--lora-scale": start.scale}
    run.settings |= {files[split].path.name: files[split].checksum for split in ("train", "valid")}
    return run


def must_agree(
    run: Run, model: nn.Module, examples: dict[str, batching.Examples], identity: dict[str, str]
) -> dict[str, object]:
    """All that the processes of a run must have the same, by the names to report each under.

    Args:
        model: with the adapter to start from.
        identity: of the model, by names.
    """
    state = run.start.state
    arrays = {"the adapter to start from": list(npz.trainable_arrays(model).values())}
    arrays |= {"Adam's moments to start from": [*state.optimizer.values()] if state else []}
    for split, e in examples.items():
        arrays[f"the tokens of {split}.jsonl"] = [e.tokens, e.is_target]
    sources = sorted([*ROOT.glob("*.py"), *(ROOT / "lora_finetune").rglob("*.py")])
    contents = {"the source of this program": [path.read_bytes() for path in sources]}
    contents |= {name: [a.tobytes() for a in some] for name, some in arrays.items()}
    return {
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
        **run.config.flags("own", marked=False),
        **(run.settings if run.config.train else {}),
        **identity,
        **{name: sha256(b"".join(content)).hexdigest() for name, content in contents.items()},
        "the run to resume": asdict(run.progress),
        "the iterations": run.iters,
    }
