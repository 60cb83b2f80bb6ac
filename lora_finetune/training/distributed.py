"""One run by several processes, on one machine or more, each with its share of every batch.

A launcher starts them (`mlx.launch`, mpirun), and `mx.distributed` carries what they exchange. Each
exchange begins with the status of all, so a process that fails or is asked to stop tells the others
at their next exchange, and all end together. Where one is killed, MLX raises an error in the others
or waits for ever, by the kind of connection; the launcher then asks them to stop.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from lora_finetune.base import memory
from lora_finetune.base.errors import Interrupted, UserError, describe, first_line, hint
from lora_finetune.base.memory import DeviceError
from lora_finetune.base.signals import RANKS, STOPS, Stop, hearing_stops, process_rank

import mlx.core as mx
import numpy as np

# The status of a process: one of these, or the number of the signal that asks it to stop.
WELL, FAILED = 0, -1
WAIT_AT_END = 30.0  # seconds, for the others where this process has failed or is asked to stop


class LostError(DeviceError):
    """Another process has failed or gone; as where the device fails, what is done is saved."""


class Group:
    """The processes of a run, of which this is one; without a launcher it is the only one."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.hosts = [platform.node()]  # of each process
        self.stop: Stop | None = None  # hears signals in training and in a test
        self.agreed_signal = 0  # that all have been told of
        self.is_told = False  # whether all know that the run ends
        self.is_over = True  # whether there is nothing more to exchange
        self.shares_weights = False  # whether each has a part of the model, which others need
        self.longest = 0.0  # seconds that `compute` took
        self.patience = WAIT_AT_END

    def connect(self) -> None:
        """Find the other processes; raises UserError."""
        hint("waiting for the other processes")
        self.rank, self.thread = process_rank(), ThreadPoolExecutor(1)
        try:
            self.comm = self.wait_for(mx.distributed.init, strict=True)
        except LostError as error:
            raise UserError(
                f"the other processes were not found ({first_line(error.__cause__)}); start all "
                "with mlx.launch, or unset MLX_RANK"
            ) from None
        self.rank, self.size, self.is_over = self.comm.rank(), self.comm.size(), False
        self.hosts = self.gather_texts(platform.node())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that locks, prints, logs, saves and draws for all."""
        return self.rank == 0

    @property
    def processes_here(self) -> int:
        """How many there are on this machine."""
        return self.hosts.count(self.hosts[self.rank])

    def name(self, rank: int) -> str:
        return f"process {rank} (on {self.hosts[rank]})"

    # --- What they exchange

    def gather(self, number: float = 0.0, count: int = 0) -> list[tuple[float, int]]:
        """A number and a count of each process, in float32, by rank; raises LostError."""
        if self.size == 1:
            return [(number, count)]
        asked = self.stop and self.stop.signal
        statuses, numbers, counts = self.exchange(asked or WELL, number, count)
        if FAILED in statuses:
            self.is_told = True
            failed = self.name(statuses.index(FAILED))
            raise LostError(f"{failed} has failed or was interrupted: see its line")
        self.agreed_signal = self.agreed_signal or int(max(statuses))
        return list(zip(numbers, map(int, counts), strict=True))

    def largest(self, number: float) -> float:
        """The largest of a number of each process; raises LostError."""
        return max(other for other, _ in self.gather(float(number)))

    def exchange(self, status: int, number: float = 0.0, count: int = 0) -> list[tuple]:
        """The statuses, the numbers and the counts of all."""
        row = mx.array([[status, number, count]])
        rows = self.wait_for(mx.distributed.all_gather, row, group=self.comm)
        return list(zip(*rows.tolist(), strict=True))

    def texts_of_first(self, texts: list[str]) -> list[str]:
        """The texts that the first process has; raises LostError."""
        return json.loads(self.gather_texts(json.dumps(texts))[0])

    def gather_texts(self, text: str) -> list[str]:
        """A text of each process, by rank; raises LostError."""
        content = text.encode()
        lengths = [length for _, length in self.gather(count=len(content))]
        padded = mx.array(np.frombuffer(content.ljust(max(lengths)), np.uint8)[None])
        rows = np.array(self.wait_for(mx.distributed.all_gather, padded, group=self.comm))
        return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]

    def sum(
        self, total: mx.array, gradient: mx.array, count: int
    ) -> tuple[mx.array, mx.array, int]:
        """The sums over all processes of a number and a gradient (n,), float32, and of a count.

        Raises:
            LostError: another process has failed or gone.
            RuntimeError, MemoryError: MLX's, where computing them failed in this process.
        """
        if self.size == 1:
            return total, gradient, count
        both = mx.concatenate([total[None], gradient])
        mx.eval(both)
        count = sum(number for _, number in self.gather(count=count))
        both = self.wait_for(mx.distributed.all_sum, both, group=self.comm)
        return both[0], both[1:], count

    def share_weights(self) -> None:
        """From now on each process has a part of the model; see `compute`."""
        if self.size == 1:
            hint("--shard is for several processes, which mlx.launch starts; this one holds all")
            return
        self.shares_weights, memory.num_parts = True, self.size
        # So that `compute` can take what is not computed yet: an ordinary stream is for one thread.
        mx.set_default_stream(mx.new_thread_unsafe_stream(mx.default_device()))

    def of_first(self, array: mx.array) -> mx.array:
        """The array that the first process has, where all compute alike; of one dimension."""
        if not self.shares_weights:
            return array
        return mx.distributed.all_gather(array, group=self.comm)[: len(array)]

    def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """The results of a function; computed ones where weights are gathered for it.

        Then all processes compute at the same time, none without the others; raises LostError.
        """
        if not self.shares_weights:
            return function(*args)
        self.gather()
        start, was_over = time.monotonic(), self.is_over
        self.is_over = True  # one that fails meanwhile cannot tell the others
        self.patience = min(WAIT_AT_END, 5.0) + 2 * self.longest
        result = self.wait_for(function, *args)
        self.longest = max(self.longest, time.monotonic() - start)
        self.patience, self.is_over = WAIT_AT_END, was_over
        return result

    def wait_for(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call what waits for the other processes, maybe for ever; raises LostError.

        It does so in a thread, so that this one hears of signals and can save what there is.
        """

        def call() -> Any:
            result = function(*args, **options)
            mx.eval(result)
            return result

        self.pending, end = self.thread.submit(call), math.inf
        while time.monotonic() < end and wait([self.pending], timeout=0.5).not_done:
            if self.is_told or (self.stop and self.stop.signal):
                end = min(end, time.monotonic() + self.patience)
        try:
            return self.pending.result(timeout=0)
        except (RuntimeError, TimeoutError) as error:
            self.is_over = True
            raise LostError(
                f"the connection to another process was lost ({first_line(error)}); it may have "
                "been killed, for lack of memory for example"
            ) from error

    # --- What they agree on

    def compare(self, values: dict[str, object]) -> None:
        """Raise UserError where values, by names to report them under, differ among processes."""
        if self.size == 1:
            return
        mine = {name: str(value) for name, value in values.items()}
        first, *others = map(json.loads, self.gather_texts(json.dumps(mine)))
        for rank, other in enumerate(others, 1):
            differing = [
                f"{name} ({other.get(name, 'none'):.20}, not {first.get(name, 'none'):.20})"
                for name in first | other
                if first.get(name) != other.get(name)
            ]
            if differing:
                raise UserError(
                    f"{self.name(rank)} differs from {self.name(0)} in {', '.join(differing)}; "
                    "make that the same on all machines"
                )

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """A block that the first process goes through before the others; raises LostError."""
        if not self.is_first:
            self.gather()
        yield
        if self.is_first:
            self.gather()

    @contextmanager
    def hear_stops(self) -> Iterator[None]:
        """A block in which signals ask for a stop, which `check_stop` raises."""
        with hearing_stops() as self.stop:
            yield
        self.stop = None

    def check_stop(self) -> None:
        """Raise Interrupted if a signal asks for a stop, and all processes know of it."""
        asked = self.agreed_signal if self.size > 1 else self.stop and self.stop.signal
        if asked:
            self.is_told = True
            raise Interrupted(asked, "nothing new was saved")

    # --- How they end

    def leave(self) -> None:
        """Wait until all have done their share; what follows does not concern the others."""
        self.gather()
        self.is_over = True

    def fail(self, error: BaseException) -> None:
        """Tell the others of a failure, unless they know, and wait until the first has saved.

        The first prints its error, as without others; another one where that tells something new.
        """
        for number in STOPS:  # by which launchers end the rest
            signal.signal(number, signal.SIG_IGN)
        line, prints = describe(error), not self.is_told
        if not self.is_first:
            line = line.replace(": ", f": process {self.rank} (on {platform.node()}): ", 1)
        with suppress(LostError):
            if not (self.is_over or self.is_told):
                self.is_told = True
                [first, *_], *_ = self.exchange(FAILED)
                prints = first != FAILED
            if not self.is_over:
                self.exchange(WELL)
        hangs = not self.pending.done()
        if hangs if self.is_first else prints:
            print(line, file=sys.__stderr__, flush=True)
        if hangs:  # an ordinary exit would wait for MLX
            os._exit(2)


# A run that nobody else takes part in.
ALONE = Group()


@contextmanager
def join() -> Iterator[Group]:
    """The group of this run's processes; whatever ends one of them in it ends all."""
    group = Group()
    if not is_launched():
        yield group
        return
    error = None
    try:
        group.connect()
        yield group
    except BaseException as raised:
        error = raised
        group.fail(error)
        if not group.shares_weights:
            raise
    if group.shares_weights:
        end_process(error)


def end_process(error: BaseException | None) -> NoReturn:
    """End as Python does, but free nothing: where another thread has compiled, MLX can abort."""
    status = 1 if error else 0
    try:
        if error:
            sys.excepthook(type(error), error, error.__traceback__)
    except SystemExit as ended:
        status = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_launched() -> bool:
    """Whether a launcher has started several processes; mlx.launch -n 1 gives an empty file."""
    hosts = Path(os.environ.get("MLX_HOSTFILE", ""))
    is_alone = hosts.is_file() and not hosts.read_text().strip()
    return not is_alone and any(rank in os.environ for rank in RANKS)
