"""Settings of a configuration that PyTorch's model reads and mlx-lm's does not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_finetune.base.errors import warn
from lora_finetune.mlx_patches.activation_names import SETTINGS, has_activations
from lora_finetune.model_folder.config import (
    SAME,
    mlx_module,
    pytorch_program,
    pytorch_settings,
    with_model_type,
)

import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from transformers import PretrainedConfig

# Settings that do not change what a model computes; or that determine the shapes and names of its
# weights, so that loading fails where they are not read; or that are corrected elsewhere: rotary
# embeddings (rope_correction.py), and windows (attention_windows.py).
WITHOUT_EFFECT = re.compile(
    # in training and of the form of outputs
    r".*dropout.*|.*_drop|.*pdrop|initializer.*|init_.*|.*_init_std|.*_init_variance.*|rescale_.*|"
    r".*jitter.*|.*_loss.*|summary_.*|output_.*|return_.*|gradient_checkpointing|.*_token_id|"
    # of how it is computed, and with which precision
    r"use_cache|is_decoder|.*softmax_in_fp32|reorder_and_upcast_attn|_?(attn|experts)_implementation.*|dtype|pretraining_tp|residual_in_fp32|"
    r"((mamba|ssm)_)?chunk_size|chunk_size_feed_forward|use_mamba.*|use_associative_scan|"
    # only for the start of training, of state space models
    r"time_step_(min|max|floor|scale|rank|init_scheme)|"
    # sizes
    r"(.*_)?(size|dim|rank|layers|num_heads|attention_heads|key_value_heads|bias)|per_layer_config|"
    r"n_(layer|embd|inner|positions)|d_model|.*_size_per_layer_input|"
    # elsewhere
    r"rope_(interleave|theta|scaling|parameters|local_base_freq)|partial_rotary_factor|rotary_.*|"
    r"(original_)?max_position_embeddings|max_seq_len|"
    r"layer_types|mlp_layer_types|(use_)?sliding_window.*|max_window_layers"
)
READ_BY_PYTORCH = re.compile(r"\bconfig\.(\w+)|getattr\(\s*(?:self\.)?config,\s*\"(\w+)\"")


@contextmanager
def reads_recorded(names: set[str]) -> Iterator[None]:
    """While it lasts, the names of the settings that mlx-lm's models read are added to `names`."""

    def get(args: BaseModelArgs, name: str) -> Any:
        names.add(name)
        return object.__getattribute__(args, name)

    BaseModelArgs.__getattribute__ = get
    try:
        yield
    finally:
        del BaseModelArgs.__getattribute__


def warn_of_unread(model: nn.Module, theirs: PretrainedConfig | None, read: set[str]) -> None:
    """Say in one line which settings make PyTorch's model another one than mlx-lm's."""
    for kind in type(model).__mro__:  # of weights that MLX has converted, it reads no settings
        if "sanitize" in vars(kind):
            read = read.union(re.findall(r"\.(\w+)", inspect.getsource(kind.sanitize)))
    if theirs and has_activations(model, theirs):
        read = read.union(SETTINGS)
    unread = unread_settings(theirs, read) if theirs else {}
    if unread:
        warn(f"{described(unread)}; the model may compute something else than in PyTorch")


def unread_so_far(config: dict[str, Any], read: set[str]) -> str:
    """What to add to the error where loading failed, perhaps for a setting mlx-lm does not know.

    Settings that a model reads only when called are not in `read` yet, so the words of mlx-lm's
    source count as read too.
    """
    with suppress(Exception):  # the configuration may be damaged in any way
        theirs = pytorch_settings(config)
        program = Path(mlx_module(with_model_type(config)).__file__)
        words = re.findall(r"\w+", program.read_text("utf-8"))
        if theirs and (unread := unread_settings(theirs, read.union(words, SETTINGS))):
            return f"; {described(unread)}"
    return ""


def described(unread: dict[str, Any]) -> str:
    named = ", ".join(f"{name} = {value!r}" for name, value in unread.items())
    return f"settings that mlx-lm does not know: {named}"


def unread_settings(theirs: PretrainedConfig, read: set[str]) -> dict[str, Any]:
    """The settings that PyTorch's model reads, mlx-lm's does not, and that are no defaults.

    A setting at transformers' default counts as known, since mlx-lm's models were written for it.
    Defaults can depend on other settings, so they are those of a configuration with the known ones.

    Args:
        theirs: the settings of the text model as transformers has them.
        read: the names that mlx-lm's model has read.
    """
    pairs = [*getattr(theirs, "attribute_map", {}).items(), *SAME.items()]
    known = with_aliases(read, pairs)
    settings = theirs.to_dict()

    def is_known(name: str) -> bool:
        return name in known or bool(WITHOUT_EFFECT.fullmatch(name))

    kept = {name: value for name, value in settings.items() if is_known(name)}
    kept.pop("model_type", None)
    try:
        default = type(theirs)(**kept).to_dict()
    except Exception:  # whatever its checks have against these together
        default = type(theirs)().to_dict()
    used = with_aliases(names_in_pytorch(theirs), pairs)
    return {
        name: value
        for name, value in settings.items()
        if name in used and name in default and not is_known(name) and value != default[name]
    }


def with_aliases(names: set[str], pairs: list[tuple[str, str]]) -> set[str]:
    """Names, and their aliases by `pairs`."""
    return names.union(*({a, b} for a, b in pairs if a in names or b in names))


def names_in_pytorch(theirs: PretrainedConfig) -> set[str]:
    """The settings that transformers' model reads, found in its source text."""
    found = READ_BY_PYTORCH.findall(pytorch_program(theirs))
    return {name for both in found for name in both if name}
