"""The models of train_lora.py: load one, put LoRA into it, read and write adapter files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lora_finetune.command_line import UserError, file_checksum, first_line

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import safetensors.numpy
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model
from transformers.utils import logging

# On CUDA, MLX would round the factors of float32 products to TF32's 10 bits: gradients 1 % off.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# And cuDNN's attention has gradients that differ from run to run: none could be resumed exactly.
os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")

logging.set_verbosity_error()  # its warnings are for programmers


# --- Loading ------------------------------------------------------------------------------------

# What is fetched from the hub: weights as safetensors, settings and tokenizer; never code.
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


def load(path_or_repo: str) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer from a folder or a Hugging Face repository.

    No code that comes with a model is run: no remote code, no pickle. On the CPU the weights become
    float32, quantized ones too: MLX's CPU products of other types are 40 and more times slower.
    Elsewhere they stay as they are.

    Args:
        path_or_repo: a folder with `config.json`, `model*.safetensors` and a tokenizer, or a
            repository id such as `GuminiResearch/Gumini-1B-Base`.

    Raises:
        UserError: there is no such model, or it cannot be loaded; says which and why.
    """
    folder = find_model(path_or_repo)
    for needed in ("config.json", "tokenizer*", "model*.safetensors"):
        if not any(folder.glob(needed)):
            raise UserError(f"the model folder {folder} has no {needed}")
    try:
        check_layers(folder)
        model, tokenizer = mlx_lm.load(
            str(folder), tokenizer_config={"trust_remote_code": False}, lazy=True
        )
        if mx.default_device() == mx.cpu:
            model = dequantize_model(model)
            model.set_dtype(mx.float32)
        mx.eval(model.parameters())
        tokenizer.encode("a")  # what is wrong with some settings shows only in use
        vocabulary_size(model)
    except Exception as error:  # mlx-lm and transformers raise of every kind on what they dislike
        raise UserError(f"the model {folder} cannot be loaded: {first_line(error)}") from error
    return model, tokenizer


# What the numbers of layers are called in configurations.
LAYER_NUMBERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def check_layers(folder: Path) -> None:
    """Check a model folder before the layers are built: a wrong number of them may fill the memory.

    Raises:
        ValueError: the configuration has more layers than there are arrays in the weights.
        Exception: the configuration or the weights are damaged.
    """
    config = json.loads((folder / "config.json").read_bytes())
    files = list(folder.glob("model*.safetensors"))
    arrays = sum(len(safetensors.safe_open(file, "numpy").keys()) for file in files)
    for settings in (config, config.get("text_config")):
        for name in LAYER_NUMBERS:
            layers = settings.get(name) if isinstance(settings, dict) else None
            if isinstance(layers, int) and layers > arrays:
                raise ValueError(
                    f"its config.json has {name} {layers}, and its weights are only {arrays} arrays"
                )


def find_model(path_or_repo: str) -> Path:
    """The folder of a model; a Hugging Face repository is downloaded, or found in the cache.

    Raises:
        UserError: no such folder, no such repository, or the hub is out of reach.
    """
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        return folder
    try:
        validate_repo_id(path_or_repo)
    except hub_errors.HFValidationError:
        raise UserError(f"there is no model folder {path_or_repo}") from None
    if folder.exists():
        raise UserError(f"{path_or_repo} is a file; --model takes a folder or a repository id")
    try:
        return Path(snapshot_download(path_or_repo, allow_patterns=HUB_FILES))
    except hub_errors.GatedRepoError:
        why = "its owner has not given you access yet (ask on its page, then `hf auth login`)"
    except hub_errors.RepositoryNotFoundError:
        why = "the Hugging Face hub has no such repository, or it is private (`hf auth login`)"
    except Exception as error:  # whatever the network does
        why = f"the Hugging Face hub cannot be reached ({first_line(error)})"
    raise UserError(f"there is no model folder {path_or_repo}, and {why}")


# --- LoRA ---------------------------------------------------------------------------------------

RANK = 8
SCALE = 20.0


class LowRank(nn.Module):
    """A trainable low-rank map x ↦ scale · B (A x), zero at first.

    The form, names, shapes and defaults are those of `mlx_lm.tuner.lora.LoRALinear`: `lora_a`
    (d_in, r) uniform in ±1/sqrt(d_in) and `lora_b` (r, d_out) zero, both float32, so that adapters
    move freely between the tools.
    """

    def __init__(self, d_in: int, d_out: int, r: int = RANK, scale: float = SCALE):
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.scale = scale
        self.lora_a = mx.random.uniform(-bound, bound, (d_in, r))
        self.lora_b = mx.zeros((r, d_out))

    def __call__(self, x: mx.array) -> mx.array:
        return (self.scale * ((x @ self.lora_a) @ self.lora_b)).astype(x.dtype)


class LoRALinear(LowRank):
    """A frozen linear layer, float or quantized, with a low-rank update."""

    @staticmethod
    def from_base(linear: nn.Module, r: int = RANK, scale: float = SCALE) -> LoRALinear:
        d_out, d_in = linear_shape(linear)
        adapted = LoRALinear(d_in, d_out, r, scale)
        adapted.linear = linear
        return adapted

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + super().__call__(x)


class LoRARouter(LowRank):
    """A frozen router that holds a bare `weight` (experts, d_in), which the update is added to.

    Such a module does more with its scores than a linear layer, so its output cannot be added to.
    The sum has the weight's type, for a model that takes the type of its layers from the scores.
    """

    @staticmethod
    def from_base(router: nn.Module, r: int = RANK, scale: float = SCALE) -> LoRARouter:
        experts, d_in = router.weight.shape
        adapted = LoRARouter(d_in, experts, r, scale)
        adapted.router = router
        return adapted

    @property
    def weight(self) -> mx.array:
        """The updated weight, for a model that reads it and does not call the router."""
        update = self.scale * (self.lora_a @ self.lora_b).T
        return (self.router.weight + update).astype(self.router.weight.dtype)

    def __call__(self, *args, **options):
        frozen = self.router.weight
        self.router.weight = self.weight
        try:
            return self.router(*args, **options)
        finally:
            self.router.weight = frozen


class LoRAFused(nn.Module):
    """A frozen projection to queries, keys and values at once; queries and values are updated.

    The keys stay bit for bit those of the frozen projection. The updates are named `q` and `v`.
    """

    def __init__(self, linear: nn.Module, layout: Layout, ranks: dict[str, int]):
        super().__init__()
        self.linear = linear
        self.layout = layout
        d_in = linear_shape(linear)[1]
        for part, r in ranks.items():
            self[part] = LowRank(d_in, layout.num_rows(part), r)

    def __call__(self, x: mx.array) -> mx.array | list[mx.array]:
        y = self.linear(x)
        groups, q, k, v = self.layout
        is_split = isinstance(y, list)  # one such layer splits its output itself
        if not is_split:
            y = y.reshape(*y.shape[:-1], groups, -1).split([q, q + k, q + k + v], axis=-1)
        for place, part in [(0, "q"), (2, "v")]:
            if part in self:
                y[place] = y[place] + self[part](x).reshape(y[place].shape)
        return y if is_split else mx.concatenate(y, axis=-1).flatten(-2)


class Layout(NamedTuple):
    """How a fused projection's rows are ordered: in groups, each of so many q, k, v, other rows."""

    groups: int
    q: int
    k: int
    v: int

    def num_rows(self, part: str) -> int:
        """The rows of the part "q" or "v" in all groups."""
        return self.groups * getattr(self, part)


def is_linear(module: object) -> bool:
    """Whether a module is a linear layer, of MLX or of mlx-lm, float or packed."""
    return (
        isinstance(module, nn.Module)
        and "Linear" in type(module).__name__
        and "weight" in module
        and module.weight.ndim == 2
    )


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, which packed weights do not show."""
    if hasattr(linear, "in_features"):
        return linear.out_features, linear.in_features
    d_out, d_in = linear.weight.shape
    if "scales" in linear:
        d_in = linear.scales.shape[-1] * linear.group_size
    return d_out, d_in


# --- Where LoRA goes ----------------------------------------------------------------------------

# An attention module is one that has a query projection. Of these names the first found counts:
# with latent attention, queries come from `q_b_proj` (`q_a_proj` makes what it reads), and values
# from the latent vector that `kv_a_proj_with_mqa` makes. That is the only linear layer on the way
# to the values that each such model has; the keys come from the same vector and so change with it.
# A layer that takes its values from its keys or from another layer has none of its own to adapt.
QUERIES = ("q_b_proj", "q_proj", "c_q", "attn_query")
VALUES = ("v_proj", "c_v", "attn_value", "kv_a_proj_with_mqa", "kv_proj")

# Fused projections: rows of all queries, then all keys, then all values; or grouped by key-value
# head, as in GPT-NeoX, InternLM2 and Qwen3-Next. Those of linear attention are the last of each.
CONTIGUOUS = (
    *("qkv_proj", "q_k_v_proj", "qkvg_proj", "Wqkv", "W_pack", "c_attn", "att_proj"),
    "in_proj_qkv",
)
GROUPED = ("query_key_value", "wqkv", "in_proj_qkvz")
NOT_GROUPED = ("bailing",)  # model families whose query_key_value is contiguous

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "attn_out")  # what reads the attention

ROUTERS = ("gate", "router")

# DeepSeek's sparse attention chooses tokens with a small attention of its own, which is left alone.
LEFT_ALONE = ("indexer", "compressor")


def find_targets(model: nn.Module, num_layers: int) -> dict[str, tuple[int, int]]:
    """Where LoRA goes in the last `num_layers` layers (in all, where there are fewer).

    That is into the query and value projections of each attention, linear attention too, and in a
    mixture of experts into the router. Of a fused projection P the parts P.q and P.v are meant.

    Returns:
        Paths such as `model.layers.9.self_attn.q_proj`, first layer first, and their (d_out, d_in).

    Raises:
        UserError: there is no attention in those layers.
    """
    last = tuple(f"{path}." for path in layer_paths(model)[-num_layers:])
    attention = {path: s for path, s in attention_places(model) if path.startswith(last)}
    routers = {path: s for path, s in router_places(model) if path.startswith(last)}
    if not attention:
        raise UserError(
            f"the last {min(num_layers, len(model.layers))} layers of this model "
            f"({model_family(model)}) have no attention, into which LoRA would go"
        )
    found = attention | routers
    return {path: found[path] for path in sorted(found, key=natural_order)}


def attention_places(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """The query and value projections of all attention modules, and their (d_out, d_in)."""
    for path, attention in model.named_modules():
        if any(part in LEFT_ALONE for part in path.split(".")):
            continue
        linears = {name for name, child in attention.items() if is_linear(child)}
        fused = [name for name in (*CONTIGUOUS, *GROUPED) if name in linears]
        query = [name for name in QUERIES if name in linears]
        value = [name for name in VALUES if name in linears]
        for name in fused:
            layout = fused_layout(model, attention, name)
            for part in "qv":
                d_in = linear_shape(attention[name])[1]
                yield f"{path}.{name}.{part}", (layout.num_rows(part), d_in)
        for name in [*query[:1], *(value[:1] if query else [])]:
            yield f"{path}.{name}", linear_shape(attention[name])


def fused_layout(model: nn.Module, attention: nn.Module, name: str) -> Layout:
    """The layout of a fused projection, from its shape and that of the output projection.

    What the output projection reads is as wide as the queries; in linear attention, whose keys are
    as wide as the queries, it is as wide as the values. A last part (`…g`, `…z`) is a gate of that
    width.

    Raises:
        UserError: there is no output projection of a known name.
    """
    rows = linear_shape(attention[name])[0]
    output = next((out for out in OUTPUTS if out in attention), None)
    if output is None:
        raise UserError(f"{model_family(model)}: no output projection shows how {name} is laid out")
    width = linear_shape(attention[output])[1]
    if name.startswith("in_proj"):
        v = width
        q = k = (rows - (2 * v if name.endswith("z") else v)) // 2
        head = getattr(attention, "head_k_dim", k)
    else:
        q = width
        k = v = (rows - (2 * q if name.startswith("qkvg") else q)) // 2
        head = getattr(attention, "head_dim", k)
    is_grouped = name in GROUPED and not model_family(model).startswith(NOT_GROUPED)
    groups = k // head if is_grouped else 1
    return Layout(groups, q // groups, k // groups, v // groups)


def router_places(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """The routers of all mixtures of experts, and their (d_out, d_in).

    The router is a linear layer, or holds one, or holds a bare weight (experts, d_in).
    """
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in ROUTERS or any(p in path for p in ("attn", "attention")):
            continue
        if "weight" in module and module.weight.ndim == 2:
            shape = linear_shape(module) if is_linear(module) else tuple(module.weight.shape)
            yield path, shape
        else:
            for name, child in module.items():
                if is_linear(child):
                    yield f"{path}.{name}", linear_shape(child)


def model_family(model: nn.Module) -> str:
    """The name of the mlx-lm module that a model comes from, such as "qwen2_moe"."""
    return type(model).__module__.rpartition(".")[2]


def layer_paths(model: nn.Module) -> list[str]:
    """The paths of the model's layers, such as `model.layers.9`, from first to last."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model.layers]


def natural_order(path: str) -> list[tuple[int, str]]:
    """A sort key under which layer 9 comes before layer 10."""
    return [(len(part) if part.isdecimal() else 0, part) for part in path.split(".")]


def add_lora(model: nn.Module, ranks: dict[str, int]) -> None:
    """Freeze the model and put a fresh low-rank update of the given rank at each path.

    A path names a linear layer, a router, or the part `q` or `v` of a fused projection.
    """
    modules = dict(model.named_modules())
    wrapped: dict[str, nn.Module] = {}
    fused: dict[str, dict[str, int]] = {}
    for path, r in ranks.items():
        if path not in modules:
            projection, _, part = path.rpartition(".")
            fused.setdefault(projection, {})[part] = r
        elif is_linear(modules[path]):
            wrapped[path] = LoRALinear.from_base(modules[path], r)
        else:
            wrapped[path] = LoRARouter.from_base(modules[path], r)
    for path, parts in fused.items():
        attention, _, name = path.rpartition(".")
        layout = fused_layout(model, modules[attention], name)
        wrapped[path] = LoRAFused(modules[path], layout, parts)
    if not hasattr(model, "_no_grad"):  # recurrent_gemma leaves its base class's __init__ out
        nn.Module.__init__(model)
    model.freeze()
    model.update_modules(tree_unflatten(list(wrapped.items())))


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens the model knows."""
    return model(mx.zeros((1, 2), mx.int32)).shape[-1]  # nothing is computed for a shape


def count_trainable(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.trainable_parameters()))


# What of a model's folder decides how texts become tokens.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.jinja", "chat_template*")


def fingerprints(model: nn.Module, folder: Path) -> dict[str, str]:
    """Checksums that tell a model from others: of its weights, configuration and tokenizer.

    Of each weight the name, the shape and the first numbers count.
    """
    sample = [(name, a.shape, a.flatten()[:16]) for name, a in tree_flatten(model.parameters())]
    mx.eval([numbers for _, _, numbers in sample])
    weights = [(name, shape, numbers.tolist()) for name, shape, numbers in sample]
    config = json.loads((folder / "config.json").read_bytes())
    tokenizer = {path.name: path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    described = {
        "the model": weights,
        "the model's config.json": json.dumps(config, sort_keys=True),
        "the model's tokenizer": [
            (n, file_checksum(path)) for n, path in sorted(tokenizer.items())
        ],
    }
    return {
        name: hashlib.sha256(repr(content).encode()).hexdigest()
        for name, content in described.items()
    }
