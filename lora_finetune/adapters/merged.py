"""An adapter merged into a whole model, which does what the adapted one does."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import models
from lora_finetune.adapters import base_arrays, loading
from lora_finetune.adapters.npz import Adapter
from lora_finetune.base.errors import UserError, abbreviated, hint
from lora_finetune.model_folder.model_folder import read_object, text_settings
from lora_finetune.model_folder.model_weights import read_weights

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model


def check(model: nn.Module, base: Path) -> None:
    """Raise ValueError where LoRA cannot be merged into the weights of its layers."""
    adapted = models.lora_modules(model)
    for path, module in adapted.items():
        if not models.can_merge(module.frozen):
            raise ValueError(
                f"LoRA cannot be merged into {path}, which is quantized in its own way"
            )
    if not is_rebuilt(base, dequantize=False):
        base_arrays.sources(base, read_weights(base), list(adapted))


def check_float(model: nn.Module, base: Path) -> None:
    """Raise ValueError where it cannot be merged, or not into a model for transformers."""
    check(model, base)
    if not is_rebuilt(base, dequantize=True):
        return
    config = read_object(base / "config.json")
    if "text_config" in config:
        raise ValueError(
            f"mlx-lm reads only the language model of {base}, and transformers wants the rest too"
        )
    stored = dequantize_model(models.load_as_stored(base)[0])
    if left := quantized_layers(stored):
        raise ValueError(f"mlx-lm cannot dequantize {abbreviated(left)}")
    weights = dict(tree_flatten(stored.parameters()))
    try:
        base_arrays.in_checkpoint(base, weights, config["model_type"])
    except ValueError as error:
        raise ValueError(
            f"{base} is as MLX has it, and how transformers has {error} is not known"
        ) from None


def quantized_layers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if "scales" in module]


def is_rebuilt(base: Path, dequantize: bool) -> bool:
    """Whether a merged model has other arrays than its base: it is quantized, or for MLX only."""
    settings = text_settings(read_object(base / "config.json"))
    is_quantized = any(name.startswith("quantization") and value for name, value in settings)
    return is_quantized or (dequantize and base_arrays.is_written_by_mlx(base))


# --- Writing ------------------------------------------------------------------------------------


def write(
    folder: Path, base: Path, adapter: Adapter, behaviour: Behaviour, dequantize: bool
) -> None:
    """Write a whole model with the adapter in its weights.

    The base is loaded again as it is in its files. Only the adapted layers change: where they were
    quantized, they are dequantized. A base that is not quantized keeps the names and layouts of its
    own files, unless MLX wrote them and `dequantize` asks for those of transformers.

    Args:
        behaviour: that of the model with the adapter beside its weights.
        dequantize: whether the other layers are dequantized too.

    Raises:
        UserError: what it does is not that.
    """
    model, used = models.load_as_stored(base)
    loading.adapt(model, adapter, base, None)
    if (lost := rounding(model)) > 0.01:
        hint(
            f"rounded to the type of the base, the merged weights are off by {lost:.0%} of their "
            "change (root mean square); the adapter itself is exact"
        )
    copy_others(base, folder)
    try:
        if is_rebuilt(base, dequantize):
            write_rebuilt(folder, base, model, used.get("quantization"), dequantize)
        else:
            write_changed(folder, base, model)
    except ValueError as error:
        raise UserError(f"it cannot be merged: {error}; export the adapter instead") from None
    del model  # the result is loaded, and there may be no memory for two
    behaviour.check(models.load(folder)[0], lost)


# The files of a base that come along: settings, tokenizers and what is said of it; no weights of
# other kinds, which a pickle may be, and no programs.
KEPT = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "*.tiktoken")
KEPT += ("LICENSE*", "README.md")
NOT_KEPT = ("hf_quant_config.json", "*.index.json")  # of the weights


def copy_others(base: Path, folder: Path) -> None:
    """Copy the files of a base that are neither weights nor programs."""
    for file in {file for pattern in KEPT for file in base.glob(pattern)}:
        if not any(map(file.match, NOT_KEPT)):
            copy = folder / file.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def write_changed(folder: Path, base: Path, model: nn.Module) -> None:
    """Write the files of a base, with an adapter in their arrays."""
    changes = {}
    for path, module in models.lora_modules(model).items():
        a, b = module.pair()
        changes[path] = models.SCALE * (a @ b).T
    changed = base_arrays.changed_arrays(base, read_weights(base), changes)
    for file in base.glob("model*.safetensors"):
        arrays, metadata = mx.load(str(file), return_metadata=True)
        arrays |= {name: changed[name] for name in arrays.keys() & changed.keys()}
        mx.save_safetensors(str(folder / file.name), arrays, metadata)
    for file in base.glob("model*.index.json"):
        shutil.copyfile(file, folder / file.name)


def write_rebuilt(
    folder: Path,
    base: Path,
    model: nn.Module,
    quantization: dict[str, Any] | None,
    dequantize: bool,
) -> None:
    """Write a model with an adapter as MLX has it; dequantized, as transformers has it.

    Args:
        quantization: how the base is quantized, in mlx-lm's words.
    """
    layers = {path: module.merged() for path, module in models.lora_modules(model).items()}
    model.update_modules(tree_unflatten(list(layers.items())))
    if dequantize:
        model = dequantize_model(model)
    config = read_object(base / "config.json")
    config = {name: value for name, value in config.items() if not name.startswith("quantization")}
    if quantized_layers(model):
        quantization = quantization | dict.fromkeys(layers, False)
        config |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = dict(tree_flatten(model.parameters()))
    if dequantize:
        weights = base_arrays.in_checkpoint(base, weights, config["model_type"])
    model.clear()
    layers.clear()
    write_weights(folder, weights, "pt" if dequantize else "mlx")


def write_weights(folder: Path, weights: dict[str, mx.array], written_by: str) -> None:
    """Write weights in shards of at most 5 GB, with an index."""
    shards = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda array: array.nbytes,
        filename_pattern="model{suffix}.safetensors",
    )
    for file, names in shards.filename_to_tensors.items():  # each is freed when it is written
        shard = {name: weights.pop(name) for name in names}
        mx.save_safetensors(str(folder / file), shard, {"format": written_by})
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(index, indent=2), encoding="utf-8")


# --- What it does -------------------------------------------------------------------------------

SAMPLE = mx.arange(1, 17)[None]  # tokens to compare two models on

# How far apart rounding may bring the logits of two models that compute with such numbers.
NOISE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 4e-2}


class Behaviour(NamedTuple):
    """The logits of an adapted model for SAMPLE, to compare a merged model with.

    Attributes:
        change: how far those without the adapter are from them.
        noise: how far rounding alone may bring others from them.
    """

    logits: np.ndarray
    change: float
    noise: float

    @staticmethod
    def of(model: nn.Module) -> Behaviour:
        """The behaviour of a model, from which the adapter is then taken away."""
        logits = sample_logits(model)
        frozen = {path: module.frozen for path, module in models.lora_modules(model).items()}
        model.update_modules(tree_unflatten(list(frozen.items())))
        noise = max(NOISE[models.float_type(module)] for module in frozen.values())
        return Behaviour(logits, difference(sample_logits(model), logits), noise)

    def check(self, model: nn.Module, lost: float) -> None:
        """Raise UserError where a merged model does something else.

        Args:
            lost: the share of the change of the weights that rounding took.
        """
        error = difference(sample_logits(model), self.logits)
        if not error <= self.noise + (0.05 + 2 * lost) * self.change:
            raise UserError(
                "the merged model does not do what the adapted one does (its logits differ by "
                f"{error:.1%}), so it was not kept; please report this with the name of the model"
            )


def sample_logits(model: nn.Module) -> np.ndarray:
    """The logits for SAMPLE less their mean, (tokens, vocabulary), float32."""
    model.eval()
    logits = model(SAMPLE)[0].astype(mx.float32)
    logits = mx.where(mx.isfinite(logits), logits, 0)  # some are −∞, for tokens that never come
    return np.array(logits - logits.mean(axis=-1, keepdims=True))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """How far logits are from others, relative to the spread of these.

    The median over the tokens, for some of which a router may choose another expert.
    """
    distance = np.square(found - expected).mean(axis=-1) / np.square(expected).mean(axis=-1)
    return float(np.sqrt(np.median(distance)))


def rounding(model: nn.Module) -> float:
    """The root mean square of what rounding takes of an update, relative to that of the update."""
    lost = size = 0.0
    for module in models.lora_modules(model).values():
        weight, dtype = models.float_weight(module.frozen)
        a, b = module.pair()
        exact = weight + models.SCALE * (a @ b).T
        lost += mx.square(exact - exact.astype(dtype).astype(mx.float32)).sum().item()
        size += mx.square(exact - weight).sum().item()
    return math.sqrt(lost / size) if size else 0.0
