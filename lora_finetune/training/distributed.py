"""One run by several processes, on one machine or more, each with its share of every batch.

A launcher starts them (`mlx.launch`, mpirun), and MLX's own engine carries what they exchange. Each
exchange begins with the status of all. So a process that fails, or is asked to stop, tells the
others at their next exchange, wherever in the program that is, and nobody waits for ever.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from lora_finetune.base.errors import Interrupted, UserError, describe, first_line, hint
from lora_finetune.base.memory import DeviceError
from lora_finetune.base.signals import LAUNCHERS, StopSignals, handle, process_rank, restore

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

# The status of a process: one of these, or the number of the signal that asks for a stop.
WELL, FAILED, INTERRUPTED = 0, -1, -2
# Seconds to wait for the others: to connect, in training; where this one is to stop or has failed,
# with the time of two steps on top; and where another process on this machine has gone. MLX does
# not always notice that: its ring may wait for ever on a connection that it has given up.
LONGEST_WAIT, WAIT_AT_END, WAIT_FOR_GONE = 600.0, 30.0, 2.0


class LostError(DeviceError):
    """Another process has failed or gone, so that this one cannot go on.

    It is a DeviceError since the same follows: the last whole iteration is saved.
    """


class Group:
    """The processes of a run, of which this is one; without a launcher it is the only one.

    Attributes:
        rank: the number of this process, from 0.
        size: how many they are.
        hosts: the name of the machine of each.
        here: those on this machine.
        stop: hears the signals that ask for a stop, in training and in a test.
        rescue: saves what there is to save where the others are gone, and says what came of it.
    """

    def __init__(self, comm: mx.distributed.Group | None = None):
        self.comm = comm
        self.rank, self.size = (comm.rank(), comm.size()) if comm else (0, 1)
        self.hosts, self.here = [platform.node()] * self.size, [self.rank]
        self.stop: StopSignals | None = None
        self.rescue: Callable[[], str] = lambda: "nothing new was saved"
        self.agreed_signal = 0  # that all have been told of
        self.is_told = False  # whether all know that the run ends
        self.is_over = self.size == 1  # whether there is nothing more to exchange
        self.error_line: str | None = None  # of a process that has failed; "" where it says none
        self.longest_wait = math.inf
        self.waiting_since: float | None = None
        self.last_exchange, self.intervals = time.monotonic(), deque([0.0], maxlen=8)
        self.locked: list[IO] = []  # by this process, and by each other on this machine
        if self.size > 1:
            threading.Thread(target=self.watch, daemon=True).start()
            self.meet()

    def meet(self) -> None:
        """Learn where the others are, and open the file that each on this machine keeps locked.

        The lock goes with its process, however that ends, and the file once all have it open.
        """
        own = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115, closed when this ends
        with suppress(OSError):  # a file system without locks
            fcntl.flock(own, fcntl.LOCK_EX)
        texts = self.gather_texts(json.dumps([platform.node(), own.name]))
        self.hosts, names = zip(*map(json.loads, texts), strict=True)
        self.here = [rank for rank, name in enumerate(names) if Path(name).is_file()]
        others = [names[rank] for rank in self.here if rank != self.rank]
        self.locked = [own, *map(open, others)]
        self.gather()
        Path(own.name).unlink()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that locks, prints, logs, saves and draws for all."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """A process, as messages name it."""
        return f"process {rank} (on {self.hosts[rank]})"

    # --- What they exchange

    def gather(self, number: float = 0.0, count: int = 0) -> list[tuple[float, int]]:
        """A float32 and an int32 of each process, by rank.

        Raises:
            LostError: another process has failed or gone.
        """
        if self.size == 1:
            return [(number, count)]
        asked = self.stop.signal if self.stop else None
        statuses, gathered = self.exchange(asked or WELL, number, count)
        if min(statuses) < WELL:
            self.is_told = True
            what = "was interrupted" if min(statuses) == INTERRUPTED else "has failed: see its line"
            raise LostError(f"{self.name(statuses.index(min(statuses)))} {what}")
        self.agreed_signal = self.agreed_signal or max(statuses)
        return gathered

    def exchange(
        self, status: int, number: float = 0.0, count: int = 0
    ) -> tuple[list[int], list[tuple[float, int]]]:
        """The statuses of all, and the number and the count of each."""
        mine = np.array([status, count, np.float32(number).view(np.int32)], np.int32)
        rows = self.wait_for(mx.distributed.all_gather, mx.array(mine))
        statuses, counts, bits = np.array(rows).reshape(self.size, 3).T
        numbers = np.ascontiguousarray(bits).view(np.float32)
        return statuses.tolist(), list(zip(numbers.tolist(), counts.tolist(), strict=True))

    def gather_texts(self, text: str) -> list[str]:
        """A text of each process, by rank; raises LostError."""
        content = text.encode()
        lengths = [length for _, length in self.gather(count=len(content))]
        padded = np.zeros((1, max(lengths)), np.uint8)
        padded[0, : len(content)] = np.frombuffer(content, np.uint8)
        rows = np.array(self.wait_for(mx.distributed.all_gather, mx.array(padded)))
        return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]

    def sum(self, total: mx.array, gradients: dict, count: int) -> tuple[mx.array, dict, int]:
        """The sums over all processes of a number and of gradients, float32, and of a count.

        Raises:
            LostError: another process has failed or gone.
            RuntimeError, MemoryError: MLX's, where computing them failed in this process.
        """
        if self.size == 1:
            return total, gradients, count
        names, arrays = zip(*tree_flatten(gradients), strict=True)
        flat = mx.concatenate([total[None], *(array.flatten() for array in arrays)])
        mx.eval(flat)
        count = sum(number for _, number in self.gather(count=count))
        summed = self.wait_for(mx.distributed.all_sum, flat)
        ends = np.cumsum([1, *(array.size for array in arrays)]).tolist()
        total, *parts = mx.split(summed, ends[:-1])
        parts = [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]
        return total[0], tree_unflatten(list(zip(names, parts, strict=True))), count

    def wait_for(self, collective: Callable[..., mx.array], given: mx.array) -> mx.array:
        """What all processes make together of what each gives; raises LostError if one has gone."""
        self.waiting_since = time.monotonic()
        try:
            with nullcontext() if self.stop else ctrl_c_ends():
                array = collective(given, group=self.comm)
                mx.eval(array)  # here, since NumPy drops its errors
        except RuntimeError as error:
            self.is_over = True
            raise LostError(
                f"the connection to another process was lost ({first_line(error)}); it may have "
                "been killed, for lack of memory for example"
            ) from error
        finally:
            self.waiting_since = None
        while self.error_line is not None and self.is_over:
            time.sleep(1)  # until `give_up`, in its thread, ends this process
        now = time.monotonic()
        self.intervals.append(now - self.last_exchange)
        self.last_exchange = now
        return array

    # --- What they agree on

    def compare(self, values: dict[str, object]) -> None:
        """See that all look at the same thing; from then on nobody waits longer than LONGEST_WAIT.

        Args:
            values: by the name to report each under; those of names without a space are shown.

        Raises:
            UserError: a value differs; says which, and where.
            LostError: another process has failed or gone.
        """
        mine = {name: str(value) for name, value in values.items()}
        first, *others = map(json.loads, self.gather_texts(json.dumps(mine)))
        for rank, other in enumerate(others, 1):
            differing = [name for name in first | other if first.get(name) != other.get(name)]
            if differing:
                shown = [
                    name if " " in name else f"{name} ({other.get(name)}, not {first.get(name)})"
                    for name in differing
                ]
                raise UserError(
                    f"{self.name(rank)} differs from {self.name(0)} in {', '.join(shown)}; make "
                    "that the same on all machines"
                )
        self.longest_wait = LONGEST_WAIT
        self.intervals = deque([0.0], maxlen=8)

    @contextmanager
    def first_here(self) -> Iterator[None]:
        """A block that one process on each machine goes through first; raises LostError."""
        if self.rank != self.here[0]:
            self.gather()
        yield
        if self.rank == self.here[0]:
            self.gather()

    def deal(self, items: list) -> list:
        """The items of this process, one of each round; None where a round has none for it."""
        rounds = -(-len(items) // self.size)
        return [*items, *[None] * self.size][self.rank :: self.size][:rounds]

    @contextmanager
    def hear_stops(self) -> Iterator[None]:
        """A block in which signals ask for a stop, which `check_stop` raises."""
        with StopSignals() as self.stop:
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
        """Wait until all have done their part; what follows is of no concern to the others."""
        self.gather()
        self.is_over = True

    def fail(self, error: BaseException) -> None:
        """Tell the others of a failure, unless they know, and wait until the first has saved.

        Other processes than the first print their own error, unless the first has the same.
        """
        if self.size == 1:
            return
        handle([signal.SIGTERM, signal.SIGHUP], signal.SIG_IGN)  # by which launchers end the rest
        if self.is_over and self.is_first:
            return
        line = describe(error, "the run")
        error_hash, first_prints_it = zlib.crc32(line.encode()) >> 1, self.is_told
        is_interrupt = isinstance(error, KeyboardInterrupt)
        if not self.is_first:
            line = "" if is_interrupt else line.replace(": ", f": {self.name(self.rank)}: ", 1)
        self.error_line = line
        if not (self.is_told or self.is_over):
            with suppress(LostError):
                status = INTERRUPTED if is_interrupt else FAILED
                statuses, told = self.exchange(status, count=error_hash)
                first_prints_it = (statuses[0], told[0][1]) == (status, error_hash)
        if line and not (self.is_first or first_prints_it):
            print(line, file=sys.__stderr__, flush=True)
        if not self.is_over:
            with suppress(LostError):
                self.exchange(WELL)

    def watch(self) -> None:
        """End this process where it has waited too long for the others, in a thread of its own."""
        asked_at, gone_at, parent = math.inf, math.inf, os.getppid()
        while True:
            time.sleep(0.5)
            since, now = self.waiting_since, time.monotonic()
            if self.stop and os.getppid() != parent:  # the launcher was killed
                self.stop.signal = self.stop.signal or signal.SIGHUP
            is_ending = self.error_line is not None or (self.stop and self.stop.signal)
            asked_at = min(asked_at, now) if is_ending else math.inf
            if since is None:
                continue
            gone_at = min(gone_at, now) if self.has_one_gone() else math.inf
            at_end = max(since, asked_at) + WAIT_AT_END + 2 * max(self.intervals)
            if now > min(since + self.longest_wait, at_end, max(since, gone_at) + WAIT_FOR_GONE):
                self.give_up(now - since)

    def has_one_gone(self) -> bool:
        """Whether another process on this machine has ended, which frees what it kept locked."""
        for file in self.locked[1:]:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
        return False

    def give_up(self, seconds: float) -> None:
        """Say so, save what there is, and end this process, whose main thread hangs in MLX."""
        words, self.error_line, self.is_over = self.error_line, "", True
        timer = threading.Timer(WAIT_AT_END, os._exit, [2])  # where the device lets nothing be read
        timer.daemon = True
        timer.start()
        if words is None:
            words = (
                f"error: {'' if self.is_first else self.name(self.rank) + ': '}another process has "
                f"gone, or does not answer (for {seconds:.0f} s); it may have been killed, for "
                f"lack of memory for example; {self.rescue()}"
            )
        print(words, end="\n" * bool(words), file=sys.__stderr__, flush=True)
        os._exit(128 + self.stop.signal if self.stop and self.stop.signal else 2)


# A run that nobody else takes part in.
ALONE = Group()


@contextmanager
def join() -> Iterator[Group]:
    """The group of this run's processes; whatever ends one of them in it ends all.

    Raises:
        UserError: the others were not found.
    """
    group = None
    try:
        size = num_launched()
        group = connect(size) if size > 1 else Group()
        yield group
    except BaseException as error:
        if group:
            group.fail(error)
        elif process_rank():
            print(describe(error, "the run"), file=sys.__stderr__, flush=True)
        raise


def num_launched() -> int:
    """How many processes a launcher has started; 1 without one.

    Raises:
        UserError: the launcher does not tell how many.
    """
    names = next((names for names in LAUNCHERS if names[0] in os.environ), None)
    if names is None:
        return 1
    size = os.environ.get(names[1])
    hosts = os.environ.get("MLX_HOSTFILE") or os.environ.get("MLX_IBV_DEVICES")
    try:
        # For a single process mlx.launch makes an empty file, which MLX itself cannot read.
        return int(size) if size else len(json.loads(Path(hosts).read_text().strip() or "[0]"))
    except (OSError, TypeError, ValueError):
        raise UserError(
            f"{names[0]} is set, but nothing says how many processes there are; start them with "
            "mlx.launch, or unset it"
        ) from None


@contextmanager
def ctrl_c_ends() -> Iterator[None]:
    """While MLX waits, which does not return to Python, a Ctrl-C ends the process."""
    handlers = handle([signal.SIGINT], signal.SIG_DFL)
    try:
        yield
    finally:
        restore(handlers)


def connect(size: int) -> Group:
    """Find the other processes that a launcher has started, which a signal ends after some time."""
    hint(f"waiting for all {size} processes, up to {LONGEST_WAIT / 60:.0f} minutes")
    signal.setitimer(signal.ITIMER_REAL, LONGEST_WAIT)  # MLX itself waits without an end
    failed = f"process {process_rank()} of {size} did not find the others"
    try:
        with ctrl_c_ends():
            comm = mx.distributed.init()
    except RuntimeError as error:
        raise UserError(f"{failed} ({first_line(error)}); see how they were launched") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if comm.size() != size:
        raise UserError(f"{failed}: MLX has no library here for how they were launched")
    return Group(comm)
