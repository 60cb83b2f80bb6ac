"""The folder of a model: which files it has, and whether they are whole, before MLX reads them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterable
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

from lora_finetune.base import memory
from lora_finetune.base.errors import UserError, abbreviated

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# The files of a model, which are fetched from the hub, and which exports carry on: settings,
# tokenizers and what is said of it; no weights of other kinds, which a pickle may be, and no
# programs. Those in other folders (onnx/, original/, checkpoint-500/) are of no use here.
FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "*.tiktoken")
FILES += ("LICENSE*", "README.md")
WEIGHTS = "model*.safetensors"

# How the file begins that a clone without Git LFS has in the place of a large one.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"

NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
CONTEXT_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len")

# Files that decide how texts become tokens.
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.jinja", "generation_config.json")
TOKENIZER_FILES += ("chat_template.json", "additional_chat_templates/*.jinja")

# --- Checking -----------------------------------------------------------------------------------


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names of files, with / between folders, that fit patterns; * is for a part of a name."""
    patterns = list(patterns)
    return [
        name
        for name in names
        if any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns)
    ]


def problem(names: Iterable[str], folder: Path) -> str | None:
    """What a model needs and none of the files is, or what these are instead; None if it has all.

    `folder` has at least those of them that are no weights.
    """
    names = list(names)
    lacking = [p for p in ("config.json", "tokenizer*", WEIGHTS) if not matching(names, [p])]
    if WEIGHTS in lacking and (folder / "adapter_config.json").exists():
        config = read_object(folder / "adapter_config.json")
        base = config.get("base_model_name_or_path") or config.get("model") or "its base"
        return (
            f"is an adapter of {base}: give --model {base}, and the adapter's folder as "
            "--adapter-file or --resume-adapter-file"
        )
    if WEIGHTS in lacking and any(name.endswith(".gguf") for name in names):
        return "has its weights as GGUF files only, which are for llama.cpp, not as safetensors"
    others = " (no pickle such as pytorch_model.bin is loaded)" if lacking == [WEIGHTS] else ""
    return f"has no {lacking[0]}{others}" if lacking else None


def check_files(folder: Path) -> Any:
    """The type of the model in a folder; raises UserError where a file is missing."""
    if wrong := problem((file.name for file in folder.iterdir()), folder):
        way_out = "download the whole model, or name the folder that holds it"
        raise UserError(f"the model folder {folder} {wrong}; {way_out}")
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        listed = read_object(index).get("weight_map")
        files = set(map(str, listed.values())) if isinstance(listed, dict) else {"weight_map"}
        if missing := sorted(files - {file.name for file in folder.iterdir()}):
            raise UserError(
                f"{abbreviated(missing)} of {index} is missing; {again(folder / missing[0])}"
            )
    config = read_object(folder / "config.json")
    number = sum(len(read_whole(file)) for file in folder.glob(WEIGHTS))
    for name, value in text_settings(config):  # building a million layers takes minutes
        if name in NUM_LAYERS and isinstance(value, int) and value > number:
            raise UserError(
                f"{folder / 'config.json'} has {name} {value}, and the weights beside it are only "
                f"{number} arrays; {again(folder / 'config.json')}"
            )
    return config.get("model_type")


def check_memory(folder: Path, error: BaseException | None = None, size: int = 0) -> None:
    """Raise UserError where the weights are larger than the memory, or `error` is a lack of it.

    `size`, in bytes, is that of weights that are not there yet. It is that of a process's part that
    counts.
    """
    size = size or sum(file.stat().st_size for file in folder.glob(WEIGHTS))
    size, available = size // memory.num_parts, memory.available()
    if size > available or (error and memory.is_lacking(error)):
        why = f" ({shortened(error)})" if error else ""
        of = " in each process" if memory.num_parts > 1 else ""
        add = "add --shard, so that each process holds a part of them, " * (
            memory.processes > memory.num_parts
        )
        raise UserError(
            f"the weights of the model {folder} take {size / 1e9:.3g} GB{of}, and there are "
            f"{available / 1e9:.3g} GB of memory{why}; {add}take a smaller or a quantized model, "
            "or close other programs"
        )


def reason(folder: Path, error: BaseException) -> str:
    """Why loading failed; raises UserError where for lack of memory, or for a damaged file."""
    check_memory(folder, error)
    for file in sorted(file for pattern in (*FILES, WEIGHTS) for file in folder.glob(pattern)):
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
            f"{file} is damaged or cut short ({shortened(error)}); {again(file)}"
        ) from None


def again(file: Path) -> str:
    """How to get a file of a model again; what is in the hub's cache, its client does not fetch."""
    cached = re.fullmatch(r".*/models--([^/]+)/snapshots/([^/]+)", str(file.parent.absolute()))
    if not cached:
        return "download it again"
    repo = cached[1].replace("--", "/")
    return f"`hf download {repo} {file.name} --revision {cached[2]} --force-download` gets it anew"


# --- Reading ------------------------------------------------------------------------------------


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object that a model needs; raises UserError where the file does not hold one."""
    content = read_whole(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; {again(file)}")
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


def first_numbers(arrays: dict[str, mx.array]) -> dict[str, list[float]]:
    # Copies: to read numbers of an array on CUDA, MLX would move all of it to shared memory.
    starts = {name: mx.contiguous(array.flatten()[:16]) for name, array in arrays.items()}
    mx.eval(starts)
    return {name: start.tolist() for name, start in starts.items()}


def fingerprints(model: nn.Module, folder: Path, known: dict[str, list[float]]) -> dict[str, str]:
    """Checksums of a model's weights (by their first numbers), configuration and tokenizer.

    `known` has the first numbers of weights that are not all in this process.
    """
    arrays = tree_flatten(model.parameters())
    known = known | first_numbers({name: a for name, a in arrays if name not in known})
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})
    described = {
        "the model": [(n, a.shape, known[n]) for n, a in arrays],
        "the model's config.json": sorted(read_object(folder / "config.json").items()),
        "the model's tokenizer": [(file.name, file.read_bytes()) for file in files],
    }
    return {name: hashlib.sha256(repr(it).encode()).hexdigest() for name, it in described.items()}


def shortened(error: BaseException) -> str:
    """The beginning of an error's message in one line; of a single word, with the kind of error."""
    text = str(error) if " " in str(error) else f"{type(error).__name__} {error}"
    return textwrap.shorten(text, 200, placeholder=" …")
