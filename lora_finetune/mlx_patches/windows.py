"""Sliding windows of attention, where mlx-lm has none: a mask for each layer that has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches.modules import arguments, parameters_of, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_attention_mask
from transformers import PretrainedConfig

# What the length of a window or of a chunk is called in configurations.
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size")

# A model with windows and chunks of four tokens is shown nine: so many keys its last one then sees.
PROBE_WINDOW = SLIDING = 4
PROBE_LENGTH = WHOLE = 9
CHUNKED = 1


def put_windows(
    model: nn.Module,
    build: Callable[[dict[str, Any]], nn.Module],
    config: dict[str, Any],
    theirs: PretrainedConfig,
) -> None:
    """Give layers the windows that transformers' have and mlx-lm's have not.

    mlx-lm 0.32.2 computes none in gemma2 (gemma2.py:176), qwen2, qwen3, phi3, starcoder2, dots1 and
    others. Which layers of mlx-lm's have one is measured: a model of the same configuration with
    windows of four tokens is built and called, lazily, so that only its masks are computed.

    Args:
        build: makes a model of a configuration in mlx-lm's words, as `config` is.

    Raises:
        UserError: mlx-lm has windows, but in other layers; such layers differ in more than the
            mask.
    """
    window = next((w for n in WINDOWS[:3] if (w := getattr(theirs, n, None))), None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding" if window else "full"]
    seen = {"full": WHOLE, "attention": WHOLE, "sliding": SLIDING, "chunked": CHUNKED}
    wanted = [seen.get(kind.removesuffix("_attention")) for kind in kinds]
    if len(wanted) == 1:
        wanted *= len(model.layers)
    if set(wanted) <= {None, WHOLE}:
        return
    found = keys_seen(build(with_small_windows(config)))
    pairs = zip(wanted, found, strict=True)
    if all(w == f for w, f in pairs if None not in (w, f)):  # None has no attention
        return
    if set(found) - {None, WHOLE}:
        raise UserError(
            "in PyTorch other layers of this model have a sliding window than in mlx-lm's model of "
            "this kind, which would compute something else; take another model"
        )
    layers = [layer for layer, keys in zip(model.layers, wanted, strict=True) if keys == SLIDING]
    attentions = [attention for layer in layers for attention in attention_modules(layer)]
    replace(attentions, partial(windowed, window))


def with_small_windows(config: dict[str, Any]) -> dict[str, Any]:
    small = {name: PROBE_WINDOW for name in WINDOWS if config.get(name)}
    if isinstance(config.get("text_config"), dict):
        small["text_config"] = with_small_windows(config["text_config"])
    return config | small


def keys_seen(model: nn.Module) -> list[int | None]:
    """How many keys the probe's last token sees in each layer of mlx-lm; None without attention."""
    seen: dict[int, int] = {}

    def noting(number: int, original: Callable, module: nn.Module, *args, **options):
        seen[number] = keys_in(arguments(module, args, options).get("mask"))
        return original(module, *args, **options)

    for number, layer in enumerate(model.layers):
        replace(attention_modules(layer), partial(noting, number))
    model(mx.zeros((1, PROBE_LENGTH), mx.int32))
    return [seen.get(number) for number in range(len(model.layers))]


def keys_in(mask: str | mx.array | None) -> int:
    """How many keys a mask of the probe, boolean or to be added, lets the last query see."""
    if not isinstance(mask, mx.array):
        return WHOLE
    last = np.array(mask[..., -1, :].astype(mx.float32)).reshape(-1, PROBE_LENGTH)[0]
    return int((last > (0 if mask.dtype == mx.bool_ else -1e4)).sum())


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """The innermost modules of a layer that are given a mask and a cache."""
    taking = [m for m in layer.modules() if {"mask", "cache"} <= set(parameters_of(type(m)))]
    return [m for m in taking if not any(o is not m and o in taking for o in m.modules())]


def windowed(window: int, original: Callable, attention: nn.Module, *args, **options):
    """A call of an attention with a window; texts that fit into it are given the mask they had."""
    given = arguments(attention, args, options)
    x, cache = next(iter(given.values())), given.get("cache")
    length = x.shape[1] + getattr(cache, "offset", 0)
    if not isinstance(length, int) or length > window:
        given["mask"] = create_attention_mask(x, cache, window, return_array=True)
    return original(attention, **given)
