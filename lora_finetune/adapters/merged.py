"""An adapter merged into a whole model, which does what the adapted one does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import models
from lora_finetune.adapters import loading
from lora_finetune.adapters.npz import Adapter
from lora_finetune.base.errors import UserError, abbreviated, hint
from lora_finetune.base.files import write_json
from lora_finetune.mlx_patches.loading import as_loaded, can_merge, float_type, load_as_stored
from lora_finetune.model_folder import transformers_names
from lora_finetune.model_folder.files import FILES, read_object, text_settings
from lora_finetune.model_folder.transformers_names import multiplier
from lora_finetune.model_folder.weights import Weights, read_weights

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model

# How far apart rounding may bring the logits of two models with weights of these types.
NOISE = {mx.float32: 1e-3, mx.float16: 0.02, mx.bfloat16: 0.1}


def check(model: nn.Module, base: Path) -> None:
    """Raise ValueError where LoRA cannot be merged into the weights of its layers."""
    for path, module in models.lora_modules(model).items():
        if not can_merge(module.frozen):
            raise ValueError(f"LoRA cannot be merged into {path}, as it is quantized")


def check_float(model: nn.Module, base: Path) -> None:
    """Raise ValueError where it cannot be merged, or not into a model for transformers."""
    check(model, base)
    if is_converted(base):
        in_checkpoint(base, dequantize_model(load_as_stored(base)[0]))


def is_converted(base: Path) -> bool:
    """Whether a base has other arrays than transformers saves: it is quantized, or of MLX."""
    settings = text_settings(read_object(base / "config.json"))
    is_quantized = any(name.startswith("quantization") and value for name, value in settings)
    return is_quantized or transformers_names.is_written_by_mlx(base)


def sample_logits(model: nn.Module) -> np.ndarray:
    """The logits for some tokens less their mean, (tokens, vocabulary), float32."""
    model.eval()
    logits = model(mx.arange(1, 17)[None])[0].astype(mx.float32)
    logits = mx.where(mx.isfinite(logits), logits, 0)  # some are −∞, for tokens that never come
    return np.array(logits - logits.mean(axis=-1, keepdims=True))


# --- Writing ------------------------------------------------------------------------------------


def write(
    folder: Path, base: Path, adapter: Adapter, expected: np.ndarray, dequantize: bool
) -> None:
    """Write a whole model with the adapter in its weights.

    The base is loaded again as it is in its files, whose names and layouts are kept. Only the
    adapted layers change: where they were quantized, they are dequantized. With `dequantize` all
    layers are, and names and layouts are those of transformers. Raises UserError where the merged
    model does something else than the adapted one, whose `sample_logits` are `expected`.
    """
    model, used, _ = load_as_stored(base)
    loading.adapt(model, adapter, base, None)
    noise = max(NOISE[float_type(m.frozen)] for m in models.lora_modules(model).values())
    copy_others(base, folder)
    converted = is_converted(base)
    if converted:
        weights = rebuilt(folder, base, model, used, dequantize)
    else:
        weights = changed_arrays(base, adapter)
    model.clear()  # so that each array is freed when it is written
    write_weights(folder, weights, "mlx" if converted and not dequantize else "pt")
    distance = np.square(sample_logits(models.load(folder)[0]) - expected).mean(axis=-1)
    # The median over the tokens, for some of which a router may choose another expert.
    error = float(np.sqrt(np.median(distance / np.square(expected).mean(axis=-1))))
    if not error <= noise:
        raise UserError(
            "the merged model does not do what the adapted one does (its logits differ by "
            f"{error:.1%}), so it was not kept; please report this with the name of the model"
        )


EARLIER_TEMPLATE = "chat_template.base.jinja"


def copy_others(base: Path, folder: Path) -> None:
    """Copy the files of a base that are neither weights, nor tell of them, nor programs."""
    for file in {file for pattern in FILES for file in base.glob(pattern)}:
        if not file.name.endswith((".index.json", "hf_quant_config.json")):
            copy = folder / file.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def put_template(folder: Path, template: str) -> None:
    """Give a model another chat template; the one that it had is kept in a file beside it.

    Others that it had by names it still has.
    """
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    found = read_object(settings) if settings.exists() else {}
    earlier, of_processor = found.pop("chat_template", None), folder / "chat_template.json"
    if of_processor.exists():
        earlier = earlier or read_object(of_processor).get("chat_template")
        of_processor.unlink()
    if isinstance(earlier, list):  # several, by names
        others = {each["name"]: each["template"] for each in earlier}
        earlier, place = others.pop("default", None), folder / "additional_chat_templates"
        if others and not (file.exists() or place.exists()):  # which count more
            place.mkdir()
            for name, text in others.items():
                (place / f"{Path(name).name}.jinja").write_text(text, encoding="utf-8")
    if file.exists():
        earlier = file.read_text(encoding="utf-8")
    if isinstance(earlier, str):
        file.with_name(EARLIER_TEMPLATE).write_text(earlier, encoding="utf-8")
    write_json(settings, found)
    file.write_text(template, encoding="utf-8")
    hint(
        f"{file.name} puts questions below the headings that the texts had"
        + f"; the base's is in {EARLIER_TEMPLATE}" * isinstance(earlier, str)
    )


def write_weights(folder: Path, weights: Weights, written_by: str) -> None:
    """Write weights in shards of at most 5 GB, with an index; the weights are used up."""
    shards = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda array: array.nbytes,
        filename_pattern="model{suffix}.safetensors",
    )
    for file, names in shards.filename_to_tensors.items():
        shard = {name: weights.pop(name) for name in names}
        mx.save_safetensors(str(folder / file), shard, {"format": written_by})
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    write_json(folder / "model.safetensors.index.json", index)


def rebuilt(folder: Path, base: Path, model: nn.Module, used: dict, dequantize: bool) -> Weights:
    """The weights of a merged model as MLX has it; dequantized, as transformers has it.

    Its configuration is written; `used` has the quantization that mlx-lm found in the base.
    """
    layers = {path: module.merged() for path, module in models.lora_modules(model).items()}
    model.update_modules(tree_unflatten(list(layers.items())))
    config = read_object(base / "config.json")
    config = {name: value for name, value in config.items() if not name.startswith("quantization")}
    if "quantization" in used and not dequantize:
        quantization = used["quantization"] | dict.fromkeys(layers, False)
        config |= {"quantization": quantization, "quantization_config": quantization}
    write_json(folder / "config.json", config)
    if dequantize:
        return in_checkpoint(base, dequantize_model(model))
    return dict(tree_flatten(model.parameters()))


# --- Names and layouts --------------------------------------------------------------------------


def changed_arrays(base: Path, adapter: Adapter) -> Weights:
    """The arrays in a base's files with the updates of an adapter.

    mlx-lm renames, turns, joins and splits arrays when it loads them (`sanitize`). The way back is
    the gradient of that with the updates as cotangents, since numbers are only put elsewhere. Sums
    are made in float32 and rounded once, to the type of the array.
    """
    arrays, config = read_weights(base), read_object(base / "config.json")
    # The gradient has the multiplier once more in it, and not once less.
    updates = {
        path: models.update(mx.array(a), mx.array(b)) / multiplier(config, path) ** 2
        for path, (a, b) in adapter.items()
    }
    names = [name for name, array in arrays.items() if mx.issubdtype(array.dtype, mx.floating)]
    wide = [arrays[name].astype(mx.float32) for name in names]

    def weights(*values: mx.array) -> list[mx.array]:
        made = as_loaded(base, arrays | dict(zip(names, values, strict=True)))
        return [made[f"{path}.weight"] for path in updates]

    _, gradients = mx.vjp(weights, wide, list(updates.values()))
    changed = [array + gradient for array, gradient in zip(wide, gradients, strict=True)]
    return arrays | {n: a.astype(arrays[n].dtype) for n, a in zip(names, changed, strict=True)}


def in_checkpoint(base: Path, model: nn.Module) -> Weights:
    """The weights of a base's model by the names and in the layouts of transformers' checkpoints.

    Raises ValueError where they are not known.
    """
    config, weights = read_object(base / "config.json"), dict(tree_flatten(model.parameters()))
    model_type = config["model_type"]
    if left := [path for path, module in model.named_modules() if "scales" in module]:
        raise ValueError(f"mlx-lm cannot dequantize {abbreviated(left)}")
    known = set(transformers_names.MODEL_TYPES) - transformers_names.ONE_WAY
    # Of a model with a text_config, mlx-lm reads only the language model.
    if "text_config" in config or model_type not in known:
        raise ValueError(f"how transformers has the weights of {model_type} models is not known")
    zeros = {name: mx.zeros_like(array) for name, array in weights.items()}
    again = as_loaded(base, moved_arrays(model_type, zeros))
    if wrong := [n for n in zeros if n not in again or again[n].shape != zeros[n].shape]:
        raise ValueError(f"how transformers has {abbreviated(wrong)} of {base} is not known")
    # What is not 0 then, mlx-lm adds itself: 1 to some norms.
    weights = {name: a - again[name] if a.ndim == 1 else a for name, a in weights.items()}
    return moved_arrays(model_type, weights)


def moved_arrays(model_type: str, weights: Weights) -> Weights:
    """Weights as in a checkpoint: experts one by one, kernels of convolutions last."""
    found = {}
    for name, array in weights.items():
        there = transformers_names.checkpoint_name(model_type, name)
        if array.ndim == 3 and (expert := re.fullmatch(r"(.*\.experts)(\.\w+\.weight)", there)):
            found |= {f"{expert[1]}.{n}{expert[2]}": each for n, each in enumerate(array)}
        elif model_type == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight$", there):
            found[there] = array.T
        elif array.ndim == 3 and "conv" in name:
            found[there] = array.moveaxis(2, 1)
        else:
            found[there] = array[None] if name.endswith((".alpha_n", ".alpha_p")) else array
    for name in list(found):
        if gate := re.fullmatch(r"(.*\.(?:input_linear|gate_up_proj))\.gate(\.weight)?", name):
            up = found.pop(f"{gate[1]}.up{gate[2] or ''}")
            found[f"{gate[1]}{gate[2] or ''}"] = mx.concatenate([found.pop(name), up], axis=-2)
        elif name.endswith(".embed_q.weight"):  # the keys' rows of kv_b_proj, by heads
            values = found.pop(name.replace(".embed_q.", ".unembed_out."))
            both = mx.concatenate([found.pop(name).swapaxes(1, 2), values], axis=1)
            found[name.replace(".embed_q.", ".kv_b_proj.")] = both.flatten(0, 1)
    return found
