"""Tokenized texts, and the batches of them: drawn, shared out among processes, padded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np

# Tokens int32 (rows, width), and whether each is a target, bool (rows, width); where the model
# starts from hidden states, these too.
Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Examples:
    """Tokenized texts, one after the other in one array."""

    tokens: np.ndarray  # int32 (total number of tokens,)
    starts: np.ndarray  # int64 (number of texts + 1,), and where the last one ends
    is_target: np.ndarray  # bool (total number of tokens,); never the first token of a text
    num_truncated: int = 0  # texts that were longer
    max_length: float = math.inf  # of texts, and the most inputs in a batch, padding included

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 (number of texts,)."""
        return np.diff(self.starts)

    @property
    def num_targets(self) -> np.ndarray:
        """Tokens of each text that the loss counts, int64 (number of texts,)."""
        return np.diff(np.append(0, np.cumsum(self.is_target))[self.starts])

    def batch(self, rows: np.ndarray) -> Batch:
        """The given texts, padded on the right."""
        lengths = self.lengths[rows]
        shape = len(rows), padded_width(lengths, self.max_length)
        tokens, is_target = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, (start, length) in enumerate(zip(self.starts[rows], lengths, strict=True)):
            tokens[row, :length] = self.tokens[start : start + length]
            is_target[row, :length] = self.is_target[start : start + length]
        return tokens, is_target


def padded_width(lengths: np.ndarray, max_inputs: float = math.inf) -> int:
    """The width of a batch of texts of these lengths; all tokens but the last are inputs."""
    return 1 + min(padded_length(max(1, max(lengths) - 1)), max_inputs)


def padded_length(length: int) -> int:
    """Round up to a multiple of 32, above 256 of 64, above 512 of 128 …; on a CPU of a quarter.

    Each new width has the step traced again and, on a GPU, kernels chosen, which takes seconds. A
    CPU only traces, and padding costs it more.
    """
    step = max(32, 2 ** (int(length - 1).bit_length() - 3))
    step //= 4 if mx.default_device() == mx.cpu else 1
    return -(-length // step) * step


# Texts are sorted by length within this many batches: wide enough that a batch's lengths are
# nearly equal, small enough that its members change from epoch to epoch.
POOL_BATCHES = 50


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch, arrays of indices, in random order; one of them may be short.

    Texts in a batch are of similar lengths, the shortest first.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches = []
    for pool in np.split(order, range(0, len(order), POOL_BATCHES * batch_size)[1:]):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(0, len(pool), batch_size)[1:])
    return [batches[i] for i in rng.permutation(len(batches))]


def rows_of(lengths: np.ndarray, batch_size: int, seed: int, iteration: int) -> np.ndarray:
    """The texts of the batch of an iteration, the first of which is 1."""
    epoch, number = divmod(iteration - 1, math.ceil(len(lengths) / batch_size))
    return epoch_batches(lengths, batch_size, seed, epoch)[number]


def training_batches(
    examples: Examples, batch_size: int, seed: int, start: int,
    micro_batches: int = 1, rank: int = 0, size: int = 1,
) -> Iterator[list[Batch]]:  # fmt: skip
    """The batches from iteration start + 1 on, endlessly; each depends on the seed alone.

    Of each batch comes the share of process `rank` of `size`, in micro-batches.
    """
    per_epoch = math.ceil(len(examples) / batch_size)
    for epoch in count(start // per_epoch):
        batches = epoch_batches(examples.lengths, batch_size, seed, epoch)
        for rows in batches[start % per_epoch :]:
            share = np.array_split(rows, size)[rank]
            yield [examples.batch(some) for some in split_batch(share, micro_batches)]
        start = 0


def split_batch(rows: np.ndarray, number: int) -> list[np.ndarray]:
    """Texts in so many shares or micro-batches of nearly the same size, none of them empty."""
    return np.array_split(rows, min(number, len(rows))) if len(rows) else []


def evaluation_batches(
    examples: Examples, batch_size: int, num_batches: int, micro_batches: int = 1
) -> list[np.ndarray]:
    """The micro-batches of the first `num_batches` batches (-1: all), sorted by length."""
    number = len(examples) if num_batches == -1 else min(len(examples), num_batches * batch_size)
    order = np.argsort(examples.lengths[:number], kind="stable")
    batches = np.split(order, range(0, number, batch_size)[1:])
    return [some for batch in batches for some in split_batch(batch, micro_batches)]
