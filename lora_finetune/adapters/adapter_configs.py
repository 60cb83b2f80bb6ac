"""The adapter_config.json of mlx-lm and PEFT, and PEFT's names, layouts and scales."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import models
from lora_finetune.base.errors import UserError, warn
from lora_finetune.base.files import atomic_write

import numpy as np

CONFIG = "adapter_config.json"


def read_config(file: Path) -> dict[str, Any] | None:
    """The adapter_config.json beside an adapter, None where there is none."""
    config = file.with_name(CONFIG)
    if not config.is_file():
        return None
    try:
        return dict(json.loads(config.read_bytes()))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{config} is not a whole JSON object; copy it again") from None


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration of the adapter in a folder."""
    with atomic_write(folder / CONFIG) as [stream]:
        stream.write(json.dumps(config, indent=2, ensure_ascii=False).encode())


def mlx_lm_scale(file: Path, config: dict[str, Any] | None) -> float:
    """The scale by the configuration of mlx_lm.lora; 20, with a warning, where there is none."""
    if config is None:
        warn(f"there is no {CONFIG} beside {file}, so its scale is taken to be {models.SCALE:g}")
        return models.SCALE
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(f"{file} is of mlx-lm's fine-tune type {kind!r}; only lora can be read")
    try:
        return float(config["lora_parameters"]["scale"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(
            f"{file.with_name(CONFIG)} names no scale under lora_parameters, as mlx-lm's does"
        ) from None


# How PEFT names A and B, in some versions with the name of the adapter, "default".
PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(\.default)?\.weight")

# Settings of PEFT under which an adapter is more, or something else, than A and B.
PEFT_OTHER = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save")
PEFT_OTHER += ("layer_replication", "alora_invocation_tokens", "trainable_token_indices")
PEFT_OTHER += ("kasa_config", "monteclora_config", "arrow_config")
PEFT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def from_peft(
    file: Path, arrays: dict[str, np.ndarray], config: dict[str, Any] | None
) -> dict[str, np.ndarray]:
    """The arrays of an adapter of PEFT, as mlx-lm names and shapes them, for scale 20.

    Its A is (r, d_in) and its B (d_out, r); its scale is lora_alpha / r, with rsLoRA
    lora_alpha / sqrt(r).

    Raises:
        UserError: it is something other than LoRA, or no configuration tells its scale.
    """
    if config is None:
        raise UserError(f"there is no {CONFIG} beside {file}, which tells the scale of PEFT's LoRA")
    where = file.with_name(CONFIG)
    found = {}
    try:
        check_peft(where, config)
        for name, array in arrays.items():
            match = PEFT_NAME.fullmatch(name)
            if not match or array.ndim != 2:
                raise UserError(f"{file} holds {name}, which is not LoRA of a linear layer")
            path, which = match[1], match[2].lower()
            if which == "b":
                scale = peft_scale(path, array.shape[1], config)
                array = array * np.float32(scale / models.SCALE)
            found[f"{path}.lora_{which}"] = array.T
    except (TypeError, ValueError, AttributeError, ArithmeticError, re.error):
        raise UserError(f"{where} is not as PEFT writes it; copy it again") from None
    return found


def check_peft(where: Path, config: dict[str, Any]) -> None:
    """Raise UserError where a configuration of PEFT is of more, or of something else, than LoRA."""
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{where} has peft_type {kind!r}; only LORA can be read")
    for name in PEFT_OTHER:
        if config.get(name):
            raise UserError(f"{where} has {name}, which is more than plain LoRA; it cannot be read")
    if config.get("bias") not in (None, "none"):
        raise UserError(f"{where} has bias {config['bias']!r}; biases cannot be read")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(PEFT_CHANGES_BASE):
        raise UserError(
            f"{where} has init_lora_weights {start!r}, for which PEFT changed the base weights; "
            "convert it to plain LoRA there (path_initial_model_for_weight_conversion)"
        )
    if alone := set(config.get("rank_pattern") or {}) - set(config.get("alpha_pattern") or {}):
        raise UserError(f"{where} has a rank_pattern without its alpha_pattern: {min(alone)}")
    for pattern in config.get("alpha_pattern") or {}:
        if len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
            raise UserError(f"{where} has the alpha_pattern {pattern!r}, too involved to be read")
    if type(config.get("lora_alpha")) not in (int, float):
        raise UserError(f"{where} has no lora_alpha, which tells the scale")


def peft_scale(path: str, rank: int, config: dict[str, Any]) -> float:
    """The scale of one layer, whose lora_alpha a pattern may set."""
    patterns = config.get("alpha_pattern") or {}
    fitting = (a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    alpha = next(fitting, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
