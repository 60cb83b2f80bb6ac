"""An adapter as this program saves it: an .npz file with A and B of each layer, for scale 20."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import models
from lora_finetune.base.errors import UserError
from lora_finetune.base.files import atomic_write
from lora_finetune.model_folder.targets import natural_order

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# Path of a layer -> A (d_in, r), B (r, d_out); of experts (experts, r, d_in), (experts, d_out, r).
Adapter = dict[str, tuple[np.ndarray, np.ndarray]]
Arrays = dict[str, np.ndarray]  # by name


def trainable_arrays(model: nn.Module) -> Arrays:
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def file_arrays(model: nn.Module) -> Arrays:
    """The trainable parameters as adapter files hold them: another scale is folded into B."""
    modules = [(path, m) for path, m in model.named_modules() if isinstance(m, models.LowRank)]
    of_scale = {path: np.float32(m.scale / models.SCALE) for path, m in modules}
    return named({p: (m.lora_a, np.array(m.lora_b) * of_scale[p]) for p, m in modules})


def named(adapter: Adapter) -> Arrays:
    """The arrays of an adapter by mlx-lm's names for them; `pair_arrays` undoes it."""
    arrays = {}
    for path, (a, b) in adapter.items():
        arrays |= {f"{path}.lora_a": np.array(a), f"{path}.lora_b": np.array(b)}
    return arrays


def pair_arrays(file: Path, arrays: Arrays) -> Adapter:
    """The adapter in the named arrays of a file, first layer first.

    Raises UserError where they are not pairs of finite matrices.
    """
    pairs: dict[str, Arrays] = {}
    for name in sorted(arrays, key=natural_order):
        path, _, which = name.rpartition(".")
        pairs.setdefault(path, {})[which] = arrays[name]
    adapter = {}
    for path, pair in pairs.items():
        if pair.keys() != {"lora_a", "lora_b"}:
            raise UserError(f"{file} has {path}.{' and '.join(pair)}, not a lora_a and its lora_b")
        a, b = pair["lora_a"], pair["lora_b"]
        matrices = a.ndim == b.ndim in (2, 3) and a.dtype.kind == b.dtype.kind == "f"
        is_pair = matrices and a.shape[1] == b.shape[0 if b.ndim == 2 else 2] > 0
        if not (is_pair and a.shape[:-2] == b.shape[:-2]):
            raise UserError(f"{file}: {path} is not a pair of matrices (d_in, r) and (r, d_out)")
        adapter[path] = a, b = a.astype(np.float32), b.astype(np.float32)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"{file}: {path} holds numbers that are not finite")
    if not adapter:
        raise UserError(f"{file} holds no arrays; name the file of an adapter")
    return adapter


def rescaled(adapter: Adapter, old: float, new: float) -> Adapter:
    """The same adapter for another scale, with other B's."""
    return {path: (a, b * np.float32(old / new)) for path, (a, b) in adapter.items()}


def npz_content(arrays: Arrays) -> bytes:
    """The bytes of an .npz file."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def write_arrays(file: Path, arrays: Arrays) -> None:
    """Write an .npz file, whole or not at all."""
    with atomic_write(file) as [stream]:
        np.savez(stream, **arrays)


def read_arrays(file: Path) -> Arrays:
    """The arrays of an .npz or .safetensors file; nothing pickled is loaded.

    Raises UserError where it is not a whole file of plain arrays.
    """
    try:
        if file.suffix == ".safetensors":
            arrays = mx.load(str(file)).items()  # in float32, since NumPy has no bfloat16
            return {name: np.array(array.astype(mx.float32)) for name, array in arrays}
        with warnings.catch_warnings(), np.load(file, allow_pickle=False) as archive:
            warnings.simplefilter("ignore")  # the error is enough
            return {name: np.asarray(array) for name, array in archive.items()}
    except Exception:  # zipfile, zlib, NumPy and MLX each raise in their own way on a damaged file
        raise UserError(
            f"{file} is not a whole .npz or .safetensors file of plain arrays; copy it again (`git "
            "lfs pull` does where it is a Git LFS pointer)"
        ) from None
