"""The models of train_lora.py: load one, put LoRA into it, and where in each architecture."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import weakref
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches import activations, loading
from lora_finetune.mlx_patches.settings import warn_of_unread
from lora_finetune.model_folder import files, tokenizer
from lora_finetune.model_folder.config import model_family
from lora_finetune.model_folder.hub import find_model

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.utils import logging

# Only on CUDA, since without TF32 the newest Macs do not use their matrix units for float32.
if mx.cuda.is_available():
    # TF32 rounds the factors of float32 products to 10 bits, which puts gradients 1 % off.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    # MLX hands operations over in groups, of which ten may wait: large ones hold gigabytes.
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "20")
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "100")

logging.set_verbosity_error()  # its warnings are for programmers

# --- Loading ------------------------------------------------------------------------------------


def load(
    path_or_repo: str | Path, read: Callable[[nn.Module], None] | None = None
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model, in types that the device is fast with, and its tokenizer.

    No code that comes with a model is run: no remote code, no pickle.

    Args:
        path_or_repo: a folder, or a repository id such as `GuminiResearch/Gumini-1B-Base`, with
            `@REVISION` behind it where a branch, tag or commit is meant.
        read: reads the weights, or a part of them; by default all are read.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    folder = find_model(path_or_repo, check_settings)
    model_type = files.check_files(folder)
    files.check_memory(folder)
    with explained(folder, f"the model {folder} cannot be loaded as mlx-lm's {model_type}"):
        model, config, theirs = loading.load_as_stored(folder)
        loading.find_limits(model)  # what is wrong with some settings shows only in a call
        warn_of_unread(model, theirs)
        model = loading.in_fast_types(model)
        read(model) if read else mx.eval(model.parameters())
    with explained(folder, f"the tokenizer of the model {folder} cannot be loaded"):
        wrapper = tokenizer.load(folder, config)
        wrapper.encode("a")
    return model, wrapper


def check_settings(folder: Path) -> None:
    """Raise UserError where no model that LoRA can adapt is made by a folder without weights."""
    model_type = files.read_object(folder / "config.json").get("model_type")
    with explained(folder, f"the model {folder} cannot be loaded as mlx-lm's {model_type}"):
        model, *_ = loading.load_as_stored(folder, has_weights=False)
        loading.find_limits(model)
        find_targets(model, len(model.layers))


@contextlib.contextmanager
def explained(folder: Path, what: str) -> Iterator[None]:
    """Raise UserError where a block that loads a folder fails: what cannot be, and why."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # mlx-lm may raise anything; importing olmo exits
        raise UserError(
            f"{what} ({files.reason(folder, error)}); compare its files with their source, or take "
            "another model"
        ) from error


# --- LoRA ---------------------------------------------------------------------------------------

RANK = 8
SCALE = 20.0  # of adapter files


class LowRank(nn.Module):
    """A trainable low-rank map x ↦ scale · B (A x), zero at first.

    The form, names, shapes and defaults are those of `mlx_lm.tuner.lora.LoRALinear`: `lora_a`
    (d_in, r) uniform in ±1/sqrt(d_in) and `lora_b` (r, d_out) zero, both float32.
    """

    def __init__(self, d_in: int, d_out: int, r: int = RANK, scale: float = SCALE):
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.scale = scale
        self.lora_a = mx.random.uniform(-bound, bound, (d_in, r))
        self.lora_b = mx.zeros((r, d_out))

    def pair(self) -> tuple[mx.array, mx.array]:
        """A (d_in, r) and B (r, d_out) for the scale of adapter files."""
        b = self.lora_b if self.scale == SCALE else self.lora_b * (self.scale / SCALE)
        return self.lora_a, b


@mx.custom_function
def low_product(x: mx.array, a: mx.array) -> mx.array:
    """SCALE · x a, in float32, the type of a. No float32 copy of x is saved for the gradients."""
    return activations.scaled_product(x.astype(a.dtype), a, SCALE)


@low_product.vjp
def low_product_vjp(inputs: tuple, dz: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, a = inputs
    (x,) = mx.depends([x], [dz])  # or, compiled, the float32 copy of above would be saved
    x_rows, dz = x.flatten(0, -2).astype(a.dtype), dz.flatten(0, -2)
    dx = activations.scaled_product(dz, a.T, SCALE).reshape(x.shape)
    return dx.astype(x.dtype), activations.scaled_product(x_rows.T, dz, SCALE)


def add_update(y: mx.array, z: mx.array, b: mx.array) -> mx.array:
    """y + z b, where z and b are float32, rounded to the type of y."""
    # Compiled without this, the cast and the sum would be one more kernel for CUDA to compile.
    (update,) = mx.depends([(z @ b).astype(y.dtype)], [mx.stop_gradient(y)])
    return y + update


class Adapted:
    """The base class of adapted layers: a `frozen` layer with a low-rank update, its `pair`."""

    def merged(self) -> nn.Module:
        """A layer that does the same, with the update in its weight, summed in float32.

        A quantized layer is dequantized and not quantized again, which could lose the update.
        """
        layer, (a, b) = copy.copy(self.frozen), self.pair()
        weight, dtype = loading.float_weight(layer)
        if "scales" in layer:
            layer = nn.Linear(1, 1, bias=False)
            if "bias" in self.frozen:
                layer.bias = self.frozen.bias
        layer.weight = (weight + SCALE * (a @ b).T).astype(dtype)
        return layer


class LoRALinear(Adapted, LowRank):
    """A frozen linear layer, float or quantized, with a low-rank update."""

    def __call__(self, x: mx.array) -> mx.array:
        return add_update(self.frozen(x), self.beside.product(self, x), self.pair()[1])

    @classmethod
    def from_base(cls, frozen: nn.Module, r: int = RANK, scale: float = SCALE) -> LoRALinear:
        d_out, d_in = linear_shape(frozen)
        adapted = cls(d_in, d_out, r, scale)
        adapted.frozen = frozen
        Beside([adapted])
        return adapted


class Beside:
    """Adapted layers of one parent, called on one input as a rule: queries and values.

    The first one called multiplies its input with the A's of all, side by side, so that there are
    fewer passes over the input and its gradient. Products are kept while Python has that input.
    """

    def __init__(self, layers: list[LoRALinear]):
        self.layers, self.input, self.kept = layers, None, []
        for layer in layers:
            layer.beside = self

    def product(self, layer: LoRALinear, x: mx.array) -> mx.array:
        """SCALE · x A of a layer."""
        changed = any(each.lora_a is not a for each, a, _ in self.kept)
        if not self.kept or self.input() is not x or changed:
            low_a = [each.lora_a for each in self.layers]
            ends = list(accumulate(a.shape[1] for a in low_a))
            z = low_product(x, mx.concatenate(low_a, axis=1)).split(ends[:-1], axis=-1)
            self.input = weakref.ref(x, lambda _: self.kept.clear())
            # Contiguous, or CUDA would copy them for each product.
            self.kept = list(zip(self.layers, low_a, map(mx.contiguous, z), strict=True))
        return next(z for each, _, z in self.kept if each is layer)


class LoRARouter(LoRALinear):
    """A frozen router with a bare `weight` (experts, d_in), to which the update is added.

    Its output is more than scores; some models take their type from it, so the weight keeps its.
    """

    def __call__(self, *args, **options):
        weight, (a, b) = self.frozen.weight, self.pair()
        self.frozen.weight = (weight + SCALE * (a @ b).T).astype(weight.dtype)
        try:
            return self.frozen(*args, **options)
        finally:
            self.frozen.weight = weight


class LoRAFused(Adapted, nn.Module):
    """A frozen projection to queries, keys and values at once, with updates `q` and `v`.

    The keys stay bit for bit those of the frozen projection.
    """

    def __init__(
        self, frozen: nn.Module, layout: Layout, ranks: dict[str, int], scale: float = SCALE
    ):
        super().__init__()
        self.frozen, self.layout = frozen, layout
        d_in = linear_shape(frozen)[1]
        for name, r in ranks.items():
            self[name] = LowRank(d_in, layout.num_rows(name), r, scale)

    def __call__(self, x: mx.array) -> mx.array | list[mx.array]:
        (a, b), y = self.pair(), self.frozen(x)
        if isinstance(y, mx.array):
            return add_update(y, low_product(x, a), b)
        # afm7's layer splits its output itself.
        whole = add_update(mx.concatenate(y, axis=-1), low_product(x, a), b)
        return whole.split(self.frozen.indices, axis=-1)

    def pair(self) -> tuple[mx.array, mx.array]:
        """One A and B for the whole projection: the A's side by side, the B's with zeros added."""
        groups, q, k, _ = self.layout
        rows = linear_shape(self.frozen)[0] // groups
        low_a, low_b = [], []
        for name, start in [("q", 0), ("v", q + k)]:
            if name in self:
                a, b = self[name].pair()
                b = b.reshape(len(b), groups, -1)
                b = mx.pad(b, [(0, 0), (0, 0), (start, rows - start - b.shape[2])])
                low_a.append(a)
                low_b.append(b.flatten(1))
        return mx.concatenate(low_a, axis=1), mx.concatenate(low_b)


class Layout(NamedTuple):
    """The rows of a fused projection: in groups, each of so many of q, then k, v and others."""

    groups: int
    q: int
    k: int
    v: int

    def num_rows(self, name: str) -> int:
        """The rows of "q" or "v" in all groups."""
        return self.groups * getattr(self, name)


def is_linear(module: object) -> bool:
    """Whether a module is a linear layer, of MLX or of mlx-lm, float or quantized."""
    is_named = isinstance(module, nn.Module) and "Linear" in type(module).__name__
    return is_named and "weight" in module and module.weight.ndim == 2


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, which quantized weights do not show, or of a router."""
    if hasattr(linear, "in_features"):
        return linear.out_features, linear.in_features
    d_out, d_in = linear.weight.shape
    if "scales" in linear:
        d_in = linear.scales.shape[-1] * linear.group_size
    return d_out, d_in


def lora_modules(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers by their paths."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, Adapted)]
    return dict(sorted(found, key=lambda pair: natural_order(pair[0])))


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """While it lasts, LoRA is in the weights of layers that are not quantized, to generate fast."""
    adapted = {p: m for p, m in lora_modules(model).items() if "scales" not in m.frozen}
    plain = {path: module.merged() for path, module in adapted.items()}
    mx.eval([module.parameters() for module in plain.values()])
    model.update_modules(tree_unflatten(list(plain.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapted.items())))


# --- Where LoRA goes ----------------------------------------------------------------------------

# An attention module is one that has a query projection. The first of these names counts. Latent
# attention has its queries from `q_b_proj`, and its values from the latent vector of
# `kv_a_proj_with_mqa`, the only linear layer on the way to them that each such model has; the keys
# come from the same vector and so change with it.
QUERIES = ("q_b_proj", "q_proj", "c_q", "attn_query")
VALUES = ("v_proj", "c_v", "attn_value", "kv_a_proj_with_mqa", "kv_proj")

# Fused projections: rows of all queries, then all keys, then all values; or grouped by key-value
# head, as in GPT-NeoX, InternLM2 and Qwen3-Next. Those of linear attention are the last of each.
CONTIGUOUS = ("qkv_proj", "q_k_v_proj", "qkvg_proj", "Wqkv", "W_pack", "c_attn", "att_proj",
              "in_proj_qkv")  # fmt: skip
GROUPED = ("query_key_value", "wqkv", "in_proj_qkvz")
NOT_GROUPED = ("bailing",)  # model families whose query_key_value is contiguous

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "attn_out")  # what reads the attention

ROUTERS = ("gate", "router")

# DeepSeek's sparse attention chooses tokens with a small attention of its own, which is left alone.
EXCLUDED = ("indexer", "compressor")

Shape = tuple[int, int]  # (d_out, d_in)


def find_targets(model: nn.Module, num_layers: int) -> list[str]:
    """The paths of the projections to adapt in the last layers (all, where there are fewer).

    They are the query and value projections of each attention, linear attention too, and the router
    of a mixture of experts; those of a fused projection P are called P.q and P.v.

    Raises:
        UserError: there is no attention in those layers.
    """
    last = last_layers(model, num_layers)
    attention = [path for path, _ in attention_projections(model) if path.startswith(last)]
    routers = [path for path, _ in router_projections(model) if path.startswith(last)]
    if not attention:
        raise UserError(
            f"the last {min(num_layers, len(model.layers))} layers of this model "
            f"({model_family(type(model))}) have no attention for LoRA to adapt; raise "
            "--lora-layers, or take another model"
        )
    return sorted(attention + routers, key=natural_order)


def attention_projections(model: nn.Module) -> Iterator[tuple[str, Shape]]:
    """The query and value projections of all attention modules."""
    for path, attention in model.named_modules():
        if any(name in EXCLUDED for name in path.split(".")):
            continue
        shapes = {n: linear_shape(child) for n, child in attention.items() if is_linear(child)}
        for name in [name for name in (*CONTIGUOUS, *GROUPED) if name in shapes]:
            layout = fused_layout(model, attention, name)
            for which in "qv":
                yield f"{path}.{name}.{which}", (layout.num_rows(which), shapes[name][1])
        query = [name for name in QUERIES if name in shapes]
        value = [name for name in VALUES if name in shapes]
        for name in [*query[:1], *(value[:1] if query else [])]:
            yield f"{path}.{name}", shapes[name]


def fused_layout(model: nn.Module, attention: nn.Module, name: str) -> Layout:
    """The layout of a fused projection, from its shape and that of the output projection.

    What the output projection reads is as wide as the queries; in linear attention, whose keys are
    as wide as the queries, it is as wide as the values. Rows after the values (`…g`, `…z`) are a
    gate of that width.
    """
    rows = linear_shape(attention[name])[0]
    width = next(linear_shape(attention[output])[1] for output in OUTPUTS if output in attention)
    if name.startswith("in_proj"):
        v = width
        q = k = (rows - (2 * v if name.endswith("z") else v)) // 2
        head = getattr(attention, "head_k_dim", k)
    else:
        q = width
        k = v = (rows - (2 * q if name.startswith("qkvg") else q)) // 2
        head = getattr(attention, "head_dim", k)
    is_grouped = name in GROUPED and not model_family(type(model)).startswith(NOT_GROUPED)
    groups = k // head if is_grouped else 1
    return Layout(groups, q // groups, k // groups, v // groups)


def router_projections(model: nn.Module) -> Iterator[tuple[str, Shape]]:
    """The routers of all mixtures of experts: each a linear layer, or holds one, or a weight."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in ROUTERS or any(p in path for p in ("attn", "attention")):
            continue
        if "weight" in module and module.weight.ndim == 2:
            yield path, linear_shape(module)
        else:
            for name, child in module.items():
                if is_linear(child):
                    yield f"{path}.{name}", linear_shape(child)


def layer_paths(model: nn.Module) -> list[str]:
    """The paths of the model's layers, such as `model.layers.9`, from first to last."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model.layers]


def last_layers(model: nn.Module, number: int) -> tuple[str, ...]:
    """The beginnings of all paths in the last layers of a model."""
    return tuple(f"{path}." for path in layer_paths(model)[-number:])


def natural_order(path: str) -> list[tuple[int, str]]:
    """A sort key under which layer 9 comes before layer 10."""
    return [(len(name) if name.isdecimal() else 0, name) for name in path.split(".")]


def add_lora(model: nn.Module, ranks: dict[str, int], scale: float = SCALE) -> None:
    """Freeze the model and put a fresh low-rank update of the given rank at each path.

    A path names a linear layer, a router, or the slice `q` or `v` of a fused projection.
    """
    modules = dict(model.named_modules())
    adapted, fused = {}, {}
    for path, r in ranks.items():
        if path not in modules:
            projection, _, name = path.rpartition(".")
            fused.setdefault(projection, {})[name] = r
        else:
            kind = LoRALinear if is_linear(modules[path]) else LoRARouter
            adapted[path] = kind.from_base(modules[path], r, scale)
    beside = {}  # by their parent and the width of their input
    for path, layer in adapted.items():
        beside.setdefault((path.rpartition(".")[0], len(layer.lora_a)), []).append(layer)
    for layers in beside.values():
        Beside(layers)
    for path, slices in fused.items():
        attention, _, name = path.rpartition(".")
        layout = fused_layout(model, modules[attention], name)
        adapted[path] = LoRAFused(modules[path], layout, slices, scale)
    if not hasattr(model, "_no_grad"):  # recurrent_gemma leaves its base class's __init__ out
        nn.Module.__init__(model)
    model.freeze()
    model.update_modules(tree_unflatten(list(adapted.items())))


def count_trainable(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
