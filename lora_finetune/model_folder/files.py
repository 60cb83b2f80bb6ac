"""The folder of a model: where it is, and whether its files are whole, before MLX reads them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_finetune.base import memory
from lora_finetune.base.errors import UserError, abbreviated

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from mlx.utils import tree_flatten

# Fetched from the hub: weights as safetensors, settings and tokenizer; never code.
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]

# How the file begins that a clone without Git LFS has in the place of a large one.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"

NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
CONTEXT_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len")

# Files that decide how texts become tokens.
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.jinja", "generation_config.json")
TOKENIZER_FILES += ("chat_template.json", "additional_chat_templates/*.jinja")

# --- Finding ------------------------------------------------------------------------------------


def find_model(path_or_repo: str | Path, files: Iterable[str] = HUB_FILES) -> Path:
    """The folder of a model; a Hugging Face repository is downloaded, or found in the cache."""
    folder = Path(os.path.expanduser(path_or_repo))  # noqa: PTH111 (raises for ~nobody)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path_or_repo} is a file; --model takes a folder or a repository id")
    try:
        return Path(snapshot_download(path_or_repo, allow_patterns=list(files)))
    except hub_errors.HFValidationError:
        why = "it is not the name of a repository either, OWNER/NAME"
    except hub_errors.GatedRepoError:
        why = "its owner has not given you access yet (ask on its page, then `hf auth login`)"
    except hub_errors.RepositoryNotFoundError:
        why = "the Hugging Face hub has no such repository, or it is private (`hf auth login`)"
    except Exception as error:  # whatever the network does
        why = f"the Hugging Face hub cannot be reached ({shortened(error)})"
    raise UserError(f"there is no model folder {path_or_repo}, and {why}")


def public_name(path_or_repo: str | None, folder: Path) -> str:
    """The model's name for other tools: its repository, or the absolute path of its folder."""
    is_folder = not path_or_repo or Path(os.path.expanduser(path_or_repo)).is_dir()  # noqa: PTH111
    return str(folder.absolute()) if is_folder else path_or_repo


# --- Checking -----------------------------------------------------------------------------------


def check_files(folder: Path) -> Any:
    """The type of the model in a folder; raises UserError where a file is missing."""
    for needed in ("config.json", "tokenizer*", "model*.safetensors"):
        if not any(folder.glob(needed)):
            others = " (no pickle such as pytorch_model.bin is loaded)" if needed[0] == "m" else ""
            raise UserError(
                f"the model folder {folder} has no {needed}{others}; download the whole model, or "
                "name the folder that holds it"
            )
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        listed = read_object(index).get("weight_map")
        files = set(map(str, listed.values())) if isinstance(listed, dict) else {"weight_map"}
        if missing := sorted(files - {file.name for file in folder.iterdir()}):
            raise UserError(f"{abbreviated(missing)} of {index} is missing; download it again")
    config = read_object(folder / "config.json")
    number = sum(len(read_whole(file)) for file in folder.glob("model*.safetensors"))
    for name, value in text_settings(config):  # building a million layers takes minutes
        if name in NUM_LAYERS and isinstance(value, int) and value > number:
            raise UserError(
                f"{folder / 'config.json'} has {name} {value}, and the weights beside it are only "
                f"{number} arrays; download the model again"
            )
    return config.get("model_type")


def check_memory(folder: Path, error: BaseException | None = None) -> None:
    """Raise UserError where the weights are larger than the memory, or `error` is a lack of it."""
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    available = memory.available()
    if size > available or (error and memory.is_lacking(error)):
        why = f" ({shortened(error)})" if error else ""
        raise UserError(
            f"the weights of the model {folder} take {size / 1e9:.3g} GB, and there are "
            f"{available / 1e9:.3g} GB of memory{why}; take a smaller or a quantized model, or "
            "close other programs"
        )


def reason(folder: Path, error: BaseException) -> str:
    """Why loading failed; raises UserError where for lack of memory, or for a damaged file."""
    check_memory(folder, error)
    for file in sorted(file for pattern in HUB_FILES for file in folder.glob(pattern)):
        read_whole(file)
    return shortened(error)


def read_whole(file: Path) -> Any:
    """The value of a JSON file, or the arrays of weights by name, not read yet; None of others.

    Raises UserError where a file of a model is a Git LFS pointer, or was not downloaded whole.
    """
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{file} is not the file itself but a Git LFS pointer to it; `git lfs pull` in "
                f"{file.parent} fetches what is missing, or download the model again"
            )
    try:
        if file.suffix == ".json":
            return json.loads(file.read_bytes())
        return mx.load(str(file)) if file.suffix == ".safetensors" else None
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{file} is damaged or cut short ({shortened(error)}); download it again"
        ) from None


# --- Reading ------------------------------------------------------------------------------------


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object that a model needs; raises UserError where the file does not hold one."""
    content = read_whole(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; download it again")
    return content


def text_settings(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings of a configuration; where it is of images and text, also those of its text."""
    inner = config.get("text_config")
    return [*config.items(), *(inner.items() if isinstance(inner, dict) else ())]


def context_length(folder: Path) -> float:
    """The context length that a model was trained for, infinite if its config.json has none.

    Rotary positions can be scaled to a multiple of it, or of the original length that they name.
    """
    settings = dict(text_settings(read_object(folder / "config.json")))
    lengths = [n for name in CONTEXT_LENGTH if isinstance(n := settings.get(name), int)]
    if not lengths:
        return math.inf
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    original = scaling.get("original_max_position_embeddings", lengths[0])
    return max(lengths[0], original * (scaling.get("factor") or 1))


def fingerprints(model: nn.Module, folder: Path) -> dict[str, str]:
    """Checksums of a model's weights (by their first numbers), configuration and tokenizer."""
    arrays = tree_flatten(model.parameters())
    # Copies: to read numbers of an array on CUDA, MLX would move all of it to shared memory.
    starts = [mx.contiguous(array.flatten()[:16]) for _, array in arrays]
    mx.eval(starts)
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})
    described = {
        "the model": [(n, a.shape, s.tolist()) for (n, a), s in zip(arrays, starts, strict=True)],
        "the model's config.json": sorted(read_object(folder / "config.json").items()),
        "the model's tokenizer": [(file.name, file.read_bytes()) for file in files],
    }
    return {name: hashlib.sha256(repr(it).encode()).hexdigest() for name, it in described.items()}


def shortened(error: BaseException) -> str:
    """The beginning of an error's message in one line; of a single word, with the kind of error."""
    text = str(error) if " " in str(error) else f"{type(error).__name__} {error}"
    return textwrap.shorten(text, 200, placeholder=" …")
