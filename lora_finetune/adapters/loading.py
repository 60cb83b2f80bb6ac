"""An adapter from its file, in one of three forms, into a model."""

from __future__ import annotations

import re
from pathlib import Path

import models
from lora_finetune.adapters import mlx_lm, npz, peft
from lora_finetune.adapters.npz import Adapter, named
from lora_finetune.base.errors import UserError, warn
from lora_finetune.model_folder.files import read_object
from lora_finetune.model_folder.targets import (
    ROLES,
    find_targets,
    is_linear,
    is_stacked,
    last_layers,
    layer_paths,
    linear_shape,
    projections,
    roles_at,
    roles_of,
)
from lora_finetune.model_folder.transformers_names import MODEL_TYPES, checkpoint_name, module_name

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def find_adapter(path: Path) -> Path:
    """The adapter file that a path means: itself, or the one in a folder of mlx-lm or PEFT."""
    if not path.is_dir():
        return path
    for name in (mlx_lm.FILE, peft.FILE):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} is a folder without {mlx_lm.FILE}; name the file of an adapter")


def read_adapter(file: Path) -> Adapter:
    """An adapter, for scale 20, from an .npz file or a .safetensors file of mlx-lm or PEFT.

    Raises UserError: no such file, not a whole one, not pairs of matrices, or not plain LoRA.
    """
    if not file.is_file():
        raise UserError(f"there is no adapter file {file}; name one that a run has saved")
    arrays = npz.read_arrays(file)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error
        if file.suffix == ".safetensors":
            form = peft if any(name.startswith("base_model.") for name in arrays) else mlx_lm
            config = file.with_name("adapter_config.json")
            try:
                arrays = form.read(file, arrays, read_object(config))
            except (LookupError, TypeError, AttributeError, ArithmeticError, re.error):
                raise UserError(f"{config} does not tell the scale; copy it again") from None
        return npz.pair_arrays(file, arrays)


def adapt(
    model: nn.Module, adapter: Adapter, source: Path | None, lora_layers: int | None,
    rank: int | None = None, scale: float = models.SCALE, targets: str | None = None,
) -> str:  # fmt: skip
    """Put LoRA into a model: where the adapter read from `source` has it, or in the last layers.

    With an adapter, for this scale, and `lora_layers` or `targets` too, what it lacks of those
    starts fresh, with this rank (default: the adapter's, else 8). Raises UserError where the
    adapter is not for this model, or has more than those.

    Returns:
        The roles that are adapted, as `targets` names them.
    """
    adapter = placed(source, adapter, model)
    ranks = {path: a.shape[1] for path, (a, _) in adapter.items()}
    for own in ranks.values():
        if rank not in (None, own):
            raise UserError(f"{source} has rank {own}, not --lora-rank {rank}; leave that out")
    if lora_layers is not None or targets is not None:
        ranks = with_fresh(model, ranks, source, lora_layers, targets, rank)
    roles = set().union(*roles_at(model, ranks).values())
    models.add_lora(model, ranks, scale)
    weights = [(name, mx.array(array)) for name, array in named(adapter).items()]
    model.load_weights(weights, strict=False)
    return ",".join(role for role in ROLES if role in roles)


def with_fresh(
    model: nn.Module, ranks: dict[str, int], source: Path, lora_layers: int | None,
    targets: str | None, rank: int | None,
) -> dict[str, int]:  # fmt: skip
    """The ranks of an adapter's layers, and of those that start fresh in the last layers.

    What is not given, layers or targets, is that of the adapter.
    """
    roles, layers = roles_at(model, ranks), layer_paths(model)
    if lora_layers is None:
        adapted = [any(path.startswith(f"{layer}.") for path in ranks) for layer in layers]
        lora_layers = len(layers) - (adapted.index(True) if any(adapted) else 0)
    if lora_layers > len(layers):
        warn(f"the model has only {len(layers)} layers; all of them are adapted")
    last = last_layers(model, lora_layers)
    if outside := [path for path in ranks if not path.startswith(last)]:
        raise UserError(
            f"{source} adapts {outside[0]}, which is not in the last {lora_layers} layers; "
            "raise --lora-layers, or leave it out to adapt what the file does"
        )
    if targets and (outside := [path for path in ranks if not roles[path] & roles_of(targets)]):
        raise UserError(
            f"{source} adapts {outside[0]}, which is not of --targets {targets}; name more, or "
            "leave it out to adapt what the file does"
        )
    rank = rank or next(iter(ranks.values()), models.RANK)
    targets = targets or ",".join(set().union(*roles.values())) or "qv"
    wanted = dict.fromkeys(find_targets(model, lora_layers, targets), rank)
    # Slices such as qkv_proj.q are not adapted again where the whole projection is.
    wanted = {path: rank for path in wanted if path.rpartition(".")[0] not in ranks}
    if ranks and (fresh := wanted.keys() - ranks.keys()):
        warn(f"{source} lacks {len(fresh)} of {len(wanted)} adapted layers; they start fresh")
    return wanted | ranks


def placed(file: Path, adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter by the paths of a model; raises UserError where some of it has none there."""
    layers = [(p, m) for p, m in model.named_modules() if is_linear(m) or is_stacked(m)]
    shapes = {path: linear_shape(module) for path, module in layers}
    shapes |= {path: each.shape for path, each in projections(model).items()}
    if not adapter.keys() <= shapes.keys():
        adapter = under_our_names(adapter, list(shapes))
    wrong = []
    for path, (a, b) in adapter.items():
        shape = (b.shape[1], a.shape[0]) if a.ndim == 2 else (*b.shape[:2], a.shape[2])
        if path not in shapes:
            wrong.append(f"there is no linear layer {path}")
        elif shape != shapes[path]:
            d_out, d_in = shapes[path][-2:]
            its = f"its A and B {shape[-1]} to {shape[-2]}"
            wrong.append(f"{path} maps {d_in} to {d_out} numbers, {its}")
    if wrong:
        raise UserError(
            f"{file} is not for this model: {'; '.join(wrong[:3])}; name its model with --model, "
            "or another adapter with --adapter-file (to resume, --resume-adapter-file)"
        )
    return adapter


def under_our_names(adapter: Adapter, paths: list[str]) -> Adapter:
    """The adapter by some of the paths, if transformers has its names for them in some model."""
    for model_type in MODEL_TYPES:
        for name_of in (module_name, checkpoint_name):
            names = name_of(model_type, "\n".join(paths)).split("\n")
            found = dict(zip(names, paths, strict=True))
            if adapter.keys() <= found.keys():
                return {found[name]: pair for name, pair in adapter.items()}
    return adapter
