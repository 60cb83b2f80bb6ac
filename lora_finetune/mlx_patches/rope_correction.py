"""The ropes of a loaded model, replaced by rope.py's where they differ from PyTorch's.

mlx-lm leaves out the scalings of many models, and some settings of others. Each rope is called on
unit vectors and compared with ours, so one rule serves all kinds of modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from lora_finetune.base.errors import warn
from lora_finetune.mlx_patches.rope import Rope, Rotary, yarn_mscale
from lora_finetune.model_folder.model_config import pytorch_program, pytorch_settings
from lora_finetune.model_folder.model_folder import shortened

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PretrainedConfig


def load(
    build: Callable[[dict[str, Any]], tuple[nn.Module, Any]],
    words: dict[str, Any],
    theirs: PretrainedConfig | None,
) -> tuple[nn.Module, Any]:
    """A model, and what else `build` makes of a configuration, with positions as in PyTorch.

    Some models of mlx-lm refuse a scaling, or fail where there is none: these are built with one
    that changes nothing. So are those with longrope, for which mlx-lm loses the layout of pairs.

    Args:
        words: the configuration as mlx-lm has it.
        theirs: the settings of the text model as transformers has them, None where it has none.
    """
    if not getattr(theirs, "rope_parameters", None):
        return build(words)
    try:
        if re.search("'(longrope|su)'", str(scalings(words))):
            words = without_scaling(words)
        found = build(words)
    except Exception:
        found = build(without_scaling(words))
    correct(found[0], theirs)
    return found


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


def correct(model: nn.Module, config: PretrainedConfig) -> None:
    """Replace what rotates otherwise than a configuration says, or warn."""
    kinds, rotaries, done = getattr(config, "layer_types", None) or [], {}, []
    for path, attention in model.named_modules():
        names = [n for n, m in attention.children().items() if isinstance(m, nn.Module)]
        names = [name for name in names if re.search("rope|rotary", name)]
        if not names or re.search("vision|visual|audio", path):
            continue
        number = re.search(r"\.(\d+)\.", f"{path}.")
        layer = int(number[1]) if number else 0
        kind = kinds[layer] if layer < len(kinds) else None
        if kind not in rotaries:
            rotaries[kind] = of_layer(config, layer, kind)
        if rotaries[kind]:
            done += [correct_rope(attention, name, rotaries[kind], config) for name in names]
    settings = config.rope_parameters
    nested = [settings[kind] for kind in config.nested_rope_parameter_keys(settings)]
    types = {each["rope_type"] for each in nested or [settings]}
    if not all(done) or not done and types != {"default"}:
        warn(
            "the rotary embedding of this kind of model cannot be replaced in mlx-lm, so with the "
            f"rope_type of its config.json ({', '.join(sorted(types))}) long texts may be computed "
            "otherwise than by PyTorch"
        )


def of_layer(config: PretrainedConfig, layer: int, kind: str | None) -> Rotary | None:
    """How a layer of that number and kind rotates; None where the configuration does not say."""
    settings = config.rope_parameters
    truncate = settings.get("truncate", True)  # transformers looks for it only here
    if config.nested_rope_parameter_keys(settings):
        settings = settings.get(kind)
        if not settings:
            return None
    if config.is_heterogeneous:
        config = config.per_layer_config[layer]
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Without a scaling, most of transformers' models rotate the whole head whatever it says.
    is_read = settings["rope_type"] != "default" or "partial_rotary" in pytorch_program(config)
    if is_read and settings["rope_type"] != "proportional":
        dims = int(dims * settings.get("partial_rotary_factor", 1.0))
    length = getattr(config, "max_position_embeddings", 0)
    return Rotary(settings | {"truncate": truncate}, dims, length)


def correct_rope(attention: nn.Module, name: str, rotary: Rotary, config: PretrainedConfig) -> bool:
    """Put ours in the place of a rope that rotates otherwise; False where it cannot be measured."""
    rope = attention[name]
    width = max(rotary.dims, getattr(rope, "dims", None) or getattr(rope, "dim", None) or 0)
    try:
        found = rotations(rope, width)
    except (TypeError, ValueError):
        return False
    partners = np.flatnonzero(np.abs(found[0, 0, 1:]) > 1e-4)
    if not len(partners):
        return True
    traditional = bool(partners[0] == 0)
    if hasattr(attention, "qk_rope_head_dim"):  # latent keys, as DeepSeek's
        if getattr(config, "rope_interleave", None) is not None:
            traditional = config.rope_interleave
        scale_scores(attention, rotary, config)
    ours = Rope(rotary, traditional)
    # Only ours knows how long a text is without its padding.
    if rotary.boundary < math.inf or not agrees(found, ours, width):
        attention[name] = ours
    return True


def scale_scores(attention: nn.Module, rotary: Rotary, config: PretrainedConfig) -> None:
    """Put YaRN's mscale into the scale of latent attention, where some of mlx-lm's leave it out."""
    weight = rotary.settings.get("mscale_all_dim")
    if weight and rotary.kind != "default":
        name = "scale" if hasattr(attention, "scale") else "softmax_scale"
        size = config.qk_nope_head_dim + config.qk_rope_head_dim
        setattr(attention, name, size**-0.5 * yarn_mscale(rotary.factor, weight) ** 2)


# The rotations at these positions determine any frequency to a few millionths.
POSITIONS = 16 ** np.arange(6)


def rotations(rope: nn.Module, width: int) -> np.ndarray:
    """The matrices (positions, width, width) by which a rope rotates; rows are inputs."""
    with mx.stream(mx.cpu):  # a GPU would have kernels to compile
        vectors = mx.eye(width)[None, :, None]
        return np.array(mx.stack([rope(vectors, offset=n)[0, :, 0] for n in POSITIONS.tolist()]))


def agrees(found: np.ndarray, rope: Rope, width: int) -> bool:
    """Whether rotations are ours, up to the rounding of large angles in float32."""
    angles = POSITIONS[:, None] * np.array(rope.rotary.frequencies(0))
    angles = np.repeat(angles, 2, axis=1) if rope.traditional else np.tile(angles, 2)
    allowed = 2e-5 * (1 + np.pad(angles, ((0, 0), (0, width - rope.dims))))
    return bool((np.abs(found - rotations(rope, width)) <= allowed[:, None]).all())


# A scaling that changes nothing, with every key that some model of mlx-lm requires.
NEUTRAL = {"type": "linear", "rope_type": "linear", "factor": 1.0, "alpha": 1.0}
NEUTRAL |= {"short_factor": 1.0, "long_factor": 1.0, "short_mscale": 1.0, "long_mscale": 1.0}


def scalings(config: dict[str, Any]) -> list[Any]:
    text = config.get("text_config")
    found = [config.get("rope_scaling"), config.get("rope_parameters")]
    return found + (scalings(text) if isinstance(text, dict) else [])


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
