"""A folder's model as mlx-lm builds it, corrected where it computes something else than PyTorch."""

from __future__ import annotations

import contextlib
import io
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_finetune.base import memory
from lora_finetune.base.errors import hint, warn
from lora_finetune.mlx_patches import rope
from lora_finetune.mlx_patches.corrections import correct
from lora_finetune.model_folder.config import in_mlx_words, pytorch_settings
from lora_finetune.model_folder.files import shortened
from lora_finetune.model_folder.weights import (
    has_own_head,
    in_mlx_layout,
    read_weights,
    with_tied_head,
)

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import _get_classes, dequantize_model, load_config, load_model
from transformers import PretrainedConfig


def load_as_stored(
    folder: Path, has_weights: bool = True
) -> tuple[nn.Module, dict[str, Any], PretrainedConfig | None]:
    """A model with its weights as they are in the folder, not read yet, or without them.

    Returns:
        The model; its config.json, with the quantization that mlx-lm found; and the settings of
        the text model as transformers has them, None where it has none.
    """
    # From within the folder, since mlx-lm takes a path for a pattern: [8bit] for one of 8bit. What
    # its modules print is not always so: phi3 says that it leaves out a scaling that is put right.
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        config = load_config(Path())
        is_tied = ((config.get("text_config") or {}) | config).get("tie_word_embeddings")
        if is_tied is not False and has_own_head(read_weights(Path())):
            config["tie_word_embeddings"] = False
        try:
            theirs, problem = pytorch_settings(config), None
        except Exception as error:  # transformers may raise anything
            theirs, problem = None, error
        words = in_mlx_words(config, theirs)
        if getattr(theirs, "rope_parameters", None):
            words = rope.without_scaling(words)
        if has_weights:
            options = {"lazy": True, "get_model_classes": partial(model_classes, theirs=theirs)}
            model, used = load_model(Path(), model_config=words, **options)
        else:
            make, arguments = model_classes(words, theirs)
            model, used = make(arguments.from_dict(words)), {}
    if problem and has_weights:  # once a model
        warn(
            f"transformers cannot read this model's config.json ({shortened(problem)}), so nothing "
            "tells whether mlx-lm computes the model as it was trained"
        )
    quantization = {name: used[name] for name in used if name.startswith("quantization")}
    return model, config | quantization, theirs


def model_classes(config: dict[str, Any], theirs: PretrainedConfig | None) -> tuple[type, type]:
    """mlx-lm's model, corrected and for weights of transformers 5, and the class of its arguments.

    `config` is in mlx-lm's words; `theirs` as `load_as_stored` returns it.
    """
    base, arguments = _get_classes(config)
    settings = config | (config.get("text_config") or {})

    class Model(base):
        __module__ = base.__module__  # which tells the family

        def __init__(self, args: Any):
            super().__init__(args)
            correct(self, args, config, theirs)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            weights = in_mlx_layout(weights, self, settings)
            if hasattr(base, "sanitize"):
                weights = super().sanitize(weights)
            return with_tied_head(self, weights) if settings.get("tie_word_embeddings") else weights

    return Model, arguments


def as_loaded(folder: Path, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The parameters of a folder's model, by mlx-lm's names, from arrays as in its files."""
    model, *_ = load_as_stored(folder, has_weights=False)
    # Copies, since some are changed in place.
    return model.sanitize({name: array.astype(array.dtype) for name, array in arrays.items()})


class Limits(NamedTuple):
    """Bounds of embedding lookups, which MLX does not check."""

    vocab_size: int  # token ids are below
    max_positions: float  # infinite where no table of positions is looked up


def find_limits(model: nn.Module) -> Limits:
    """The limits of a model, by the rows of its embeddings and its logits in a call."""
    logits = model(mx.zeros((1, 3), mx.int32))  # never computed
    tables = [(p, m) for p, m in model.named_modules() if "Embedding" in type(m).__name__]
    rows = {path: len(table.weight) for path, table in tables if "weight" in table}
    positions = [rows.pop(path) for path in list(rows) if path.endswith("wpe")]  # GPT-2's name
    return Limits(min([logits.shape[-1], *rows.values()]), min(positions, default=math.inf))


# --- Types --------------------------------------------------------------------------------------


def in_fast_types(model: nn.Module) -> nn.Module:
    """A model with weights, not read yet, of the types that the device is fast with.

    On the CPU that is float32 alone: MLX's products of other types are 40 and more times slower. On
    CUDA quantized layers train three times slower than dequantized ones, which must leave half of
    the memory free.
    """
    if mx.default_device() == mx.cpu:
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
    elif mx.cuda.is_available():
        size = dequantized_bytes(model)
        if 0 < size <= memory.available() // 2 * memory.num_parts:
            hint(f"the weights are dequantized to {size / 1e9:.1f} GB for speed on CUDA")
            model = dequantize_model(model)
    return model


def dequantized_bytes(model: nn.Module) -> int:
    """The bytes that the quantized weights of a model take when they are dequantized."""
    quantized = [module for module in model.modules() if "scales" in module]
    return sum(m.weight.size * 32 // m.bits * float_type(m).size for m in quantized)


def float_type(module: nn.Module) -> mx.Dtype:
    """The type of a layer's weight, dequantized if it is quantized."""
    dtype = module.scales.dtype if "scales" in module else module.weight.dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16


def can_merge(module: nn.Module) -> bool:
    """Whether `float_weight` knows the weight of a linear layer, router or experts."""
    if type(module) in (nn.QuantizedLinear, QuantizedSwitchLinear):
        return module.weight.ndim == 2 or module.get("global_scale") is None
    return "scales" not in module and mx.issubdtype(module.weight.dtype, mx.floating)


def float_weight(module: nn.Module) -> tuple[mx.array, mx.Dtype]:
    """The weight of a linear layer, router or experts in float32, and its own float type."""
    weight = module.weight
    if "scales" in module:
        weight = mx.dequantize(
            weight, module.scales, module.get("biases"), module.group_size, module.bits,
            module.mode, module.get("global_scale"), dtype=mx.float32,
        )  # fmt: skip
    return weight.astype(mx.float32), float_type(module)
