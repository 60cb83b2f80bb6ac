"""Sliding windows of attention, where mlx-lm has none: a mask for each layer that has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches.module_classes import arguments, parameters_of, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base
from transformers import PretrainedConfig

Build = Callable[[dict[str, Any]], nn.Module]

# What the length of a window or of a chunk is called in configurations.
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size")

# A model with a window of so many tokens is shown a text of so many.
PROBE_WINDOW, PROBE_LENGTH = 4, 9
WHOLE, SLIDING, CHUNKED = PROBE_LENGTH, PROBE_WINDOW, 1  # how many keys its last token then sees


def put_windows(
    model: nn.Module, build: Build, config: dict[str, Any], theirs: PretrainedConfig
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
    wanted = keys_seen_in_pytorch(theirs, len(model.layers))
    if set(wanted) <= {None, WHOLE}:
        return
    found = keys_seen(build(with_small_windows(config)))
    pairs = zip(wanted, found, strict=True)
    if all(w == f for w, f in pairs if None not in (w, f)):
        return
    if set(found) - {None, WHOLE}:
        raise UserError(
            "in PyTorch other layers of this model have a sliding window than in mlx-lm's model of "
            "this kind, which would compute something else; take another model"
        )
    window = window_of(theirs)
    layers = [layer for layer, keys in zip(model.layers, wanted, strict=True) if keys == SLIDING]
    attentions = [attention for layer in layers for attention in attention_modules(layer)]
    replace(attentions, partial(windowed, window))


def window_of(theirs: PretrainedConfig) -> int | None:
    """The length of the sliding window in tokens, None where no layer has one."""
    found = [getattr(theirs, name, None) for name in WINDOWS[:3]]
    return next((window for window in found if window), None)


def keys_seen_in_pytorch(theirs: PretrainedConfig, num_layers: int) -> list[int | None]:
    """How many keys the probe's last token sees in each of transformers' layers.

    None for layers of another kind, such as linear attention. Without `layer_types` all are alike.
    """
    kinds = getattr(theirs, "layer_types", None) or ["sliding" if window_of(theirs) else "full"]
    seen = {"full": WHOLE, "attention": WHOLE, "sliding": SLIDING, "chunked": CHUNKED}
    found = [seen.get(kind.removesuffix("_attention")) for kind in kinds]
    return found * num_layers if len(found) == 1 else found


def with_small_windows(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with windows of four tokens."""
    small = {name: PROBE_WINDOW for name in WINDOWS if config.get(name)}
    if isinstance(config.get("text_config"), dict):
        small["text_config"] = with_small_windows(config["text_config"])
    return config | small


def keys_seen(model: nn.Module) -> list[int | None]:
    """How many keys the probe's last token sees in each layer of mlx-lm; None without attention."""
    seen: dict[int, int] = {}
    layer_now = None
    attend = mx.fast.scaled_dot_product_attention

    def note(queries, keys, values, *, scale, mask=None, **options):
        if layer_now is not None:
            seen[layer_now] = keys_in(mask, keys.shape[2])
        return attend(queries, keys, values, scale=scale, mask=mask, **options)

    def noting(number: int, original: Callable, module: nn.Module, *args, **options):
        nonlocal layer_now
        layer_now = number
        given = arguments(type(module), args, options)
        seen[number] = keys_in(given.get("mask"), PROBE_LENGTH)
        try:
            return original(module, *args, **options)
        finally:
            layer_now = None

    for number, layer in enumerate(model.layers):
        replace(attention_modules(layer), partial(noting, number))
    mx.fast.scaled_dot_product_attention = note
    try:
        model(mx.zeros((1, PROBE_LENGTH), mx.int32))
    finally:
        mx.fast.scaled_dot_product_attention = attend
    return [seen.get(number) for number in range(len(model.layers))]


def keys_in(mask: str | mx.array | None, keys: int) -> int:
    """How many of the keys a mask lets the last query see."""
    if not isinstance(mask, mx.array):
        return keys
    last = np.array(mask[..., -1, :].astype(mx.float32)).reshape(-1, mask.shape[-1])[0]
    return int((last > (0 if mask.dtype == mx.bool_ else -1e4)).sum())


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """The innermost modules of a layer that are given a mask and a cache."""
    taking = [m for m in layer.modules() if {"mask", "cache"} <= set(parameters_of(type(m)))]
    return [
        m for m in taking if not any(other is not m and other in taking for other in m.modules())
    ]


def windowed(window: int, original: Callable, attention: nn.Module, *args, **options):
    """A call of an attention with a window; texts that fit into it are given the mask they had."""
    given = arguments(type(attention), args, options)
    x, cache = next(iter(given.values())), given.get("cache")
    length = x.shape[1] + getattr(cache, "offset", 0)
    if not isinstance(length, int) or length > window:
        given["mask"] = base.create_attention_mask(x, cache, window, return_array=True)
    return original(attention, **given)
