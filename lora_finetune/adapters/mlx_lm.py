"""An adapter as mlx_lm.lora writes it: adapters.safetensors, and the scale beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
from lora_finetune.adapters.npz import Adapter, Arrays, named
from lora_finetune.base.files import write_json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

FILE = "adapters.safetensors"


def read(file: Path, arrays: Arrays, config: dict[str, Any]) -> Arrays:
    """The arrays of an adapter for scale 20; raises LookupError or TypeError without its own."""
    scale = np.float32(config["lora_parameters"]["scale"] / models.SCALE)
    return {name: a * scale if name.endswith(".lora_b") else a for name, a in arrays.items()}


def check(model: nn.Module, base: Path) -> None:
    """Raise ValueError where mlx-lm has no LoRA: routers, and layers of a model's own kind."""
    for path, module in models.lora_modules(model).items():
        kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
        if not isinstance(module.frozen, kinds) or hasattr(module.frozen, "to_lora"):
            raise ValueError(f"mlx-lm has no LoRA for {path}, which is no plain linear layer")


def write(
    folder: Path, adapter: Adapter, layers: list[str], base: str, revision: str | None = None
) -> None:
    """Write an adapter of the model `base`, with layers at these paths, first to last.

    mlx-lm adapts the modules of certain names in the last layers.
    """
    adapter, rank = of_one_rank(adapter)
    starts = [f"{layer}." for layer in layers]
    keys = {path.removeprefix(next(filter(path.startswith, starts), "")) for path in adapter}
    adapted = [n for n, start in enumerate(starts) if any(p.startswith(start) for p in adapter)]
    config = {
        "model": base,
        "revision": revision,
        "fine_tune_type": "lora",
        "num_layers": len(layers) - min(adapted, default=len(layers)),
        "lora_parameters": {
            "rank": rank,
            "scale": models.SCALE,
            "alpha": models.SCALE * rank,  # for Ollama, which knows no scale
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    write_files(folder / FILE, named(adapter), "mlx", config)


def of_one_rank(adapter: Adapter) -> tuple[Adapter, int]:
    """The same updates, all of the highest rank, and that: the others get zeros."""
    rank = max(a.shape[1] for a, _ in adapter.values())
    return {
        path: (padded(a, 1, rank), padded(b, 0 if b.ndim == 2 else 2, rank))
        for path, (a, b) in adapter.items()
    }, rank


def padded(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    """An array with zeros behind it on an axis, up to a length."""
    pads = [(0, 0)] * array.ndim
    pads[axis] = (0, length - array.shape[axis])
    return np.pad(array, pads)


def write_files(file: Path, arrays: Arrays, written_by: str, config: dict[str, Any]) -> None:
    """Write a .safetensors file, and adapter_config.json beside it."""
    arrays = {name: mx.array(array) for name, array in arrays.items()}
    mx.save_safetensors(str(file), arrays, {"format": written_by})
    write_json(file.with_name("adapter_config.json"), config)
