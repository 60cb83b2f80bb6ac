"""An adapter merged into a whole model, which does what the adapted one does."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import models
from lora_finetune.adapters import adapters, base_arrays
from lora_finetune.base.errors import UserError, hint
from lora_finetune.mlx_patches.loading import float_weight, load_as_stored
from lora_finetune.model_folder.files import read_object
from lora_finetune.model_folder.weights import read_weights

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model, make_shards

# --- Writing ------------------------------------------------------------------------------------


def write_merged(
    folder: Path, base: Path, adapter: adapters.Adapter, behaviour: Behaviour, dequantize: bool
) -> None:
    """A whole model with the adapter in its weights, compared with the model that has it beside.

    The base is loaded again as it is in its files. Only the adapted layers change: where they were
    quantized, they are dequantized. A base that is not quantized keeps the names and layouts of its
    own files, unless MLX wrote them and `dequantize` asks for those of transformers.

    Args:
        behaviour: what it is to do.
        dequantize: whether the rest is dequantized too.

    Raises:
        UserError: it does something else.
    """
    model, used, _ = load_as_stored(base)
    adapters.adapt(model, adapter, base, None)
    adapted = models.lora_modules(model)
    lost = rounding(adapted)
    try:
        if is_rebuilt(base, dequantize):
            write_rebuilt(folder, base, model, used.get("quantization"), dequantize)
        else:
            write_changed(folder, base, model)
    except ValueError as error:
        raise UserError(f"it cannot be merged: {error}; export the adapter instead") from None
    del model, adapted  # the result is loaded, and there may be no memory for two
    copy_others(base, folder)
    behaviour.check(models.load(folder)[0], lost)


def is_rebuilt(base: Path, dequantize: bool) -> bool:
    """Whether a merged model has other arrays than its base: it is quantized, or for MLX only."""
    is_quantized = base_arrays.is_quantized(read_object(base / "config.json"))
    return is_quantized or (dequantize and base_arrays.is_written_by_mlx(base))


def write_changed(folder: Path, base: Path, model: nn.Module) -> None:
    """Write the weights and the configuration of a base, with an adapter in its own arrays."""
    changes = {}
    for path, module in models.lora_modules(model).items():
        a, b = module.pair()
        changes[path] = models.SCALE * (a @ b).T
    arrays = read_weights(base)
    changed = base_arrays.changed_arrays(base, arrays, changes)
    for file in base.glob("model*.safetensors"):
        arrays, metadata = mx.load(str(file), return_metadata=True)
        arrays |= {name: changed[name] for name in arrays.keys() & changed.keys()}
        mx.save_safetensors(str(folder / file.name), arrays, metadata)
    for file in (base / "config.json", *base.glob("model*.index.json")):
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
    config, merged = read_object(base / "config.json"), {}
    for path, module in models.lora_modules(model).items():
        merged[path] = module.merged()
    model.update_modules(tree_unflatten(list(merged.items())))
    if dequantize:
        model = dequantize_model(model)
    is_left = any("scales" in module for module in model.modules())
    config = requantized(config, quantization if is_left else None, list(merged))
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = dict(tree_flatten(model.parameters()))
    if dequantize:
        weights = base_arrays.in_checkpoint(base, weights, config["model_type"])
    model.clear()
    merged.clear()
    write_weights(folder, weights, "pt" if dequantize else "mlx")


def write_weights(folder: Path, weights: dict[str, mx.array], format: str) -> None:
    """Write weights in files of at most 5 GB, with an index where there are several."""
    shards = make_shards(weights)
    total, places = sum(array.nbytes for array in weights.values()), {}
    weights.clear()  # each shard is freed when it is written
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        mx.save_safetensors(str(folder / name), shard, {"format": format})
        places |= dict.fromkeys(shard, name)
        shard.clear()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps(index, indent=2), encoding="utf-8")


def requantized(
    config: dict[str, Any], quantization: dict[str, Any] | None, paths: list[str]
) -> dict[str, Any]:
    """A configuration that says that these layers are not quantized, or none is."""
    text = config.get("text_config")
    config = {n: value for n, value in config.items() if not n.startswith("quantization")}
    if isinstance(text, dict):
        kept = {n: value for n, value in text.items() if not n.startswith("quantization")}
        config["text_config"] = kept
    if quantization:
        quantization = quantization | dict.fromkeys(paths, False)
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config


# What of a base is weights or a program, which a pickle may be, and what is said of the weights.
LEFT_OUT = (".safetensors", ".gguf", ".onnx", ".npz", ".h5", ".msgpack", ".py", ".sh", ".so")
LEFT_OUT += (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
LEFT_OUT += (".index.json", "hf_quant_config.json")


def copy_others(base: Path, folder: Path) -> None:
    """Copy the files of a base that are no weights and no program, nor hidden.

    A folder in it that has such files is of another model, or of an adapter.
    """
    for file in base.iterdir():
        if file.name.startswith(".") or file.name.lower().endswith(LEFT_OUT):
            continue
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
        elif file.is_dir() and not any(f.name.lower().endswith(LEFT_OUT) for f in file.rglob("*")):
            (folder / file.name).mkdir()
            copy_others(file, folder / file.name)


# --- What it does -------------------------------------------------------------------------------

# Tokens to compare two models on, and how far apart, as a share of what they are, their logits may
# be by the rounding of what they compute with.
SAMPLE = mx.arange(1, 17)[None]
NOISE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 4e-2}


class Behaviour(NamedTuple):
    """What a model with an adapter does with SAMPLE, to compare a merged model with.

    Attributes:
        logits: as `sample_logits` has them.
        change: how far those without the adapter are from them.
        noise: how far apart rounding alone may bring them.
    """

    logits: np.ndarray
    change: float
    noise: float

    @staticmethod
    def of(model: nn.Module) -> Behaviour:
        """The behaviour of a model, from which the adapter is then taken away."""
        logits, adapted = sample_logits(model), models.lora_modules(model)
        frozen = [(path, module.frozen) for path, module in adapted.items()]
        model.update_modules(tree_unflatten(frozen))
        noise = max(NOISE[float_weight(module)[1]] for _, module in frozen)
        return Behaviour(logits, difference(sample_logits(model), logits), noise)

    def check(self, model: nn.Module, lost: float) -> None:
        """Raise UserError where a merged model does not do the same.

        Args:
            lost: the share of the change that rounding took of its weights.
        """
        error = difference(sample_logits(model), self.logits)
        if not error <= self.noise + (0.05 + 2 * lost) * self.change:
            raise UserError(
                "the merged model does not do what the adapted one does (its logits differ by "
                f"{error:.1%}), so it was not kept; please report this with the name of the model"
            )


def sample_logits(model: nn.Module) -> np.ndarray:
    """The logits of a model for SAMPLE, in float32 and less their mean; (tokens, vocabulary)."""
    model.eval()
    logits = model(SAMPLE)[0].astype(mx.float32)
    logits = mx.where(mx.isfinite(logits), logits, 0)  # some are −∞, for tokens that never come
    return np.array(logits - logits.mean(axis=-1, keepdims=True))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """How far logits are from others, as a share of how far these are from their mean.

    The median over the tokens, for some of which a router may choose another expert.
    """
    distance = np.square(found - expected).mean(axis=-1) / np.square(expected).mean(axis=-1)
    return float(np.sqrt(np.median(distance)))


def rounding(adapted: dict[str, nn.Module]) -> float:
    """How much of an update is lost where the sums are rounded; more than 1 % is told.

    Returns:
        The root mean square of what is lost, as a share of that of the update.
    """
    lost, size, names = 0.0, 0.0, set()
    for module in adapted.values():
        weight, dtype = float_weight(module.frozen)
        names.add(str(dtype).removeprefix("mlx.core."))
        a, b = module.pair()
        exact = weight + models.SCALE * (a @ b).T
        lost += mx.square(exact - exact.astype(dtype).astype(mx.float32)).sum().item()
        size += mx.square(exact - weight).sum().item()
    share = math.sqrt(lost / size) if size else 0.0
    if share > 0.01:
        hint(
            f"rounded to {' and '.join(sorted(names))}, the merged weights are off by {share:.0%} "
            "of their change (root mean square); the adapter itself is exact"
        )
    return share
