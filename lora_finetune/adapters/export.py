"""Export: an adapter in the forms of other tools, or merged into a whole model."""

from __future__ import annotations

from pathlib import Path

import models
from lora_finetune.adapters import merged, mlx_lm, npz, peft
from lora_finetune.base.errors import UserError, hint
from lora_finetune.base.files import whole_folder
from lora_finetune.base.signals import raising_signals
from lora_finetune.model_folder.transformers_names import is_written_by_mlx

import mlx.nn as nn
import numpy as np

Export = tuple[str, Path]  # one of these forms, and the folder to be made for it

CHECKS = {
    "mlx-lm": mlx_lm.check,
    "peft": peft.module_names,
    "merged": merged.check,
    "merged-float": merged.check_float,
}


def check_folders(exports: list[Export]) -> None:
    """Raise UserError where a folder is there already or cannot be made."""
    for _, folder in exports:
        try:
            folder.mkdir()
            folder.rmdir()
        except OSError as error:
            raise UserError(
                f"--export: the folder {folder} cannot be made: {error.strerror}; name a new one"
            ) from None


def check_forms(exports: list[Export], model: nn.Module, base: Path) -> None:
    """Raise UserError where a form cannot hold the adapter of a model, whose folder is `base`."""
    for form, _ in exports:
        try:
            CHECKS[form](model, base)
        except ValueError as error:
            raise UserError(f"--export {form}: {error}; take another form") from None


def write_all(
    exports: list[Export], model: nn.Module, base: Path, name: str, revision: str | None = None
) -> None:
    """Write each form into its folder, whole or not at all. The model is of no use afterwards.

    `name` is the model's for other tools: its repository, or the path of its folder, `base`;
    `revision` that of the repository, if it was pinned.
    Raises UserError where a form cannot be written.
    """
    forms = {form for form, _ in exports}
    adapter, layers = whole_pairs(model), models.layer_paths(model)
    names = peft.module_names(model, base) if "peft" in forms else {}
    if names and is_written_by_mlx(base):
        hint(f"in PEFT take the original model in the place of {name}, which has MLX's layout")
    logits = merged.sample_logits(model) if forms & {"merged", "merged-float"} else None
    model.clear()  # merging loads it again, and there may be no memory for two
    for form, folder in exports:
        with raising_signals(f"{folder} is not made"), whole_folder(folder) as made:
            if form == "mlx-lm":
                mlx_lm.write(made, adapter, layers, name, revision)
            elif form == "peft":
                renamed = {names[path]: pair for path, pair in adapter.items()}
                peft.write(made, renamed, name, revision)
            else:
                merged.write(made, base, adapter, logits, form == "merged-float")
        print(f"Exported as {form} to {folder}.", flush=True)


def whole_pairs(model: nn.Module) -> npz.Adapter:
    """A and B of each adapted layer for scale 20, of fused projections as one."""
    modules = models.lora_modules(model)
    return {path: tuple(map(np.array, module.pair())) for path, module in modules.items()}
