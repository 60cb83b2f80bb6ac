"""Sliding windows of attention, where mlx-lm has none: a mask for each layer that has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches.modules import arguments, parameters_of, replace

import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from transformers import PretrainedConfig

# The caches of mlx-lm for transformers' kinds of layers; others are of another kind than attention.
CACHES = {"full": KVCache, "attention": KVCache, "sliding": RotatingKVCache}
CACHES |= {"chunked": ChunkedKVCache}


def put_windows(model: nn.Module, theirs: PretrainedConfig) -> None:
    """Give layers the windows that transformers' have and mlx-lm's have not.

    mlx-lm 0.32.2 computes none in gemma2 (gemma2.py:176), qwen2, qwen3, phi3, starcoder2, dots1 and
    others. Which of its layers have one is seen from their caches.

    Raises:
        UserError: mlx-lm has windows, but in other layers; such layers differ in more than the
            mask.
    """
    names = ("sliding_window", "sliding_window_size", "attention_window_size")
    window = next((w for n in names if (w := getattr(theirs, n, None))), None)
    kinds = getattr(theirs, "layer_types", None)
    kinds = kinds or ["sliding" if window else "full"] * len(model.layers)
    wanted = [CACHES.get(kind.removesuffix("_attention")) for kind in kinds]
    found = [type(cache) for cache in make_prompt_cache(model)]  # without layers that share one
    pairs = [(w, f) for w, f in zip(wanted, found, strict=False) if w and f is not ArraysCache]
    if not {RotatingKVCache, ChunkedKVCache}.intersection(wanted) or all(w is f for w, f in pairs):
        return
    if {RotatingKVCache, ChunkedKVCache}.intersection(found):
        raise UserError(
            "in PyTorch other layers of this model have a sliding window than in mlx-lm's model of "
            "this kind, which would compute something else; take another model"
        )
    layers = [layer for layer, w in zip(model.layers, wanted, strict=True) if w is RotatingKVCache]
    attentions = [attention for layer in layers for attention in attention_modules(layer)]
    replace(attentions, partial(windowed, window))


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
