"""Rotary embeddings as PyTorch computes them from a model's folder.

mlx-lm leaves out the scalings of many models, and some settings of others. So models are built
without a scaling, and a rope that has one, or other settings than MLX's own, is replaced. The
formulas follow transformers' `modeling_rope_utils` (5.24) and the papers that it names (YaRN, arXiv
2309.00071; LongRoPE, 2402.13753).

"dynamic" and "longrope" depend on a text's length. transformers takes the length of a whole batch,
padding included; here it is that of each text (`text_lengths`), so that training computes what
generation does. What is cached stays as it is when a text outgrows it, as in transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lora_finetune.base.errors import warn
from lora_finetune.model_folder.config import pytorch_program

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PretrainedConfig

# --- The formulas -------------------------------------------------------------------------------

# A length in tokens; as an array a number, or one for each text of a batch.
Length = int | mx.array


@dataclass(frozen=True, eq=False)
class Rotary:
    """How a layer rotates queries and keys."""

    settings: dict[str, Any]  # `rope_parameters` as transformers has them: rope_type, factor, …
    dims: int  # how many dimensions of a head, from the first on, are rotated, in pairs
    max_length: int  # `max_position_embeddings`

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
        """Phi-MoE takes the multiplier for a text's length, and always the short frequencies."""
        return "short_mscale" in self.settings and self.kind != "default"

    @property
    def boundary(self) -> float:
        """The longest text for which its length makes no difference; infinite if it never does."""
        if self.kind == "longrope" or self.is_phimoe:
            return self.original_length
        is_dynamic = self.kind == "dynamic" and not self.settings.get("alpha")
        return self.max_length if is_dynamic else math.inf

    def frequencies(self, length: Length) -> mx.array:
        """How far a position turns each pair, in radians: float32 (dims / 2,)."""
        if self.kind not in FREQUENCIES:
            raise ValueError(f"the rope_type {self.kind!r} of its config.json is not known")
        exponents = np.arange(0, self.dims, 2, dtype=np.float32) / self.dims
        plain = self.settings["rope_theta"] ** -exponents
        return mx.array(FREQUENCIES[self.kind](self, plain, 0 if self.is_phimoe else length))

    @lru_cache(64)  # noqa: B019 (one for each kind of layer, as long as its model)
    def periods(self, length: int) -> mx.array:
        """One over the frequencies, as `mx.fast.rope` takes them, computed once for all layers."""
        periods = 1 / self.frequencies(length)
        mx.eval(periods)
        return periods

    def scale(self, length: Length) -> float | mx.array:
        """The factor of the rotated dimensions."""
        settings = self.settings
        if self.is_phimoe:
            return pick(length > self.boundary, settings["long_mscale"], settings["short_mscale"])
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if settings.get("attention_factor") is not None:
            return settings["attention_factor"]
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(max(self.factor, 1)) / math.log(self.original_length))
        weights = settings.get("mscale"), settings.get("mscale_all_dim")
        above, below = weights if all(weights) else (1, 0)
        return yarn_mscale(self.factor, above) / yarn_mscale(self.factor, below)


def yarn_mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(max(factor, 1)) + 1


def pick(condition: bool | mx.array, yes: Any, no: Any) -> Any:
    if isinstance(condition, mx.array):
        return mx.where(condition, mx.array(yes), mx.array(no))
    return yes if condition else no


def proportional(rotary: Rotary, plain: np.ndarray, _: Length) -> np.ndarray:
    """Of a head that is rotated whole, only the first pairs turn."""
    turning = int(rotary.settings.get("partial_rotary_factor", 1.0) * rotary.dims // 2)
    still = np.arange(len(plain)) >= turning
    return np.where(still, 0, plain / rotary.settings.get("factor", 1.0))


def llama3(rotary: Rotary, plain: np.ndarray, _: Length) -> np.ndarray:
    """Slow pairs are slowed down by the factor, fast ones are not, with a passage in between."""
    low, high = (rotary.settings[f"{name}_freq_factor"] for name in ("low", "high"))
    turns = rotary.original_length * plain / (2 * math.pi)  # in the original length
    share = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (share + (1 - share) / rotary.settings["factor"])


def yarn(rotary: Rotary, plain: np.ndarray, _: Length) -> np.ndarray:
    """As llama3, but the passage is linear in the number of the pair."""
    settings, dims = rotary.settings, rotary.dims

    def pair_with(turns: float) -> float:  # in the original length; the number is a real one
        wavelength = rotary.original_length / (turns * 2 * math.pi)
        return dims * math.log(wavelength) / (2 * math.log(settings["rope_theta"]))

    low = pair_with(settings.get("beta_fast") or 32)
    high = pair_with(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    slowed = np.clip((np.arange(len(plain)) - low) / ((high - low) or 0.001), 0, 1)
    return plain * (1 - slowed + slowed / rotary.factor)


def longrope(rotary: Rotary, plain: np.ndarray, length: Length) -> np.ndarray | mx.array:
    short, long = (plain / rotary.settings[f"{name}_factor"] for name in ("short", "long"))
    return pick(length > rotary.boundary, long, short)


def dynamic(rotary: Rotary, plain: np.ndarray, length: Length) -> mx.array:
    """A base that grows with the length, or by HunYuan's fixed `alpha`."""
    settings, dims = rotary.settings, rotary.dims
    ratio = mx.maximum(length, rotary.max_length) / rotary.max_length
    growth = settings.get("alpha") or settings["factor"] * (ratio - 1) + 1
    exponents = np.arange(0, dims, 2, dtype=np.float32) / (dims - 2)
    return growth ** mx.array(-exponents) * mx.array(plain)


FREQUENCIES: dict[str, Callable[[Rotary, np.ndarray, Length], np.ndarray | mx.array]] = {
    "default": lambda _, plain, __: plain,
    "linear": lambda rotary, plain, _: plain / rotary.settings["factor"],
} | {each.__name__: each for each in (proportional, llama3, yarn, longrope, dynamic)}

# --- The module ---------------------------------------------------------------------------------

# The lengths of the texts that a model is called on, where they are known; see `text_lengths`.
KNOWN: ContextVar[Length] = ContextVar("KNOWN", default=0)


@contextmanager
def text_lengths(length: Length) -> Iterator[None]:
    """While it lasts, a model is called on texts so long, without padding, or on pieces of them."""
    token = KNOWN.set(length)
    try:
        yield
    finally:
        KNOWN.reset(token)


def by_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of (…, tokens, targets, …) with text lengths; texts end in their last target."""

    def knowing(first: Any, tokens: mx.array, is_target: mx.array, *others: Any) -> Any:
        ends = (mx.arange(1, is_target.shape[1] + 1) * is_target).max(axis=1)
        with text_lengths(ends):
            return function(first, tokens, is_target, *others)

    return knowing


class Rope(nn.Module):
    """Rotates queries or keys (rows, heads, length, size) by their positions.

    Pairs are neighbours if `traditional`, else half of `dims` apart.
    """

    def __init__(self, rotary: Rotary, traditional: bool):
        super().__init__()
        self.rotary, self.dims, self.traditional = rotary, rotary.dims, traditional

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        length = self.text_length(offset + x.shape[-2], offset)
        if isinstance(length, int):
            return self.rotated(x, offset, length)
        rows = [self.rotated(x[i : i + 1], offset, length[i]) for i in range(len(x))]
        return mx.concatenate(rows)

    def rotated(self, x: mx.array, offset: int, length: Length) -> mx.array:
        scale, is_array = self.rotary.scale(length), isinstance(length, mx.array)
        if is_array or scale != 1:
            head = (x[..., : self.dims] * scale).astype(x.dtype)
            x = mx.concatenate([head, x[..., self.dims :]], axis=-1)
        periods = 1 / self.rotary.frequencies(length) if is_array else self.rotary.periods(length)
        options = {"traditional": self.traditional, "base": None, "scale": 1, "freqs": periods}
        return mx.fast.rope(x, self.dims, offset=offset, **options)

    def text_length(self, reached: int, offset: int) -> Length:
        """How long the texts are, as far as it matters: 0 up to the boundary."""
        known, boundary = KNOWN.get(), self.rotary.boundary
        if boundary == math.inf:
            return 0
        if isinstance(known, int):
            return max(known, reached) if max(known, reached) > boundary else 0
        if reached <= boundary:
            return 0
        return mx.maximum(known, reached) if offset else known  # what is reached may be padding


# --- In a loaded model --------------------------------------------------------------------------

# A scaling that changes nothing, with every key that some model of mlx-lm requires.
NEUTRAL = {"type": "linear", "rope_type": "linear", "factor": 1.0, "alpha": 1.0}
NEUTRAL |= {"short_factor": 1.0, "long_factor": 1.0, "short_mscale": 1.0, "long_mscale": 1.0}


def without_scaling(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in mlx-lm's words with NEUTRAL in the place of every scaling, or of none.

    Some models of mlx-lm refuse a scaling, lose it, or fail where there is none; `correct` puts
    it right in all.
    """
    changed = config | {"rope_scaling": (config.get("rope_scaling") or {}) | NEUTRAL}
    parameters, text = config.get("rope_parameters"), config.get("text_config")
    if isinstance(parameters, dict):
        kinds = {kind: p | NEUTRAL for kind, p in parameters.items() if isinstance(p, dict)}
        changed["rope_parameters"] = parameters | (kinds or NEUTRAL)
    if isinstance(text, dict):
        changed["text_config"] = without_scaling(text)
    return changed


def correct(model: nn.Module, config: PretrainedConfig) -> None:
    """Replace what rotates otherwise than a configuration says, or warn."""
    kinds, rotaries, is_found = getattr(config, "layer_types", None) or [], {}, False
    for path, attention in model.named_modules():
        names = [n for n, m in attention.children().items() if isinstance(m, nn.Module)]
        names = [name for name in names if re.search("rope|rotary", name)]
        if not names or re.search("vision|visual|audio", path):
            continue
        number = re.search(r"\.(\d+)\.", f"{path}.")
        layer = int(number[1]) if number else 0
        kind = kinds[layer] if layer < len(kinds) else None
        if kind not in rotaries:
            rotaries[kind] = of_layer(config, layer, kind)
        if rotaries[kind]:
            is_found = True
            for name in names:
                correct_rope(attention, name, rotaries[kind], config)
    settings = config.rope_parameters
    nested = [settings[kind] for kind in config.nested_rope_parameter_keys(settings)]
    types = {each["rope_type"] for each in nested or [settings]}
    if not is_found and types != {"default"}:
        warn(
            "the rotary embedding of this kind of model cannot be replaced in mlx-lm, so with the "
            f"rope_type of its config.json ({', '.join(sorted(types))}) long texts may be computed "
            "otherwise than by PyTorch"
        )


def of_layer(config: PretrainedConfig, layer: int, kind: str | None) -> Rotary | None:
    """How a layer of that number and kind rotates; None where the configuration does not say."""
    settings = config.rope_parameters
    truncate = settings.get("truncate", True)  # transformers looks for it only here
    if config.nested_rope_parameter_keys(settings):
        settings = settings.get(kind)
        if not settings:
            return None
    if config.is_heterogeneous:
        config = config.per_layer_config[layer]
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Without a scaling, most of transformers' models rotate the whole head whatever it says.
    is_read = settings["rope_type"] != "default" or "partial_rotary" in pytorch_program(config)
    if is_read and settings["rope_type"] != "proportional":
        dims = int(dims * settings.get("partial_rotary_factor", 1.0))
    length = getattr(config, "max_position_embeddings", 0)
    return Rotary(settings | {"truncate": truncate}, dims, length)


def correct_rope(attention: nn.Module, name: str, rotary: Rotary, config: PretrainedConfig) -> None:
    """Put ours in the place of a rope, unless MLX's own does the same."""
    rope, is_latent = attention[name], hasattr(attention, "qk_rope_head_dim")  # as DeepSeek's
    if type(rope).__name__ == "NoPE":  # SmolLM3's, which does not rotate
        return
    traditional = getattr(rope, "traditional", type(rope).__name__.startswith("DeepseekV2"))
    if is_latent:
        if getattr(config, "rope_interleave", None) is not None:
            traditional = config.rope_interleave
        weight = rotary.settings.get("mscale_all_dim")
        if weight and rotary.kind != "default":  # YaRN's mscale is in the scale of the scores
            scale = "scale" if hasattr(attention, "scale") else "softmax_scale"
            size = config.qk_nope_head_dim + config.qk_rope_head_dim
            setattr(attention, scale, size**-0.5 * yarn_mscale(rotary.factor, weight) ** 2)
    wanted = ("default", rotary.settings["rope_theta"], rotary.dims, traditional, 1)
    if type(rope) is nn.RoPE:
        found = (rotary.kind, rope.base, rope.dims, rope.traditional, rope.scale)
    if type(rope) is not nn.RoPE or found != wanted:
        attention[name] = Rope(rotary, traditional)
