"""The folder of a model: where it is, and whether its files are whole, before MLX reads them."""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
from pathlib import Path
from typing import Any

from lora_finetune.base import memory
from lora_finetune.base.errors import UserError

import safetensors
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id

# What is fetched from the hub: weights as safetensors, settings and tokenizer; never code.
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]

# What a clone without Git LFS has in the place of a large file begins so.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"

# What the numbers of layers are called in configurations, and other settings that are numbers.
NUM_LAYERS_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
NUMERIC_KEYS = re.compile(
    "(num|n)_.*|(hidden|intermediate|vocab)_size|head_dim|rope_theta|rms_norm_eps|"
    "max_position_embeddings|(bos|eos)_token_id"
)

# What of a model's folder decides how texts become tokens.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.jinja", "chat_template*")
TOKENIZER_FILES += ("special_tokens*", "added_tokens*", "generation_config.json")


def check_memory(folder: Path, error: BaseException | None = None) -> None:
    """Raise UserError where the weights are more than the memory, or `error` tells so."""
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    available = memory.available()
    if size > available or (error and memory.is_lacking(error)):
        why = f" ({shortened(error)})" if error else ""
        raise UserError(
            f"the weights of the model {folder} take {size / 1e9:.3g} GB, and there are "
            f"{available / 1e9:.3g} GB of memory{why}; take a smaller or a quantized model, or "
            "close other programs"
        )


def shortened(error: BaseException) -> str:
    """The beginning of an error's message in one line; of a single word, with the kind of error."""
    text = str(error) if " " in str(error) else f"{type(error).__name__} {error}"
    return textwrap.shorten(text, 200, placeholder=" …")


def check_files(folder: Path) -> str:
    """Check the files of a model folder one by one, before mlx-lm reads them all at once.

    Returns:
        The type of the model, such as "llama".

    Raises:
        UserError: a file is missing, damaged, or a Git LFS pointer; or the configuration has more
            layers than there are arrays in the weights, and building them could exhaust memory.
    """
    for needed in ("config.json", "tokenizer*", "model*.safetensors"):
        if not any(folder.glob(needed)):
            others = " (no pickle such as pytorch_model.bin is loaded)" if needed[0] == "m" else ""
            raise UserError(
                f"the model folder {folder} has no {needed}{others}; download the whole model, or "
                "name the folder that holds it"
            )
    for file in sorted({file for pattern in HUB_FILES for file in folder.glob(pattern)}):
        try:
            with file.open("rb") as stream:
                start = stream.read(len(LFS_POINTER))
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; download it again") from None
        if start == LFS_POINTER:
            raise UserError(
                f"{file} is not the file itself but a Git LFS pointer to it; `git lfs pull` in "
                f"{folder} fetches what is missing, or download the model again"
            )
    config = read_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise UserError(
            f"{folder / 'config.json'} has no model_type, which names the architecture; download "
            "it again, or take another model"
        )
    arrays = check_weights(folder)
    for name, value in text_settings(config):
        if isinstance(value, str) and NUMERIC_KEYS.fullmatch(name):
            wrong = "which is not a number"
        elif isinstance(value, int) and name in NUM_LAYERS_KEYS and value > len(arrays):
            wrong = f"and the weights beside it are only {len(arrays)} arrays"
        else:
            continue
        raise UserError(
            f"{folder / 'config.json'} has {name} {value!r}, {wrong}; download the model again"
        )
    return config["model_type"]


def text_settings(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings of a configuration; where it is of images and text, also those of its text."""
    inner = config.get("text_config")
    return [*config.items(), *(inner.items() if isinstance(inner, dict) else ())]


# The files of settings that mlx-lm and transformers read, besides config.json.
SETTINGS = ("generation_config.json", "hf_quant_config.json", "tokenizer.json", "vocab.json")
SETTINGS += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_settings(folder: Path) -> None:
    """Raise UserError where a file of settings is damaged, which may be why loading failed."""
    for name in SETTINGS:
        if (folder / name).exists():
            read_object(folder / name)
    for file in folder.glob("*.jinja"):
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8; download it again") from None


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object that a model needs; raises UserError where the file does not hold one."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a whole JSON object; download it again")
    return content


# A part of the weights: its number and how many there are.
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


def check_weights(folder: Path) -> set[str]:
    """The names of all arrays in the weights; raises UserError where some are missing.

    Without a model.safetensors the index says what there should be, as for transformers.
    """
    arrays = set()
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safetensors.safe_open(file, "numpy") as opened:
                arrays.update(opened.keys())
        except Exception as error:  # safetensors' own, which is no ValueError
            check_memory(folder, error)
            raise UserError(
                f"{file} is damaged or cut short ({shortened(error)}); download it again"
            ) from None
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        listed = read_object(index).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(f"{index} has no weight_map; download it again")
        files = sorted({str(file) for array, file in listed.items() if array not in arrays})
        if files:
            raise UserError(
                f"{index} lists weights that are missing, those of {', '.join(files[:3])}"
                f"{f' and {len(files) - 3} more files' if files[3:] else ''}; download them again"
            )
    shards = [SHARD.fullmatch(file.name) for file in folder.glob("model*.safetensors")]
    found = {(int(shard[2]), int(shard[1])) for shard in shards if shard}
    missing = [n for total, _ in found for n in range(1, total + 1) if (total, n) not in found]
    if missing:
        raise UserError(
            f"the model folder {folder} lacks part {min(missing)} of its weights "
            f"(model-{min(missing):05}-of-{max(found)[0]:05}.safetensors); download it again"
        )
    return arrays


def public_name(path_or_repo: str | None, folder: Path) -> str:
    """What other tools know a model by: its repository, or the absolute path of its folder."""
    is_folder = not path_or_repo or Path(os.path.expanduser(path_or_repo)).is_dir()  # noqa: PTH111
    return str(folder.absolute()) if is_folder else path_or_repo


def find_model(path_or_repo: str | Path) -> Path:
    """The folder of a model; a Hugging Face repository is downloaded, or found in the cache.

    Raises:
        UserError: no such folder, no such repository, or the hub is out of reach.
    """
    folder = Path(os.path.expanduser(path_or_repo))  # noqa: PTH111 (raises for ~nobody)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path_or_repo} is a file; --model takes a folder or a repository id")
    try:
        validate_repo_id(path_or_repo)
    except hub_errors.HFValidationError:
        raise UserError(
            f"there is no model folder {path_or_repo}; name one, or a repository as OWNER/NAME"
        ) from None
    try:
        return Path(snapshot_download(path_or_repo, allow_patterns=HUB_FILES))
    except hub_errors.GatedRepoError:
        why = "its owner has not given you access yet (ask on its page, then `hf auth login`)"
    except hub_errors.RepositoryNotFoundError:
        why = "the Hugging Face hub has no such repository, or it is private (`hf auth login`)"
    except Exception as error:  # whatever the network does
        why = f"the Hugging Face hub cannot be reached ({shortened(error)})"
    raise UserError(f"there is no model folder {path_or_repo}, and {why}")


# What the longest length of a text is called in configurations.
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


def context_length(folder: Path) -> float:
    """The context length that a model was trained for, by its config.json; infinite if unknown.

    Rotary positions can be scaled to a multiple of what the configuration says, or of what the
    scaling itself calls the original, as the documentation of transformers has it.
    """
    settings = dict(text_settings(read_object(folder / "config.json")))
    named = [settings.get(name) for name in CONTEXT_KEYS]
    said = [length for length in named if isinstance(length, int) and length > 0]
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters")
    if not said or not isinstance(scaling, dict):
        return said[0] if said else math.inf
    original = scaling.get("original_max_position_embeddings", said[0])
    try:
        return max(said[0], original * scaling.get("factor", 1))
    except (TypeError, OverflowError):  # one of them is no number, or none that makes sense
        return said[0]
