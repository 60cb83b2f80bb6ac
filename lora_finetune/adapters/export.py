"""Export: an adapter in the forms of other tools, or merged into a whole model."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import models
from lora_finetune.adapters import adapter_configs, adapters, base_arrays, merging
from lora_finetune.base.errors import UserError, abbreviated, hint
from lora_finetune.base.signals import raising_signals
from lora_finetune.mlx_patches.loading import can_merge, load_as_stored
from lora_finetune.model_folder import transformers_names
from lora_finetune.model_folder.files import read_object
from lora_finetune.model_folder.weights import read_weights

import mlx.nn as nn
import safetensors
import safetensors.numpy
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import dequantize_model


class Export(NamedTuple):
    """A form, and the folder that is made for it."""

    form: str
    folder: Path


# --- Before training ----------------------------------------------------------------------------


def check_folders(exports: list[Export], adapter_file: Path) -> None:
    """Raise UserError where one of the folders is in use, or cannot be made."""
    seen = set()
    for form, folder in exports:
        try:
            where = folder.resolve()
            if where.exists() and not where.is_dir():
                raise UserError(f"--export {form}: {folder} is a file; name a new folder")
            if where.exists() and any(where.iterdir()):
                raise UserError(
                    f"--export {form}: the folder {folder} is not empty; name a new one"
                )
            is_in_use = where == Path.cwd() or where.is_mount()
            if is_in_use or where in seen or adapter_file.resolve().is_relative_to(where):
                raise UserError(f"--export {form}: {folder} is in use already; name a new folder")
            with new_folder(where):
                pass
        except (OSError, RuntimeError) as error:  # the latter of a loop of links
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--export {form}: {folder} cannot be made: {why}") from None
        seen.add(where)


def check_forms(exports: list[Export], model: nn.Module, base: Path) -> None:
    """Raise UserError where a form cannot hold the adapter of a model.

    Args:
        base: the folder of the model.
    """
    reasons = {
        "mlx-lm": [why_not_mlx_lm],
        "peft": [why_not_peft],
        "merged": [why_not_merged],
        "merged-float": [why_not_merged, why_not_dequantized],
    }
    for form, _ in exports:
        for why_not in reasons[form]:
            if reason := why_not(model, base):
                raise UserError(f"--export {form}: {reason}; take another form")


def why_not_mlx_lm(model: nn.Module, base: Path) -> str | None:
    """Why mlx-lm has no LoRA for a layer: a router, or a linear layer of a model's own kind."""
    for path, module in models.lora_modules(model).items():
        kinds = (nn.Linear, nn.QuantizedLinear)
        if not isinstance(module.frozen, kinds) or hasattr(module.frozen, "to_lora"):
            return f"mlx-lm has no LoRA for {path}, which is no plain linear layer"
    return None


def why_not_peft(model: nn.Module, base: Path) -> str | None:
    """Why it is not known what an adapted layer is in transformers, or PEFT cannot adapt it."""
    try:
        peft_names(model, base)
    except ValueError as error:
        return str(error)
    return None


def peft_names(model: nn.Module, base: Path) -> dict[str, str]:
    """What the adapted layers are called in transformers, whose modules PEFT adapts.

    Where transformers has no such model in its own code, these are the names of the checkpoint.

    Raises:
        ValueError: that is not known, or PEFT's LoRA has no effect there; says of what.
    """
    model_type, paths = read_object(base / "config.json")["model_type"], models.lora_modules(model)
    for path in paths:
        if not transformers_names.is_called(model_type, path):
            raise ValueError(f"in PEFT LoRA of {path} has no effect: transformers never calls it")
    if model_type in transformers_names.MODEL_TYPES.split():
        return {path: transformers_names.module_name(model_type, path) for path in paths}
    if base_arrays.is_written_by_mlx(base):
        raise ValueError(f"{base} has MLX's names, and those of transformers are not known")
    arrays, names = read_weights(base), {}
    for path, found in base_arrays.sources(base, arrays, list(paths)).items():
        name = min(found)
        if len(found) > 1 or arrays[name].shape != models.linear_shape(paths[path].frozen):
            raise ValueError(f"the weights in {base} have another layout of {path} than MLX")
        names[path] = name.removesuffix(".weight")
    return names


def why_not_merged(model: nn.Module, base: Path) -> str | None:
    """Why LoRA cannot be merged: a layer is quantized, or computed, in a way of its own."""
    for path, module in models.lora_modules(model).items():
        if not can_merge(module.frozen):
            return f"LoRA cannot be merged into {path}, which is quantized in a way of its own"
    try:
        if not merging.is_rebuilt(base, dequantize=False):
            arrays = read_weights(base)
            base_arrays.sources(base, arrays, list(models.lora_modules(model)))
    except ValueError as error:
        return str(error)
    return None


def why_not_dequantized(model: nn.Module, base: Path) -> str | None:
    """Why the float weights are not known: of these kinds of layers, or for transformers."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
    others = [p for p, m in model.named_modules() if "scales" in m and not isinstance(m, kinds)]
    if others:
        return f"mlx-lm cannot dequantize {abbreviated(others)}"
    if not merging.is_rebuilt(base, dequantize=True):
        return None
    config = read_object(base / "config.json")
    if "text_config" in config:
        return (
            f"mlx-lm reads only the language model of {base}, and transformers wants the rest too"
        )
    stored = dequantize_model(load_as_stored(base)[0])
    weights = dict(tree_flatten(stored.parameters()))
    try:
        base_arrays.in_checkpoint(base, weights, config["model_type"])
    except ValueError as error:
        return f"{base} is as MLX has it, and how transformers has {error} is not known"
    return None


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
    config, adapter = adapters.mlx_lm_config(model), adapters.whole_pairs(model)
    forms = {form for form, _ in exports}
    names = peft_names(model, base) if "peft" in forms else {}
    if names and base_arrays.is_written_by_mlx(base):
        hint(f"in PEFT take the original model in the place of {name}, which has MLX's layout")
    is_merged = forms & {"merged", "merged-float"}
    behaviour = merging.Behaviour.of(model) if is_merged else None
    model.clear()  # merging loads it again, and there may be no memory for two
    for form, folder in exports:
        with raising_signals(f"{folder} is not made"), whole_folder(folder) as part:
            if form == "mlx-lm":
                write_mlx_lm(part, adapter, config | {"model": name})
            elif form == "peft":
                write_peft(part, {names[path]: pair for path, pair in adapter.items()}, name)
            else:
                merging.write_merged(part, base, adapter, behaviour, form == "merged-float")
        print(f"Exported as {form} to {folder}.", flush=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder, which takes the place of this one when all is written, or vanishes."""
    where = folder.resolve()
    try:
        with new_folder(where) as part:
            yield part
            if where.exists():
                shutil.copymode(where, part)
            part.replace(where)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # MLX's are RuntimeErrors
        why = getattr(error, "strerror", None) or error
        raise UserError(f"the folder {folder} cannot be written: {why}") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside this one that vanishes, unless it is renamed."""
    folder.exists()  # raises where the name is too long
    part = folder.with_name(f".export.{secrets.token_hex(4)}")
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_mlx_lm(folder: Path, adapter: adapters.Adapter, config: dict) -> None:
    """An adapter as mlx_lm.lora writes it."""
    arrays = adapters.named(adapters.widened(adapter))
    content = adapters.safetensors_content(arrays)
    (folder / "adapters.safetensors").write_bytes(content)
    adapter_configs.write_config(folder, config)


def write_peft(folder: Path, adapter: adapters.Adapter, base: str) -> None:
    """An adapter as PEFT writes it: A is (r, d_in) and B (d_out, r); the scale is lora_alpha / r.

    llama.cpp and vLLM read this form too.
    """
    arrays, wide = {}, adapters.widened(adapter)
    # In transformers a router is no linear layer, and PEFT adapts the parameter.
    routers = [path for path in wide if path.rpartition(".")[2] in models.ROUTERS]
    for path, (a, b) in wide.items():
        for name, array in (("lora_A", a), ("lora_B", b)):
            full = f"base_model.model.{path}.{name}.weight"
            arrays[full] = array.T
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
    content = adapters.safetensors_content(arrays, "pt")
    (folder / "adapter_model.safetensors").write_bytes(content)
    adapter_configs.write_config(folder, config)
