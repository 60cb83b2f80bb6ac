"""The arrays in a model's folder: which of them a layer's weight is made from, and changed ones.

mlx-lm renames, turns, joins and splits arrays when it loads them (`sanitize`). A merged model is
the base's own files with its own arrays changed, so the way back is needed. It is found without
knowing what is done: where arrays are only put elsewhere, the change of an array is the gradient of
the weights with respect to it, for the weights' change as the cotangent.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_finetune.base.errors import abbreviated
from lora_finetune.mlx_patches.loading import as_loaded
from lora_finetune.model_folder.files import text_settings
from lora_finetune.model_folder.transformers_names import (
    MODEL_TYPES,
    ONE_WAY,
    checkpoint_name,
    is_turned,
)

import mlx.core as mx
import numpy as np
import safetensors

Arrays = dict[str, mx.array]


def is_written_by_mlx(folder: Path) -> bool:
    """Whether MLX wrote the weights of a folder, so that they have the names of its modules."""
    for file in folder.glob("model*.safetensors"):
        with safetensors.safe_open(file, "numpy") as opened:
            if (opened.metadata() or {}).get("format") == "mlx":
                return True
    return False


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether the configuration of a model says that weights are quantized."""
    return any(name.startswith("quantization") and value for name, value in text_settings(config))


def loaded(folder: Path, arrays: Arrays, wrong: str) -> Arrays:
    """What mlx-lm makes of arrays in a folder; raises ValueError(wrong) where it cannot."""
    try:
        return as_loaded(folder, arrays)
    except Exception as error:  # mlx-lm may raise anything
        raise ValueError(wrong) from error


def sources(folder: Path, arrays: Arrays, paths: list[str]) -> dict[str, set[str]]:
    """The names of the arrays that the weight of each layer is put together from.

    Each array of floats is stood for by its number in the order, and a half, throughout.

    Raises:
        ValueError: a weight is more than numbers of arrays put elsewhere.
    """
    names = [name for name, array in arrays.items() if mx.issubdtype(array.dtype, mx.floating)]
    by_mark = {number + 0.5: name for number, name in enumerate(names)}
    marks = {n: mx.broadcast_to(mx.array(m), arrays[n].shape) for m, n in by_mark.items()}
    made, found = loaded(folder, arrays | marks, f"mlx-lm makes weights of others in {folder}"), {}
    for path in paths:
        weight = made[f"{path}.weight"]
        seen = np.unique(np.array(mx.concatenate([weight[:, 0], weight[0]])))
        if not set(seen.tolist()) <= by_mark.keys():
            raise ValueError(f"mlx-lm computes the weight of {path} from others")
        found[path] = {by_mark[mark] for mark in seen.tolist()}
    return found


def changed_arrays(folder: Path, arrays: Arrays, changes: Arrays) -> Arrays:
    """The arrays of a folder that differ where the weights of layers are changed.

    Sums are made in float32 and rounded once, to the type of the array.

    Args:
        changes: the path of a layer -> what is added to its weight, float32.

    Raises:
        ValueError: the weights are not plain copies of numbers in the arrays.
    """
    names = sorted(set().union(*sources(folder, arrays, list(changes)).values()))
    wide = [arrays[name].astype(mx.float32) for name in names]

    def weights(*values: mx.array) -> list[mx.array]:
        made = as_loaded(folder, arrays | dict(zip(names, values, strict=True)))
        return [made[f"{path}.weight"] for path in changes]

    before, gradients = mx.vjp(weights, wide, list(changes.values()))
    after = [array + change for array, change in zip(wide, gradients, strict=True)]
    for path, old, change, new in zip(
        changes, before, changes.values(), weights(*after), strict=True
    ):
        if not mx.array_equal(old + change, new).item():
            raise ValueError(f"mlx-lm computes the weight of {path} from others")
    changed = zip(names, after, strict=True)
    return {name: array.astype(arrays[name].dtype) for name, array in changed}


def in_checkpoint(folder: Path, weights: Arrays, model_type: str) -> Arrays:
    """The weights of a folder's model by the names and in the layouts of transformers' checkpoints.

    Raises:
        ValueError: mlx-lm would not read the same weights from them; says of which.
    """
    if model_type not in set(MODEL_TYPES.split()).difference(ONE_WAY.split()):
        raise ValueError(f"models of the type {model_type}")
    marks = {
        name: mx.broadcast_to(mx.array(number + 0.5), array.shape)
        for number, (name, array) in enumerate(weights.items())
    }
    again = loaded(folder, moved_arrays(model_type, marks), "its weights")
    wrong, kinds, weights = sorted(again.keys() - weights.keys()), set(), dict(weights)
    for name, array in list(weights.items()):
        if name not in again or again[name].shape != array.shape:
            wrong.append(name)
            continue
        kind = re.sub(r"\d+", "", name)  # large arrays are looked at in one layer, others in all
        if array.ndim < 2 or kind not in kinds:
            added = again[name] - marks[name]
            if array.ndim == 1 and (added == 1).all().item():  # mlx-lm adds 1 to some norms
                weights[name] = array - added.astype(array.dtype)
            elif added.any().item():
                wrong.append(name)
        kinds.add(kind)
    if wrong:
        raise ValueError(abbreviated(wrong))
    return moved_arrays(model_type, weights)


def moved_arrays(model_type: str, weights: Arrays) -> Arrays:
    """Weights as in a checkpoint: experts one by one, kernels of convolutions last."""
    found = {}
    for name, array in weights.items():
        there = checkpoint_name(model_type, name)
        if array.ndim == 3 and (expert := re.fullmatch(r"(.*\.experts)(\.\w+\.weight)", there)):
            found |= {f"{expert[1]}.{n}{expert[2]}": each for n, each in enumerate(array)}
        elif is_turned(model_type, there):
            found[there] = array.T
        elif array.ndim == 3 and "conv" in name:
            found[there] = array.moveaxis(2, 1)
        else:
            found[there] = array[None] if name.endswith((".alpha_n", ".alpha_p")) else array
    for name in list(found):
        if gate := re.fullmatch(r"(.*\.(?:input_linear|gate_up_proj))\.gate(\.weight)?", name):
            up = found.pop(f"{gate[1]}.up{gate[2] or ''}")
            found[f"{gate[1]}{gate[2] or ''}"] = mx.concatenate([found.pop(name), up], axis=-2)
        elif name.endswith(".embed_q.weight"):  # the keys' part of kv_b_proj, by heads
            values = found.pop(name.replace(".embed_q.", ".unembed_out."))
            both = mx.concatenate([found.pop(name).swapaxes(1, 2), values], axis=1)
            found[name.replace(".embed_q.", ".kv_b_proj.")] = both.flatten(0, 1)
    return found
