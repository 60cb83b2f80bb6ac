"""Adapter files in and out, and whether one fits a model."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import models
from lora_finetune.command_line import UserError, warn
from lora_finetune.files import atomic_write
from models import attention_projections, is_linear, linear_shape, natural_order, router_projections

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import safetensors.numpy
from mlx.utils import tree_flatten

Adapter = dict[str, tuple[np.ndarray, np.ndarray]]  # path of a linear layer -> its A and B, float32


def adapter_content(arrays: dict[str, np.ndarray], suffix: str) -> bytes:
    """The content of an .npz file of the arrays of an adapter.

    With the suffix .safetensors it is such a file, as mlx-lm's `adapters.safetensors` is.
    """
    if suffix == ".safetensors":
        return safetensors.numpy.save(arrays)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def trainable_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The trainable parameters by their names, float32."""
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of an adapter, whole or not at all."""
    with atomic_write(file) as [stream]:
        stream.write(adapter_content(arrays, file.suffix))


def find_adapter(path: Path) -> Path:
    """The adapter file that a path means: itself, or the one in a folder of mlx_lm.lora.

    Raises:
        UserError: a folder without one; names the files that might be meant.
    """
    file = path / "adapters.safetensors"
    if not path.is_dir() or file.is_file():
        return file if path.is_dir() else path
    if (path / "adapter_model.safetensors").is_file():
        raise UserError(f"{path} holds an adapter of PEFT; only those of mlx-lm can be read")
    files = sorted(file.name for file in path.iterdir() if file.suffix in (".npz", ".safetensors"))
    name_one = f"name one of its files: {', '.join(files)}" if files else "it holds no adapter file"
    raise UserError(f"{path} is a folder without adapters.safetensors; {name_one}")


def read_adapter(file: Path) -> Adapter:
    """Read an .npz or .safetensors file and check it by itself; nothing pickled is ever loaded.

    Returns:
        For each adapted path, first layer first, A (d_in, r) and B (r, d_out), for scale 20.

    Raises:
        UserError: no such file, not a whole .npz file, or not pairs of matrices.
    """
    if not file.is_file():
        raise UserError(f"there is no adapter file {file}")
    factor = mlx_lm_scale(file) / models.SCALE
    pairs = pair_arrays(file, read_arrays(file))
    return {path: (a, b * np.float32(factor)) for path, (a, b) in pairs.items()}


def mlx_lm_scale(file: Path) -> float:
    """The scale of an adapter: that which mlx_lm.lora wrote beside its file, or 20."""
    config = file.with_name("adapter_config.json")
    if not file.name.endswith("adapters.safetensors") or not config.is_file():
        return models.SCALE
    try:
        return float(json.loads(config.read_bytes())["lora_parameters"]["scale"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{config} names no scale under lora_parameters") from None


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .safetensors file; raises UserError where it is not whole."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.numpy.load_file(file)
        with warnings.catch_warnings(), np.load(file, allow_pickle=False) as archive:
            warnings.simplefilter("ignore")  # they are of how the file was written
            arrays = dict(archive)
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise TypeError
        return arrays
    except Exception:  # zipfile, zlib and NumPy each raise in their own way on a damaged file
        with file.open("rb") as stream:
            if stream.read(len(models.LFS_POINTER)) == models.LFS_POINTER:
                raise UserError(f"{file} is a Git LFS pointer; `git lfs pull` fetches it") from None
        kind = file.suffix if file.suffix == ".safetensors" else ".npz"
        raise UserError(f"{file} is not a whole {kind} file of plain arrays") from None


def pair_arrays(file: Path, arrays: dict[str, np.ndarray]) -> Adapter:
    """Put each A and its B together; raises UserError as `read_adapter` does."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(arrays, key=natural_order):
        path, _, which = name.rpartition(".")
        pairs.setdefault(path, {})[which] = arrays[name]
    adapter = {}
    for path, pair in pairs.items():
        if set(pair) != {"lora_a", "lora_b"}:
            raise UserError(f"{file} has {path}.{' and '.join(pair)}, not a lora_a and its lora_b")
        a, b = pair["lora_a"], pair["lora_b"]
        matrices = a.ndim == b.ndim == 2 and a.dtype.kind == b.dtype.kind == "f"
        if not (matrices and a.shape[1] == b.shape[0] > 0):
            raise UserError(f"{file}: {path} is not a pair of matrices (d_in, r) and (r, d_out)")
        with np.errstate(over="ignore"):
            a, b = a.astype(np.float32), b.astype(np.float32)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"{file}: {path} holds numbers that are not finite")
        adapter[path] = a, b
    if not adapter:
        raise UserError(f"{file} holds no arrays")
    return adapter


def check_adapter(file: Path, adapter: Adapter, model: nn.Module) -> None:
    """Check that an adapter has its place in a model that is not adapted yet.

    Raises:
        UserError: some of it has not; names the first few.
    """
    shapes = {path: linear_shape(m) for path, m in model.named_modules() if is_linear(m)}
    shapes |= dict([*attention_projections(model), *router_projections(model)])
    wrong = []
    for path, (a, b) in adapter.items():
        if path not in shapes:
            wrong.append(f"there is no linear layer {path}")
        elif (b.shape[1], a.shape[0]) != shapes[path]:
            wrong.append(
                f"{path} maps {shapes[path][1]} to {shapes[path][0]} numbers, "
                f"its A and B {a.shape[0]} to {b.shape[1]}"
            )
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{file} is not for this model: {'; '.join(wrong[:3])}{more}")


def adapt(model: nn.Module, adapter: Adapter, source: Path | None, lora_layers: int | None) -> None:
    """Put LoRA into a model: where the adapter read from `source` has it, or in the last layers.

    With both an adapter and `lora_layers`, what the adapter lacks of those layers starts fresh.

    Raises:
        UserError: the adapter is not for this model, or reaches outside those layers.
    """
    check_adapter(source, adapter, model)
    ranks = {path: a.shape[1] for path, (a, _) in adapter.items()}
    if lora_layers is not None:
        layers = models.layer_paths(model)
        if lora_layers > len(layers):
            warn(f"the model has only {len(layers)} layers; all of them are adapted")
        last = tuple(f"{layer}." for layer in layers[-lora_layers:])
        outside = [path for path in ranks if not path.startswith(last)]
        if outside:
            raise UserError(
                f"{source} adapts {outside[0]}, which is not in the last {lora_layers} layers; "
                "raise --lora-layers, or leave it out to adapt what the file does"
            )
        rank = next(iter(ranks.values()), models.RANK)
        wanted = dict.fromkeys(models.find_targets(model, lora_layers), rank)
        if ranks and (fresh := wanted.keys() - ranks.keys()):
            warn(f"{source} lacks {len(fresh)} of {len(wanted)} adapted layers; they start fresh")
        ranks = wanted | ranks
    models.add_lora(model, ranks)
    load_adapter(model, adapter)


def load_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter's arrays into a model that is adapted at its paths."""
    weights = [
        (f"{path}.{which}", mx.array(array))
        for path, pair in adapter.items()
        for which, array in zip(("lora_a", "lora_b"), pair, strict=True)
    ]
    model.load_weights(weights, strict=False)
