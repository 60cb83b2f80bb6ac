"""Out into the world: an adapter in the forms of other tools, or merged into a whole model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import models
from lora_finetune import adapters
from lora_finetune.command_line import UserError, abbreviated, hint

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import safetensors
import safetensors.numpy
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import dequantize_model, save_config, save_model


class Export(NamedTuple):
    """A form, and the folder that is made for it."""

    form: str
    folder: Path


# --- Before training ----------------------------------------------------------------------------


def check_folders(exports: list[Export]) -> None:
    """Raise UserError where one of the folders is not empty, or cannot be made."""
    for form, folder in exports:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--export {form}: the folder {folder} is not empty; name a new one")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--export {form}: {folder} is a file; name a new folder")
        if [other.absolute() for _, other in exports].count(folder.absolute()) > 1:
            raise UserError(f"--export names the folder {folder} twice; each form takes its own")
        try:
            with tempfile.TemporaryDirectory(dir=folder.absolute().parent):
                pass
        except OSError as error:
            raise UserError(f"--export {form}: {folder} cannot be made: {error.strerror}") from None


def check_forms(exports: list[Export], model: nn.Module, base: Path) -> None:
    """Raise UserError where a form cannot hold the adapter of a model.

    Args:
        base: the folder of the model.
    """
    checks = {
        "mlx-lm": check_mlx_lm,
        "peft": partial(check_peft, base=base),
        "merged": check_merged,
        "merged-float": lambda model: check_merged(model) or check_unpacked(model),
    }
    for form, _ in exports:
        if wrong := checks[form](model):
            raise UserError(f"--export {form}: {wrong}; take another form")


def check_mlx_lm(model: nn.Module) -> str | None:
    """What mlx-lm does not put its LoRA into: routers, and linear layers of a model's own kind."""
    for path, module in models.lora_modules(model).items():
        kinds = (nn.Linear, nn.QuantizedLinear)
        if not isinstance(module.frozen, kinds) or hasattr(module.frozen, "to_lora"):
            return f"mlx-lm has no LoRA for {path}, which is no plain linear layer"
    return None


def check_peft(model: nn.Module, base: Path) -> str | None:
    """What PEFT would not find under its name here, or not as a linear layer.

    The checkpoint's names are those of transformers' modules.
    """
    shapes = dict(weight_shapes(base))
    for path, module in models.lora_modules(model).items():
        if isinstance(module, models.LoRARouter):
            return f"PEFT has no LoRA for {path}, which is no plain linear layer"
        shape = shapes.get(f"{path}.weight")
        if shape is None:
            return f"the weights in {base} have no {path}, which is a name of MLX's own"
        if f"{path}.scales" not in shapes and shape != list(models.linear_shape(module.frozen)):
            return f"the weights in {base} have another layout of {path} than MLX"
    return None


def check_merged(model: nn.Module) -> str | None:
    """What LoRA cannot be merged into: layers that are packed in a way of their own."""
    for path, module in models.lora_modules(model).items():
        if not models.can_merge(module.frozen):
            return f"LoRA cannot be merged into {path}, which is packed in a way of its own"
    return None


def check_unpacked(model: nn.Module) -> str | None:
    """What stays packed when a model is unpacked; mlx-lm unpacks these kinds of layers only."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
    packed = [p for p, m in model.named_modules() if "scales" in m and not isinstance(m, kinds)]
    return f"mlx-lm cannot unpack {abbreviated(packed)}" if packed else None


def weight_shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """The names and shapes of the arrays in a model's folder."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safetensors.safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                yield name, opened.get_slice(name).get_shape()


# --- Writing ------------------------------------------------------------------------------------


def write_all(exports: list[Export], model: nn.Module, base: Path, name: str) -> None:
    """Write each form into its folder, whole or not at all. The model is of no use afterwards.

    Args:
        model: with its adapter.
        base: the folder of the model.
        name: what the model is called for other tools: its repository, or the path of its folder.

    Raises:
        UserError: it cannot be written, or a merged model does not do what the adapted one does.
    """
    config = adapters.mlx_lm_config(model)
    pairs = {path: as_numpy(m.pair()) for path, m in models.lora_modules(model).items()}
    scale_20 = adapters.pair_arrays(base, adapters.file_arrays(model))
    expected = sample_logits(model)
    model.clear()  # merging loads it again, and there may be no memory for two
    for form, folder in exports:
        with whole_folder(folder) as part:
            if form == "mlx-lm":
                write_mlx_lm(part, pairs, config | {"model": name})
            elif form == "peft":
                write_peft(part, pairs, name)
            else:
                write_merged(part, base, scale_20, expected, form == "merged-float")
        print(f"Exported as {form} to {folder}.", flush=True)


def as_numpy(pair: tuple[mx.array, mx.array]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(pair[0]), np.array(pair[1])


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside this one, which takes its place when all is written, or vanishes."""
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        try:
            part.chmod(0o755)  # mkdtemp's is for its owner alone
            yield part
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # MLX's are RuntimeErrors
        why = getattr(error, "strerror", None) or error
        raise UserError(f"the folder {folder} cannot be written: {why}") from error


Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def widened(pairs: Pairs) -> Pairs:
    """The same updates, all of the highest rank among them: the others get rows of zeros."""
    rank = max(a.shape[1] for a, _ in pairs.values())
    return {
        path: (np.pad(a, ((0, 0), (0, rank - len(b)))), np.pad(b, ((0, rank - len(b)), (0, 0))))
        for path, (a, b) in pairs.items()
    }


def write_mlx_lm(folder: Path, pairs: Pairs, config: dict) -> None:
    """An adapter as mlx_lm.lora writes it."""
    arrays = {}
    for path, (a, b) in widened(pairs).items():
        arrays |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    content = safetensors.numpy.save(arrays, {"format": "mlx"})
    (folder / "adapters.safetensors").write_bytes(content)
    adapters.write_config(folder, config)


def write_peft(folder: Path, pairs: Pairs, base: str) -> None:
    """An adapter as PEFT writes it: A is (r, d_in) and B (d_out, r); the scale is lora_alpha / r.

    llama.cpp and vLLM read this form too.
    """
    arrays, wide = {}, widened(pairs)
    # In transformers a router is no linear layer, and PEFT adapts the parameter.
    routers = [path for path in wide if path.rpartition(".")[2] in models.ROUTERS]
    for path, (a, b) in wide.items():
        for name, array in (("lora_A", a), ("lora_B", b)):
            full = f"base_model.model.{path}.{name}.weight"
            arrays[full] = np.ascontiguousarray(array.T)
    if routers:
        hint(
            f"PEFT takes the routers ({abbreviated(routers)}) as target_parameters; other tools, "
            "and versions of transformers that name them otherwise, may leave them out"
        )
    rank = next(iter(wide.values()))[0].shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(models.SCALE * rank),
        "lora_dropout": 0.0,
        "target_modules": [path for path in wide if path not in routers],
        "target_parameters": [f"{path}.weight" for path in routers] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }
    content = safetensors.numpy.save(arrays, {"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(content)
    adapters.write_config(folder, config)


# --- Merged -------------------------------------------------------------------------------------


def write_merged(
    folder: Path, base: Path, adapter: adapters.Adapter, expected: np.ndarray, unpack: bool
) -> None:
    """A whole model with the adapter in its weights, compared with the model that has it beside.

    The base is loaded again as it is in its files. Only the adapted layers change: where they were
    packed, they are unpacked.

    Args:
        expected: the logits that it is to have for SAMPLE.
        unpack: whether the rest is unpacked too.

    Raises:
        UserError: its logits are others.
    """
    model, config = models.load_as_stored(base)
    adapters.adapt(model, adapter, base, None)
    adapted = models.lora_modules(model)
    tolerance = max(TOLERANCE[dtype] for dtype in tell_rounding(adapted))
    merged = {path: module.merged() for path, module in adapted.items()}
    if not write_changed(
        folder, base, config, {f"{p}.weight": m.weight for p, m in merged.items()}
    ):
        model.update_modules(tree_unflatten(list(merged.items())))
        if unpack:
            model = dequantize_model(model)
        leave_unpacked(config, list(adapted), unpack)
        save_model(folder, model, donate_model=True)
        has_images = "vision_tower" in getattr(model, "model", {})
        save_config(config, folder / "config.json", keep_vision_config=has_images)
        tell_names(base, folder)
    copy_tokenizer(base, folder)
    found = sample_logits(models.load(folder)[0])
    if not (error := difference(found, expected)) <= tolerance:
        raise UserError(
            f"the merged model does not do what the adapted one does (its logits differ by "
            f"{error:.1%}), so it was not kept; please report this with the name of the model"
        )


def write_changed(folder: Path, base: Path, config: dict, changed: dict[str, mx.array]) -> bool:
    """Write the files of a base with these weights changed, as transformers has them.

    Returns:
        False, and nothing is written, if the base is packed, or MLX has other names or layouts.
    """
    shapes = dict(weight_shapes(base))
    if {"quantization", "quantization_config"} & config.keys() or any(
        shapes.get(name) != list(weight.shape) for name, weight in changed.items()
    ):
        return False
    for file in base.glob("model*.safetensors"):
        arrays, metadata = mx.load(str(file), return_metadata=True)
        arrays |= {name: changed[name] for name in arrays.keys() & changed.keys()}
        mx.save_safetensors(str(folder / file.name), arrays, metadata)
    for file in (base / "config.json", *base.glob("model*.index.json")):
        shutil.copyfile(file, folder / file.name)
    return True


# Tokens to compare two models on, and how far apart, of how much they differ at all, their logits
# may be: by the rounding of merged weights to their type, and of products on a GPU.
SAMPLE = mx.arange(1, 17)[None]
TOLERANCE = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}


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


def tell_rounding(adapted: dict[str, nn.Module]) -> set[mx.Dtype]:
    """Tell how much of an update is lost where the sums are rounded to float16 or bfloat16.

    Returns:
        The types that they are rounded to.
    """
    lost, size, dtypes = 0.0, 0.0, set()
    for module in adapted.values():
        weight, dtype = models.float_weight(module.frozen)
        dtypes.add(dtype)
        a, b = module.pair()
        exact = weight + models.SCALE * (a @ b).T
        lost += mx.square(exact - exact.astype(dtype).astype(mx.float32)).sum().item()
        size += mx.square(exact - weight).sum().item()
    if size and (share := (lost / size) ** 0.5) > 0.01:
        names = " and ".join(sorted(str(dtype).removeprefix("mlx.core.") for dtype in dtypes))
        hint(
            f"rounded to {names}, the merged weights are off by {share:.0%} of their change (root "
            "mean square); the adapter itself is exact"
        )
    return dtypes


def leave_unpacked(config: dict, paths: list[str], unpack: bool) -> None:
    """Say in a model's configuration that these layers are not packed, or none is."""
    for name in ("quantization", "quantization_config"):
        if unpack:
            config.pop(name, None)
        elif isinstance(config.get(name), dict):
            config[name] |= dict.fromkeys(paths, False)


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the files of the tokenizer, and how it generates; never code."""
    for file in {file for pattern in models.TOKENIZER_FILES for file in base.glob(pattern)}:
        shutil.copyfile(file, folder / file.name)


def tell_names(base: Path, folder: Path) -> None:
    """Tell where weights have other names than in the base, under which transformers has them."""
    names = {name for name, _ in weight_shapes(folder)} - {name for name, _ in weight_shapes(base)}
    if names:
        hint(
            f"the merged model is for mlx-lm: transformers does not know MLX's names of "
            f"{abbreviated(sorted(names))}"
        )
