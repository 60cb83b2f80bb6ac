"""An adapter as PEFT writes it, which vLLM and llama.cpp read too.

Its A is (r, d_in) and its B (d_out, r); its scale is lora_alpha / r, or lora_alpha / sqrt(r) with
rsLoRA.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import models
from lora_finetune.adapters.mlx_lm import of_one_rank, write_files
from lora_finetune.adapters.npz import Adapter, Arrays
from lora_finetune.base.errors import UserError, abbreviated, hint
from lora_finetune.model_folder import transformers_names
from lora_finetune.model_folder.files import read_object
from lora_finetune.model_folder.targets import ROUTERS, is_expert
from lora_finetune.model_folder.weights import read_weights

import mlx.nn as nn
import numpy as np

FILE = "adapter_model.safetensors"

# The names of A and B, in some versions with that of the adapter, "default".
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(\.default)?\.weight")

# What transformers has as rows of one layer, and mlx-lm as a layer.
FUSED = re.compile(r"\.(gate_up_proj|input_linear)\.(gate|up)$")

# Initializations for which PEFT changes the weights of the base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read(file: Path, arrays: Arrays, config: dict[str, Any]) -> Arrays:
    """The arrays of an adapter as mlx-lm names and shapes them, for scale 20.

    Raises UserError where it is more than LoRA, and other errors where its scale is not known.
    """
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: for its init_lora_weights, {start!r}, PEFT changed the base weights; convert "
            "it to plain LoRA there (path_initial_model_for_weight_conversion)"
        )
    found = {}
    for name, array in arrays.items():
        match = NAME.fullmatch(name)
        if not match:
            raise UserError(f"{file} holds {name}, which is not of plain LoRA; only that is read")
        path, which = match[1], match[2].lower()
        if which == "b":
            array = array * np.float32(scale(path, array.shape[1], config) / models.SCALE)
        found[f"{path}.lora_{which}"] = array.T
    return found


def scale(path: str, rank: int, config: dict[str, Any]) -> float:
    """The scale of one layer, whose lora_alpha a pattern may set."""
    patterns = config.get("alpha_pattern") or {}
    fitting = (a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    alpha = next(fitting, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def module_names(model: nn.Module, base: Path) -> dict[str, str]:
    """The names of transformers' modules, which PEFT adapts, by the paths of the adapted layers.

    Where transformers has no such model in its own code, these are the names of the checkpoint.
    Raises ValueError where they are not known, or LoRA has no effect there.
    """
    paths, model_type = models.lora_modules(model), read_object(base / "config.json")["model_type"]
    if experts := [path for path, module in paths.items() if is_expert(path, module.frozen)]:
        raise ValueError(f"PEFT has no LoRA of {experts[0]} alone; leave out --targets experts")
    if unused := [p for p in paths if transformers_names.is_unused(model_type, p)]:
        raise ValueError(f"in PEFT LoRA of {unused[0]} has no effect")
    if model_type in transformers_names.MODEL_TYPES:
        names = {path: transformers_names.module_name(model_type, path) for path in paths}
        if fused := [path for path, name in names.items() if FUSED.search(name)]:
            raise ValueError(f"transformers has {fused[0]} in one layer with another")
        return names
    arrays = {} if transformers_names.is_written_by_mlx(base) else read_weights(base)
    for path in paths:
        if f"{path}.weight" not in arrays:
            raise ValueError(f"it is not known what transformers calls {path} of {model_type}")
    return {path: path for path in paths}


def write(
    folder: Path, adapter: Adapter, base: str, revision: str | None = None,
    has_experts: bool = False,
) -> None:  # fmt: skip
    """Write an adapter of the model `base`, by the names of transformers' modules."""
    adapter, rank = of_one_rank(adapter)
    arrays = {}
    for path, (a, b) in adapter.items():
        arrays[f"base_model.model.{path}.lora_A.weight"] = a.T
        arrays[f"base_model.model.{path}.lora_B.weight"] = b.T
    # In transformers a router is no linear layer, and PEFT adapts the parameter. In models with
    # experts, as modules it would take these layers of all MLPs for the experts'.
    others = ("gate_proj", "up_proj", "down_proj") if has_experts else ()
    parameters = [path for path in adapter if path.rpartition(".")[2] in (*ROUTERS, *others)]
    if parameters:
        hint(
            f"PEFT takes {abbreviated(parameters)} as target_parameters; other tools, and versions "
            "of transformers that name them otherwise, may leave them out"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": int(models.SCALE * rank),
        "lora_dropout": 0.0,
        "target_modules": [path for path in adapter if path not in parameters],
        "target_parameters": [f"{path}.weight" for path in parameters] or None,
        "bias": "none",
    }
    write_files(folder / FILE, arrays, "pt", config)
