"""Rotary embeddings of a loaded model, replaced by rope.py's where they differ from PyTorch's.

mlx-lm leaves out the scalings of many models, and some settings of others. What a layer's module
does to positions is measured by calling it, so one rule serves all kinds of modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lora_finetune.base.errors import warn
from lora_finetune.mlx_patches.rope import Rope, Rotary, yarn_mscale
from lora_finetune.model_folder.config import pytorch_program, pytorch_settings
from lora_finetune.model_folder.files import shortened

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PretrainedConfig

# The attribute for nanochat's periods, which are negative since it rotates the other way.
PERIODS = "_rope_freqs"


def load(
    build: Callable[[dict[str, Any]], tuple[nn.Module, Any]],
    words: dict[str, Any],
    theirs: PretrainedConfig | None,
) -> tuple[nn.Module, Any]:
    """A model that mlx-lm builds, with positions as PyTorch computes them.

    Some models of mlx-lm refuse a scaling, or fail where there is none: these are built with one
    that changes nothing, and corrected afterwards. So are those whose scaling depends on the length
    of a text, which is always replaced, and mlx-lm's longrope, which loses the layout of the pairs.

    Args:
        build: makes a model, and something else that is returned, of a configuration.
        words: the configuration as mlx-lm has it.
        theirs: the settings of the text model as transformers has them, None where it has none.

    Raises:
        ValueError: the rope_type is not known.
    """
    if not getattr(theirs, "rope_parameters", None):
        return build(words)
    scaling, found = str(scalings(words)), None
    if "'alpha'" in scaling or not re.search("'(longrope|su|dynamic)'", scaling):
        with suppress(Exception):
            found = build(words)
    found = found or build(without_scaling(words))
    correct(found[0], theirs)
    return found


def correct(model: nn.Module, config: Any) -> None:
    """Replace what rotates otherwise than a configuration of transformers says.

    Layers that do not rotate stay so. A warning tells where something cannot be replaced.
    """
    kinds, rotaries, doubtful = getattr(config, "layer_types", None) or [], {}, set()
    for path, attention in model.named_modules():
        if re.search("vision|visual|audio", path) or not has_rope(attention):
            continue
        number = re.search(r"\.(\d+)\.", f"{path}.")
        layer = int(number[1]) if number else 0
        kind = kinds[layer] if layer < len(kinds) else None
        if kind not in rotaries:
            rotaries[kind] = of_layer(config, layer, kind)
        if rotaries[kind] and not correct_layer(attention, config, rotaries[kind]):
            doubtful.add(rotaries[kind].kind)
    if doubtful:
        warn(
            "the rotary embedding of this kind of model cannot be replaced in mlx-lm, so with the "
            f"rope_type of its config.json ({', '.join(sorted(doubtful))}) long texts may be "
            "computed otherwise than by PyTorch"
        )


def has_rope(attention: nn.Module) -> bool:
    return bool(rope_names(attention)) or PERIODS in attention


def rope_names(attention: nn.Module) -> list[str]:
    """The attributes of a layer that are modules to rotate with."""
    found = attention.children().items()
    return [n for n, m in found if isinstance(m, nn.Module) and re.search("rope|rotary", n)]


def correct_layer(attention: nn.Module, config: Any, rotary: Rotary) -> bool:
    """Correct the rotation in one layer; False where it cannot be replaced, or not be measured."""
    latent = hasattr(attention, "qk_rope_head_dim")  # keys as DeepSeek's
    pairs = getattr(config, "rope_interleave", None) if latent else None
    done = [correct_module(attention, name, rotary, pairs) for name in rope_names(attention)]
    for name in ("scale", "softmax_scale") if latent else ():
        scale = attention_scale(config, rotary)
        if hasattr(attention, name) and not math.isclose(
            getattr(attention, name), scale, rel_tol=1e-6
        ):
            setattr(attention, name, scale)
    if PERIODS in attention:  # the norms that follow take any scale away
        periods = mx.sign(attention[PERIODS]) * rotary.periods(0)
        if not mx.allclose(attention[PERIODS], periods, rtol=1e-5):
            attention[PERIODS] = periods
        done.append(rotary.boundary == math.inf)
    return all(done)


def correct_module(attention: nn.Module, name: str, rotary: Rotary, pairs: bool | None) -> bool:
    """Put ours in the place of a module, unless it does the same, or does not rotate at all.

    Args:
        pairs: whether neighbouring dimensions form a pair (`traditional`), where the configuration
            says so; None: as in the module.
    """
    try:
        traditional = is_traditional(attention[name], rotary)
    except (TypeError, ValueError):
        return False
    if traditional is not None:
        rope = Rope(rotary, traditional if pairs is None else pairs)
        # Only ours knows how long a text is without its padding.
        if rotary.boundary < math.inf or not same(attention[name], rope):
            attention[name] = rope
    return True


def read_settings(config: dict[str, Any]) -> PretrainedConfig | None:
    """As `pytorch_settings`, None too where it fails; with a warning if positions are scaled."""
    try:
        return pytorch_settings(config)
    except Exception as error:  # transformers may raise anything
        if any(scalings(config)):
            warn(
                f"transformers cannot read this model's config.json ({shortened(error)}), so "
                "nothing tells whether mlx-lm scales positions as the model was trained with"
            )
        return None


def of_layer(config: Any, layer: int, kind: str | None) -> Rotary | None:
    """How a layer of that number and kind rotates; None where the configuration does not say."""
    settings = config.rope_parameters
    truncate = settings.get("truncate", True)  # transformers looks for it only here
    if config.nested_rope_parameter_keys(settings):
        settings = settings.get(kind)
        if not settings:
            return None
    if config.is_heterogeneous:
        config = config.per_layer_config[layer]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = settings.get("partial_rotary_factor", 1.0)
    # Without a scaling, most of transformers' models rotate the whole head whatever it says.
    is_read = settings["rope_type"] != "default" or "partial_rotary" in pytorch_program(config)
    whole = settings["rope_type"] == "proportional" or not is_read
    dims = size if whole else int(size * share)
    return Rotary(
        settings | {"truncate": truncate}, dims, getattr(config, "max_position_embeddings", 0)
    )


def attention_scale(config: Any, rotary: Rotary) -> float:
    """What attention with latent keys multiplies its scores by, DeepSeek's and its like."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    weight = rotary.settings.get("mscale_all_dim")
    is_scaled = weight and rotary.kind != "default"
    return scale * yarn_mscale(rotary.factor, weight) ** 2 if is_scaled else scale


def turned(module: nn.Module, dims: int, positions: tuple[int, ...]) -> list[np.ndarray]:
    """The rotation matrices (dims, dims) of a module at some positions; rows are inputs."""
    with mx.stream(mx.cpu):  # a GPU would have kernels to compile
        vectors = mx.eye(dims)[None, :, None]
        results = [module(vectors, offset=position)[0, :, 0] for position in positions]
        mx.eval(results)
    return [np.array(result) for result in results]


def width_of(module: nn.Module, rotary: Rotary) -> int:
    return max(rotary.dims, getattr(module, "dims", None) or getattr(module, "dim", None) or 0)


def is_traditional(module: nn.Module, rotary: Rotary) -> bool | None:
    """Whether a module turns neighbours as a pair; None where it turns nothing."""
    [result] = turned(module, width_of(module, rotary), (1,))
    partners = np.flatnonzero(np.abs(result[0, 1:]) > 1e-4)
    return bool(partners[0] == 0) if len(partners) else None


# The rotations at these positions determine any frequency to a few millionths.
POSITIONS = tuple(16**power for power in range(6))


def same(module: nn.Module, rope: Rope) -> bool:
    """Whether a module rotates as ours does, up to the rounding of large angles in float32."""
    width = width_of(module, rope.rotary)
    pairs = zip(*(turned(each, width, POSITIONS) for each in (module, rope)), strict=True)
    for position, (found, expected) in zip(POSITIONS, pairs, strict=True):
        angles = position * np.array(1 / rope.rotary.periods(position + 1))
        angles = np.repeat(angles, 2) if rope.traditional else np.tile(angles, 2)
        allowed = 2e-5 * (1 + np.pad(angles, (0, width - rope.dims)))
        if (np.abs(found - expected) > allowed).any():
            return False
    return True


# A scaling that changes nothing, with every key that some model of mlx-lm requires.
NEUTRAL = {"type": "linear", "rope_type": "linear", "factor": 1.0, "alpha": 1.0}
NEUTRAL |= {"short_factor": 1.0, "long_factor": 1.0, "short_mscale": 1.0, "long_mscale": 1.0}


def scalings(config: dict[str, Any]) -> list[Any]:
    names = ("rope_scaling", "rope_parameters")
    text = config.get("text_config")
    return [config.get(n) for n in names] + (scalings(text) if isinstance(text, dict) else [])


def without_scaling(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with NEUTRAL in the place of every scaling, or of none."""
    changed = config | {"rope_scaling": NEUTRAL}
    parameters, text = config.get("rope_parameters"), config.get("text_config")
    if isinstance(parameters, dict):
        kinds = {
            name: each | NEUTRAL for name, each in parameters.items() if isinstance(each, dict)
        }
        changed["rope_parameters"] = parameters | (kinds or NEUTRAL)
    if isinstance(text, dict):
        changed["text_config"] = without_scaling(text)
    return changed
