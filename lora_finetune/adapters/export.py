"""Export: an adapter in the forms of other tools, or merged into a whole model."""

from __future__ import annotations

import os
from errno import EEXIST
from pathlib import Path

import models
from lora_finetune.adapters import gguf, merged, mlx_lm, npz, peft
from lora_finetune.base.errors import UserError, hint, print_line
from lora_finetune.base.files import atomic_write, check_can_make, whole_folder, write_json
from lora_finetune.base.signals import raising_signals
from lora_finetune.model_folder.files import read_object
from lora_finetune.model_folder.hub import public_name
from lora_finetune.model_folder.targets import is_stacked, layer_paths
from lora_finetune.model_folder.transformers_names import is_written_by_mlx, multiplier

import mlx.nn as nn
import numpy as np

Export = tuple[str, Path]  # one of these forms, and the folder, or GGUF file, to be made

PROMPTS = "prompts.json"  # beside an exported adapter, for this program; see `write_all`

CHECKS = {
    "mlx-lm": mlx_lm.check,
    "peft": peft.module_names,
    "gguf": gguf.tensor_names,
    "merged": merged.check,
    "merged-float": merged.check_float,
}


def check_paths(exports: list[Export], adapter: Path) -> None:
    """Raise UserError where a folder or file is there already or cannot be made.

    So too where it will be there by then, for another export or for the `adapter` to be saved.
    """
    taken = set(Path(os.path.realpath(adapter)).parents)
    for form, path in exports:
        try:
            for made in (path, modelfile_of(path)) if form == "gguf" else (path,):
                check_can_make(made)
                if os.path.lexists(made):
                    raise FileExistsError(EEXIST, os.strerror(EEXIST))
        except OSError as error:
            raise UserError(
                f"--export: {made} cannot be made: {error.strerror}; name a new one"
            ) from None
        whole = Path(os.path.realpath(path))
        if whole in taken:
            raise UserError(f"--export: {path} is taken by other output; name a new one")
        taken |= {whole, *whole.parents}


def modelfile_of(file: Path) -> Path:
    """The Modelfile that tells Ollama of a GGUF file, beside it."""
    return file.with_suffix(".Modelfile")


def check_forms(exports: list[Export], model: nn.Module, base: Path) -> None:
    """Raise UserError where a form cannot hold the adapter of a model, whose folder is `base`."""
    for form, _ in exports:
        try:
            CHECKS[form](model, base)
        except ValueError as error:
            other = "merged-float" if form == "gguf" else "another form"
            raise UserError(f"--export {form}: {error}; take {other}") from None


def write_all(
    exports: list[Export], model: nn.Module, base: Path, name: str | None = None,
    template: str | None = None, prompts: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Write each form to its path, whole or not at all. The model is of no use afterwards.

    Args:
        base: the folder of the model.
        name: what --model has for it.
        template: a chat template for whole models in the place of the base's.
        prompts: settings of the run on which it depends how prompts go in, to be kept beside an
            adapter.

    Raises:
        UserError: a form cannot be written.
    """
    forms, (name, revision) = {form for form, _ in exports}, public_name(name, base)
    adapter, layers = whole_pairs(model), layer_paths(model)
    names = {form: CHECKS[form](model, base) for form in forms & {"peft", "gguf"}}
    config, has_experts = read_object(base / "config.json"), any(map(is_stacked, model.modules()))
    if "peft" in forms and is_written_by_mlx(base):
        hint(f"in PEFT take the original model in the place of {name}, which has MLX's layout")
    logits = merged.sample_logits(model) if forms & {"merged", "merged-float"} else None
    model.clear()  # merging loads it again, and there may be no memory for two
    for form, path in exports:
        path.parent.mkdir(parents=True, exist_ok=True)
        making = atomic_write if form == "gguf" else whole_folder
        with raising_signals(f"{path} is not made"), making(path) as made:
            if form == "mlx-lm":
                mlx_lm.write(made, adapter, layers, name, revision)
            elif form == "peft":
                pairs = {p: (a, b / multiplier(config, p)) for p, (a, b) in adapter.items()}
                renamed = {names[form][path]: pair for path, pair in pairs.items()}
                peft.write(made, renamed, name, revision, has_experts)
            elif form == "gguf":
                gguf.write(made[0].name, adapter, names[form], base, path.stem)
            else:
                merged.write(made, base, adapter, logits, form == "merged-float")
                if template:
                    merged.put_template(made, template)
            if prompts and form in ("mlx-lm", "peft"):
                write_json(made / PROMPTS, prompts)
        print_line(f"Exported as {form} to {path}.")


def whole_pairs(model: nn.Module) -> npz.Adapter:
    """A and B of each adapted layer for scale 20, of fused projections as one."""
    modules = models.lora_modules(model)
    return {path: tuple(map(np.array, module.pair())) for path, module in modules.items()}
