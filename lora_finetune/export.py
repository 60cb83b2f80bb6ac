"""Out into the world: an adapter in the forms of other tools, or merged into a whole model."""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import models
from lora_finetune import adapters, model_folder
from lora_finetune.command_line import UserError, abbreviated, hint, raising_signals

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import safetensors
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import dequantize_model, save_config, save_model


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
    """Why PEFT would not find an adapted layer under its name here, or not as a linear layer.

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


def why_not_merged(model: nn.Module, base: Path) -> str | None:
    """Why LoRA cannot be merged: a layer is quantized in a way of its own."""
    for path, module in models.lora_modules(model).items():
        if not models.can_merge(module.frozen):
            return f"LoRA cannot be merged into {path}, which is quantized in a way of its own"
    return None


def why_not_dequantized(model: nn.Module, base: Path) -> str | None:
    """Why a model cannot be dequantized: mlx-lm does so with these kinds of layers only."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
    others = [p for p, m in model.named_modules() if "scales" in m and not isinstance(m, kinds)]
    return f"mlx-lm cannot dequantize {abbreviated(others)}" if others else None


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
    config, adapter = adapters.mlx_lm_config(model), adapters.whole_pairs(model)
    is_merged = any(form.startswith("merged") for form, _ in exports)
    behaviour = Behaviour.of(model) if is_merged else None
    model.clear()  # merging loads it again, and there may be no memory for two
    for form, folder in exports:
        with raising_signals(f"{folder} is not made"), whole_folder(folder) as part:
            if form == "mlx-lm":
                write_mlx_lm(part, adapter, config | {"model": name})
            elif form == "peft":
                write_peft(part, adapter, name)
            else:
                write_merged(part, base, adapter, behaviour, form == "merged-float")
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
    adapters.write_config(folder, config)


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
    adapters.write_config(folder, config)


# --- Merged -------------------------------------------------------------------------------------


def write_merged(
    folder: Path, base: Path, adapter: adapters.Adapter, behaviour: Behaviour, dequantize: bool
) -> None:
    """A whole model with the adapter in its weights, compared with the model that has it beside.

    The base is loaded again as it is in its files. Only the adapted layers change: where they were
    quantized, they are dequantized.

    Args:
        behaviour: what it is to do.
        dequantize: whether the rest is dequantized too.

    Raises:
        UserError: it does something else.
    """
    model, config = models.load_as_stored(base)
    adapters.adapt(model, adapter, base, None)
    adapted = models.lora_modules(model)
    lost = rounding(adapted)
    merged = {path: module.merged() for path, module in adapted.items()}
    if not write_changed(
        folder, base, config, {f"{p}.weight": m.weight for p, m in merged.items()}
    ):
        model.update_modules(tree_unflatten(list(merged.items())))
        if dequantize:
            model = dequantize_model(model)
        mark_dequantized(config, list(adapted), dequantize)
        save_model(folder, model, donate_model=True)
        has_images = "vision_tower" in getattr(model, "model", {})
        save_config(config, folder / "config.json", keep_vision_config=has_images)
        tell_names(base, folder)
    copy_tokenizer(base, folder)
    behaviour.check(models.load(folder)[0], lost)


def write_changed(folder: Path, base: Path, config: dict, changed: dict[str, mx.array]) -> bool:
    """Write the files of a base with these weights changed, as transformers has them.

    Returns:
        False, and nothing is written, if the base is quantized, or MLX has other names or layouts.
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
        noise = max(NOISE[models.float_weight(module)[1]] for _, module in frozen)
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
        weight, dtype = models.float_weight(module.frozen)
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


def mark_dequantized(config: dict, paths: list[str], dequantize: bool) -> None:
    """Say in a model's configuration that these layers are not quantized, or none is."""
    for name in ("quantization", "quantization_config"):
        if dequantize:
            config.pop(name, None)
        elif isinstance(config.get(name), dict):
            config[name] |= dict.fromkeys(paths, False)


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the files of the tokenizer, and how it generates; never code."""
    for file in {file for pattern in model_folder.TOKENIZER_FILES for file in base.glob(pattern)}:
        if file.is_file() and file.suffix != ".py":
            shutil.copyfile(file, folder / file.name)


def tell_names(base: Path, folder: Path) -> None:
    """Tell where weights have other names than in the base, under which transformers has them."""
    names = {name for name, _ in weight_shapes(folder)} - {name for name, _ in weight_shapes(base)}
    if names:
        hint(
            f"the merged model is for mlx-lm: transformers does not know MLX's names of "
            f"{abbreviated(sorted(names))}"
        )
