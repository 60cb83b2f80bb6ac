"""Adapter files in and out, and whether one fits a model."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import models
from lora_finetune.adapters import adapter_configs
from lora_finetune.base.errors import UserError, warn
from lora_finetune.base.files import atomic_write
from lora_finetune.model_folder import model_folder
from lora_finetune.model_folder.transformers_names import paths_by_name
from models import attention_projections, is_linear, linear_shape, natural_order, router_projections

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import safetensors.numpy
from mlx.utils import tree_flatten

Adapter = dict[str, tuple[np.ndarray, np.ndarray]]  # path of a linear layer -> its A and B, float32


def adapter_content(arrays: dict[str, np.ndarray], suffix: str) -> bytes:
    """The bytes of an adapter file: .safetensors (as mlx-lm's) for that suffix, else .npz."""
    if suffix == ".safetensors":
        return safetensors_content(arrays)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npz_content(arrays):
    return adapter_content(arrays, ".npz")


def safetensors_content(arrays: dict[str, np.ndarray], written_by: str = "mlx") -> bytes:
    """The bytes of a .safetensors file: the one place where arrays become such bytes.

    safetensors 0.8 writes an array's memory whatever its strides, so that one that is transposed
    would come out with its numbers in another order.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(contiguous, {"format": written_by})


def trainable_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The trainable parameters by their names, float32."""
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def file_arrays(model: nn.Module, suffix: str = ".npz") -> dict[str, np.ndarray]:
    """A model's A's and B's as files have them: for scale 20, so that another is folded into B.

    In a .safetensors file they are as mlx-lm has them: all of one rank, fused projections whole.
    """
    if suffix == ".safetensors":
        return named(widened(whole_pairs(model)))
    low_rank = {path: m for path, m in model.named_modules() if isinstance(m, models.LowRank)}
    paths = sorted(low_rank, key=natural_order)
    return named({path: tuple(map(np.array, low_rank[path].pair())) for path in paths})


def named(adapter: Adapter) -> dict[str, np.ndarray]:
    """The arrays of an adapter by their names, as mlx-lm has them; `pair_arrays` undoes it."""
    return {
        f"{path}.{name}": array
        for path, pair in adapter.items()
        for name, array in zip(("lora_a", "lora_b"), pair, strict=True)
    }


def whole_pairs(model: nn.Module) -> Adapter:
    """A and B of each adapted layer, of a fused projection too, for scale 20."""
    modules = models.lora_modules(model)
    return {path: tuple(map(np.array, module.pair())) for path, module in modules.items()}


def widened(adapter: Adapter) -> Adapter:
    """The same updates, all of the highest rank among them: the others get rows of zeros."""
    rank = max(a.shape[1] for a, _ in adapter.values())
    return {
        path: (np.pad(a, ((0, 0), (0, rank - len(b)))), np.pad(b, ((0, rank - len(b)), (0, 0))))
        for path, (a, b) in adapter.items()
    }


def rescaled(adapter: Adapter, old: float, new: float) -> Adapter:
    """The same adapter for another scale, with other B's."""
    return {path: (a, b * np.float32(old / new)) for path, (a, b) in adapter.items()}


def mlx_lm_config(model: nn.Module) -> dict[str, Any]:
    """What mlx-lm needs to know of the adapter of a model, for files of scale 20.

    It adapts the modules of certain names in so many layers from the last. `alpha` is for Ollama,
    which knows no scale.
    """
    adapted, layers = models.lora_modules(model), models.layer_paths(model)
    rank = max(module.pair()[0].shape[1] for module in adapted.values())
    keys, num_layers = set(), 0
    for path in adapted:
        place = next((n for n, layer in enumerate(layers) if path.startswith(f"{layer}.")), None)
        keys.add(path if place is None else path.removeprefix(f"{layers[place]}."))
        num_layers = max(num_layers, 0 if place is None else len(layers) - place)
    return {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": models.SCALE,
            "alpha": models.SCALE * rank,
            "dropout": 0.0,
            "keys": sorted(keys, key=natural_order),
        },
    }


def write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of an adapter, whole or not at all."""
    with atomic_write(file) as [stream]:
        stream.write(adapter_content(arrays, file.suffix))


def find_adapter(path: Path) -> Path:
    """The adapter file that a path means: itself, or the one in a folder of mlx-lm or PEFT.

    Raises:
        UserError: a folder without one; names the files that might be meant.
    """
    if not path.is_dir():
        return path
    for file in (path / "adapters.safetensors", path / "adapter_model.safetensors"):
        if file.is_file():
            return file
    files = sorted(file.name for file in path.iterdir() if file.suffix in (".npz", ".safetensors"))
    name_one = f"name one of its files: {', '.join(files)}" if files else "it holds no adapter file"
    raise UserError(f"{path} is a folder without adapters.safetensors; {name_one}")


def read_adapter(file: Path) -> Adapter:
    """Read an .npz or .safetensors file and check it by itself; nothing pickled is ever loaded.

    A .safetensors file is of mlx-lm, or of PEFT as its names tell; the scale is that of the
    adapter_config.json beside it.

    Returns:
        For each adapted path, first layer first, A (d_in, r) and B (r, d_out), for scale 20.

    Raises:
        UserError: no such file, not a whole one, not pairs of matrices, or not plain LoRA.
    """
    if not file.is_file():
        raise UserError(f"there is no adapter file {file}; name one that a run has saved")
    arrays = read_arrays(file)
    if file.suffix != ".safetensors":
        return pair_arrays(file, arrays)
    config = adapter_configs.read_config(file)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error
        if any(adapter_configs.PEFT_NAME.fullmatch(name) for name in arrays):
            arrays = adapter_configs.from_peft(file, arrays, config)
        else:
            scale = np.float32(adapter_configs.mlx_lm_scale(file, config) / models.SCALE)
            arrays = {n: a * scale if n.endswith(".lora_b") else a for n, a in arrays.items()}
    return pair_arrays(file, arrays)


# --- The arrays ---------------------------------------------------------------------------------


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .safetensors file; raises UserError where it is not whole."""
    try:
        if file.suffix == ".safetensors":
            entries = safetensors.deserialize(file.read_bytes())
            return {name: float_array(**entry) for name, entry in entries}
        with warnings.catch_warnings(), np.load(file, allow_pickle=False) as archive:
            warnings.simplefilter("ignore")  # they are of how the file was written
            arrays = dict(archive)
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise TypeError
        return arrays
    except Exception:  # zipfile, zlib and NumPy each raise in their own way on a damaged file
        with file.open("rb") as stream:
            if stream.read(len(model_folder.LFS_POINTER)) == model_folder.LFS_POINTER:
                raise UserError(f"{file} is a Git LFS pointer; `git lfs pull` fetches it") from None
        kind = file.suffix if file.suffix == ".safetensors" else ".npz"
        raise UserError(f"{file} is not a whole {kind} file of plain arrays") from None


def float_array(shape: list[int], dtype: str, data: bytes) -> np.ndarray:
    """An array of a .safetensors file; bfloat16, which NumPy lacks, becomes float32."""
    if dtype == "BF16":  # the upper half of a float32
        array = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        types = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
        array = np.frombuffer(data, types[dtype])
    return array.reshape(shape)


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
        if a.ndim == 3:
            raise UserError(f"{file}: {path} is LoRA of a layer's experts, which cannot be read")
        matrices = a.ndim == b.ndim == 2 and a.dtype.kind == b.dtype.kind == "f"
        if not (matrices and a.shape[1] == b.shape[0] > 0):
            raise UserError(f"{file}: {path} is not a pair of matrices (d_in, r) and (r, d_out)")
        with np.errstate(over="ignore"):
            a, b = a.astype(np.float32), b.astype(np.float32)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"{file}: {path} holds numbers that are not finite")
        adapter[path] = a, b
    if not adapter:
        raise UserError(f"{file} holds no arrays; name the file of an adapter")
    return adapter


def check_adapter(file: Path, adapter: Adapter, model: nn.Module) -> None:
    """Check that an adapter has its place in a model that is not adapted yet.

    Raises:
        UserError: some of it has not; names the first few.
    """
    shapes, wrong = adaptable(model), []
    for path, (a, b) in adapter.items():
        if path not in shapes:
            wrong.append(f"there is no linear layer {path}")
        elif (whole := path.rpartition(".")[0]) in adapter:
            wrong.append(f"{path} is a part of {whole}, which it adapts too")
        elif (b.shape[1], a.shape[0]) != shapes[path]:
            wrong.append(
                f"{path} maps {shapes[path][1]} to {shapes[path][0]} numbers, "
                f"its A and B {a.shape[0]} to {b.shape[1]}"
            )
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{file} is not for this model: {'; '.join(wrong[:3])}{more}")


def adaptable(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What of a model can be adapted, and its (d_out, d_in)."""
    shapes = {path: linear_shape(m) for path, m in model.named_modules() if is_linear(m)}
    return shapes | dict([*attention_projections(model), *router_projections(model)])


def under_our_names(adapter: Adapter, model: nn.Module) -> Adapter:
    """The same adapter by the paths of a model, if it has transformers' names for them."""
    paths = adaptable(model)
    if adapter.keys() <= paths.keys():
        return adapter
    for found in paths_by_name(paths):
        if adapter.keys() <= found.keys():
            return {found[name]: pair for name, pair in adapter.items()}
    return adapter


def adapt(
    model: nn.Module,
    adapter: Adapter,
    source: Path | None,
    lora_layers: int | None,
    rank: int | None = None,
    scale: float = models.SCALE,
) -> None:
    """Put LoRA into a model: where the adapter read from `source` has it, or in the last layers.

    With both an adapter and `lora_layers`, what the adapter lacks of those layers starts fresh.

    Args:
        rank: of what starts fresh; by default that of the adapter, else 8.
        scale: what the adapter is for.

    Raises:
        UserError: the adapter is not for this model, or reaches outside those layers.
    """
    adapter = under_our_names(adapter, model)
    check_adapter(source, adapter, model)
    adapter = by_parts(model, adapter)
    ranks = {path: a.shape[1] for path, (a, _) in adapter.items()}
    other = next((found for found in ranks.values() if rank not in (None, found)), None)
    if other:
        raise UserError(f"{source} has rank {other}, not --lora-rank {rank}; leave that out")
    if lora_layers is not None:
        if lora_layers > len(model.layers):
            warn(f"the model has only {len(model.layers)} layers; all of them are adapted")
        last = models.last_layers(model, lora_layers)
        outside = [path for path in ranks if not path.startswith(last)]
        if outside:
            raise UserError(
                f"{source} adapts {outside[0]}, which is not in the last {lora_layers} layers; "
                "raise --lora-layers, or leave it out to adapt what the file does"
            )
        rank = rank or next(iter(ranks.values()), models.RANK)
        wanted = dict.fromkeys(models.find_targets(model, lora_layers), rank)
        for whole in ranks:  # of a fused projection
            wanted = {path: r for path, r in wanted.items() if path[:-2] != whole}
        if ranks and (fresh := wanted.keys() - ranks.keys()):
            warn(f"{source} lacks {len(fresh)} of {len(wanted)} adapted layers; they start fresh")
        ranks = wanted | ranks
    models.add_lora(model, ranks, scale)
    load_adapter(model, adapter)


def by_parts(model: nn.Module, adapter: Adapter) -> Adapter:
    """The same adapter with the updates of fused projections as those of their queries and values.

    So are they trained here; in the forms of other tools they are one. A projection whose keys are
    updated too stays whole.
    """
    modules, found = dict(model.named_modules()), {}
    for path, (a, b) in adapter.items():
        attention, _, name = path.rpartition(".")
        parts = {}
        if attention in modules and name in models.fused_names(modules[attention]):
            layout = models.fused_layout(model, modules[attention], name)
            columns = {part: layout.rows(part, b.shape[1]) for part in "qv"}
            others = np.delete(b, np.concatenate(list(columns.values())), axis=1)
            if not others.any():
                parts = {f"{path}.{part}": own_part(a, b[:, c]) for part, c in columns.items()}
        found |= parts or {path: (a, b)}
    return found


def own_part(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B without the ranks whose row of B is zero; all of them where B is zero throughout."""
    used = b.any(axis=1) if b.any() else slice(None)
    return np.ascontiguousarray(a[:, used]), np.ascontiguousarray(b[used])


def load_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter's arrays into a model that is adapted at its paths."""
    weights = [(name, mx.array(array)) for name, array in named(adapter).items()]
    model.load_weights(weights, strict=False)
