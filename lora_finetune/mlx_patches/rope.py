"""Rotary embeddings as PyTorch computes them from a model's folder, in the place of others.

mlx-lm leaves out some scalings, and does not know some settings of others. Here the formulas are
written once, after transformers' `modeling_rope_utils` (5.24) and the papers that it names (YaRN,
arXiv 2309.00071; LongRoPE, 2402.13753). rope_correction.py puts them into a loaded model.

Two kinds of scaling depend on the length of a text: "dynamic", and "longrope", which has factors
for texts up to the length that a model was first trained on and others for longer ones.
transformers takes the length of a whole batch, padding included. Here it is that of each text
(`text_lengths`): neither padding nor the texts beside it change a text, and training computes what
generation does. Where a text grows beyond that length while it is generated, what follows is
rotated anew, and what came before stays in the cache as it was: so does transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# --- The formulas -------------------------------------------------------------------------------

# A length in tokens, or those of the texts of a batch: int32 (rows,).
Length = int | mx.array


@dataclass(frozen=True, eq=False)
class Rotary:
    """How a layer rotates queries and keys.

    Attributes:
        settings: `rope_parameters` as transformers has them: rope_type, rope_theta, factor, …
        dims: how many of the dimensions of a head, from the first on, are rotated, in pairs.
        max_length: `max_position_embeddings`.
    """

    settings: dict[str, Any]
    dims: int
    max_length: int

    @property
    def kind(self) -> str:
        return self.settings["rope_type"]

    @property
    def original_length(self) -> int:
        return self.settings.get("original_max_position_embeddings") or self.max_length

    @property
    def factor(self) -> float:
        return self.settings.get("factor") or self.max_length / self.original_length

    @property
    def is_phimoe(self) -> bool:
        """Of Phi-MoE, whose module takes only this multiplier from the length, no frequencies."""
        return "short_mscale" in self.settings and self.kind != "default"

    @property
    def boundary(self) -> float:
        """The longest text for which its length makes no difference; infinite if it never does."""
        if self.kind == "longrope" or self.is_phimoe:
            return self.original_length
        is_dynamic = self.kind == "dynamic" and not self.settings.get("alpha")
        return self.max_length if is_dynamic else math.inf

    def frequencies(self, length: Length) -> mx.array | np.ndarray:
        """By how many radians a position turns each pair: float32 (dims / 2,) or (rows, dims / 2).

        Raises:
            ValueError: the rope_type is not known.
        """
        of_kind = FREQUENCIES.get(self.kind)
        if of_kind is None:
            raise ValueError(f"the rope_type {self.kind!r} of its config.json is not known")
        exponents = np.arange(0, self.dims, 2, dtype=np.float32) / self.dims
        xp = mx if isinstance(length, mx.array) else np
        length = xp.array(0 if self.is_phimoe else length)[..., None]
        return of_kind(self, exponents, length, xp).astype(xp.float32)

    @lru_cache(64)  # noqa: B019 (one for each kind of layer, as long as its model)
    def periods(self, length: int) -> mx.array:
        """One over the frequencies, as `mx.fast.rope` takes them; computed for all layers once."""
        with np.errstate(divide="ignore"):
            return mx.array(1 / self.frequencies(length))

    def scale(self, length: Length) -> float | mx.array:
        """What the rotated dimensions are multiplied by: a number, or for each text (rows,)."""
        settings = self.settings
        if self.is_phimoe:
            pick = mx.where if isinstance(length, mx.array) else lambda a, b, c: b if a else c
            return pick(length > self.boundary, settings["long_mscale"], settings["short_mscale"])
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if settings.get("attention_factor") is not None:
            return settings["attention_factor"]
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(max(self.factor, 1)) / math.log(self.original_length))
        mscale, of_all = settings.get("mscale"), settings.get("mscale_all_dim")
        both = mscale and of_all
        return yarn_mscale(self.factor, mscale if both else 1) / yarn_mscale(
            self.factor, of_all if both else 0
        )


def yarn_mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(max(factor, 1)) + 1


def default(rotary: Rotary, exponents: np.ndarray, *_: Any) -> np.ndarray:
    return rotary.settings["rope_theta"] ** -exponents


def linear(rotary: Rotary, exponents: np.ndarray, *_: Any) -> np.ndarray:
    return default(rotary, exponents) / rotary.settings["factor"]


def proportional(rotary: Rotary, exponents: np.ndarray, *_: Any) -> np.ndarray:
    """The first pairs turn, and the others do not, in a head that is rotated whole."""
    turning = int(rotary.settings.get("partial_rotary_factor", 1.0) * rotary.dims // 2)
    still = np.arange(len(exponents)) >= turning
    return np.where(still, 0, default(rotary, exponents) / rotary.settings.get("factor", 1.0))


def llama3(rotary: Rotary, exponents: np.ndarray, *_: Any) -> np.ndarray:
    """Slow pairs are slowed down by the factor, fast ones are not, with a passage in between."""
    plain = default(rotary, exponents)
    low, high = (rotary.settings[f"{name}_freq_factor"] for name in ("low", "high"))
    turns = rotary.original_length * plain / (2 * math.pi)  # in the original length
    share = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (share + (1 - share) / rotary.settings["factor"])


def yarn(rotary: Rotary, exponents: np.ndarray, *_: Any) -> np.ndarray:
    """As llama3, but the passage is linear in the number of the pair."""
    settings, dims = rotary.settings, rotary.dims

    def pair_with(turns: float) -> float:
        """The number of the pair, as a real one, with so many turns in the original length."""
        wavelength = rotary.original_length / (turns * 2 * math.pi)
        return dims * math.log(wavelength) / (2 * math.log(settings["rope_theta"]))

    low = pair_with(settings.get("beta_fast") or 32)
    high = pair_with(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    slowed = np.clip((np.arange(len(exponents)) - low) / ((high - low) or 0.001), 0, 1)
    return default(rotary, exponents) * (1 - slowed + slowed / rotary.factor)


def longrope(rotary: Rotary, exponents: np.ndarray, length: Any, xp: Any) -> Any:
    short, long = (np.array(rotary.settings[f"{name}_factor"]) for name in ("short", "long"))
    plain = default(rotary, exponents)
    return xp.where(length > rotary.boundary, xp.array(plain / long), xp.array(plain / short))


def dynamic(rotary: Rotary, exponents: np.ndarray, length: Any, xp: Any) -> Any:
    """A base that grows with the length, or by HunYuan's fixed `alpha`."""
    settings, power = rotary.settings, rotary.dims / (rotary.dims - 2)
    ratio = xp.maximum(length, rotary.max_length) / rotary.max_length
    growth = settings.get("alpha") or settings["factor"] * ratio - (settings["factor"] - 1)
    return (settings["rope_theta"] * growth**power) ** xp.array(-exponents)


FREQUENCIES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (default, linear, proportional, llama3, yarn, longrope, dynamic)
}

# --- The module ---------------------------------------------------------------------------------

# The lengths of the texts that a model is called on, where they are known; see `text_lengths`.
KNOWN: ContextVar[Length] = ContextVar("KNOWN", default=0)


@contextmanager
def text_lengths(length: Length) -> Iterator[None]:
    """While it lasts, the texts that a model is called on are so long, without padding.

    Of a prompt that goes in piece by piece this is the length of the whole; what is generated after
    it adds to it.
    """
    before = KNOWN.get()
    KNOWN.set(length)
    try:
        yield
    finally:
        KNOWN.set(before)


def by_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of something, a batch's tokens and targets, … that knows how long the texts are.

    A text ends with its last target, or is short enough to be all padding.
    """

    def knowing(first: Any, tokens: mx.array, is_target: mx.array, *others: Any) -> Any:
        ends = (mx.arange(1, is_target.shape[1] + 1) * is_target).max(axis=1)
        with text_lengths(ends):
            return function(first, tokens, is_target, *others)

    return knowing


class Rope(nn.Module):
    """Rotates queries or keys (rows, heads, length, size) by their positions.

    Attributes:
        traditional: whether pairs are neighbours; else they are half of `dims` apart.
    """

    def __init__(self, rotary: Rotary, traditional: bool):
        super().__init__()
        self.rotary, self.dims, self.traditional = rotary, rotary.dims, traditional

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        length = self.text_length(x, offset)
        scale = self.rotary.scale(length)
        if isinstance(length, mx.array):
            return self.rotated(x, self.rotary.frequencies(length), scale, offset)
        if scale != 1:
            x = mx.concatenate([x[..., : self.dims] * scale, x[..., self.dims :]], axis=-1)
        periods, traditional = self.rotary.periods(length), self.traditional
        return mx.fast.rope(
            x, self.dims, traditional=traditional, base=None, scale=1, offset=offset, freqs=periods
        )

    def text_length(self, x: mx.array, offset: int | mx.array) -> Length:
        """How long the texts are, as far as it matters: 0 up to the boundary."""
        known, reached, boundary = KNOWN.get(), offset + x.shape[-2], self.rotary.boundary
        if boundary == math.inf:
            return 0
        if isinstance(offset, mx.array):
            return mx.maximum(known, reached.max())
        if isinstance(known, int):
            return max(known, reached) if max(known, reached) > boundary else 0
        if reached <= boundary:
            return 0
        return mx.maximum(known, reached) if offset else known  # what is reached may be padding

    def rotated(
        self, x: mx.array, frequencies: mx.array, scale: float | mx.array, offset: int | mx.array
    ) -> mx.array:
        """As `mx.fast.rope`, with frequencies ((rows,) dims / 2) and scale ((rows,)) of a text."""
        positions = mx.array(offset).reshape(-1, 1, 1, 1) + mx.arange(x.shape[-2])[:, None]
        angles = positions * frequencies.reshape(-1, 1, 1, self.dims // 2)
        scale = mx.array(scale).reshape(-1, 1, 1, 1)
        cos, sin, rest = mx.cos(angles) * scale, mx.sin(angles) * scale, x[..., self.dims :]
        x = x[..., : self.dims]
        shape = (-1, 2) if self.traditional else (2, -1)
        axis = -1 if self.traditional else -2
        a, b = (each.squeeze(axis) for each in mx.split(mx.unflatten(x, -1, shape), 2, axis))
        turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis).flatten(-2)
        return mx.concatenate([turned.astype(x.dtype), rest], axis=-1)
