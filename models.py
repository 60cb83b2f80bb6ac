"""The models of train_lora.py: load one, and put LoRA into it."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import weakref
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

from lora_finetune.base import memory
from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches import activations, loading
from lora_finetune.mlx_patches.settings import warn_of_unread
from lora_finetune.model_folder import files, tokenizer
from lora_finetune.model_folder.hub import find_model
from lora_finetune.model_folder.targets import (
    Layout,
    Shape,
    find_targets,
    fused_layout,
    is_expert,
    is_linear,
    is_stacked,
    linear_shape,
    natural_order,
    projections,
)

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
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

    The form, names, shapes and defaults are those of `mlx_lm.tuner.lora`: of a weight (d_out, d_in)
    `lora_a` (d_in, r), uniform in ±1/sqrt(d_in), and `lora_b` (r, d_out), zero, both float32; of
    stacked experts (experts, r, d_in) and (experts, d_out, r).
    """

    def __init__(self, shape: Shape, r: int = RANK, scale: float = SCALE):
        super().__init__()
        *experts, d_out, d_in = shape
        bound = 1 / math.sqrt(d_in)
        self.scale = scale
        shapes = ((*experts, r, d_in), (*experts, d_out, r)) if experts else ((d_in, r), (r, d_out))
        self.lora_a = mx.random.uniform(-bound, bound, shapes[0])
        self.lora_b = mx.zeros(shapes[1])

    def pair(self) -> tuple[mx.array, mx.array]:
        """A and B for the scale of adapter files."""
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


def update(a: mx.array, b: mx.array) -> mx.array:
    """The update of a weight by A and B, of its shape."""
    return SCALE * ((a @ b).T if a.ndim == 2 else b @ a)


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
            is_one = a.ndim == 2
            layer = nn.Linear(1, 1, bias=False) if is_one else SwitchLinear(1, 1, 1, bias=False)
            if "bias" in self.frozen:
                layer.bias = self.frozen.bias
        layer.weight = (weight + update(a, b)).astype(dtype)
        return layer


class LoRALinear(Adapted, LowRank):
    """A frozen linear layer, float or quantized, with a low-rank update."""

    def __call__(self, x: mx.array) -> mx.array:
        return add_update(self.frozen(x), self.beside.product(self, x), self.pair()[1])

    @classmethod
    def from_base(cls, frozen: nn.Module, r: int = RANK, scale: float = SCALE) -> LoRALinear:
        adapted = cls(linear_shape(frozen), r, scale)
        adapted.frozen = frozen
        Beside([adapted])
        return adapted


class Beside:
    """Adapted layers of one parent, called on one input as a rule: queries, keys and values.

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
        self.frozen.weight = (weight + update(a, b)).astype(weight.dtype)
        try:
            return self.frozen(*args, **options)
        finally:
            self.frozen.weight = weight


class LoRAExperts(LoRALinear):
    """Frozen stacked experts, each with a low-rank update of its own."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.frozen(x, indices, sorted_indices=sorted_indices)
        for factor in self.pair():
            x = mx.gather_mm(
                x.astype(factor.dtype), factor.swapaxes(1, 2), rhs_indices=indices,
                sorted_indices=sorted_indices,
            )  # fmt: skip
        return y + (SCALE * x).astype(y.dtype)


class LoRAFused(Adapted, nn.Module):
    """A frozen projection to several at once, with updates of some of them, such as `q` and `v`.

    The others, such as the keys, stay bit for bit those of the frozen projection.
    """

    def __init__(
        self, frozen: nn.Module, layout: Layout, ranks: dict[str, int], scale: float = SCALE
    ):
        super().__init__()
        self.frozen, self.layout = frozen, layout
        d_in = linear_shape(frozen)[1]
        for name, r in ranks.items():
            self[name] = LowRank((layout.num_rows(name), d_in), r, scale)

    def __call__(self, x: mx.array) -> mx.array | list[mx.array]:
        (a, b), y = self.pair(), self.frozen(x)
        if isinstance(y, mx.array):
            return add_update(y, low_product(x, a), b)
        # afm7's layer splits its output itself.
        whole = add_update(mx.concatenate(y, axis=-1), low_product(x, a), b)
        return whole.split(self.frozen.indices, axis=-1)

    def pair(self) -> tuple[mx.array, mx.array]:
        """One A and B for the whole projection: the A's side by side, the B's with zeros added."""
        groups, sizes = self.layout
        rows, start = linear_shape(self.frozen)[0] // groups, 0
        low_a, low_b = [], []
        for name, size in sizes.items():
            if name in self:
                a, b = self[name].pair()
                b = b.reshape(len(b), groups, size)
                b = mx.pad(b, [(0, 0), (0, 0), (start, rows - start - size)])
                low_a.append(a)
                low_b.append(b.flatten(1))
            start += size
        return mx.concatenate(low_a, axis=1), mx.concatenate(low_b)


def lora_modules(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers by their paths."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, Adapted)]
    return dict(sorted(found, key=lambda pair: natural_order(pair[0])))


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """While it lasts, LoRA is in the weights of layers that are not quantized, to generate fast.

    Not where a second copy of them would take most of the free memory.
    """
    adapted = {p: m for p, m in lora_modules(model).items() if "scales" not in m.frozen}
    free = memory.available() - mx.get_active_memory()
    if sum(module.frozen.weight.nbytes for module in adapted.values()) > free / 2:
        adapted = {}
    plain = {path: module.merged() for path, module in adapted.items()}
    mx.eval([module.parameters() for module in plain.values()])
    model.update_modules(tree_unflatten(list(plain.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapted.items())))


def add_lora(model: nn.Module, ranks: dict[str, int], scale: float = SCALE) -> None:
    """Freeze the model and put a fresh low-rank update of the given rank at each path.

    A path names a linear layer, a router, stacked experts, or a role's rows of a fused projection.
    """
    modules, roles = dict(model.named_modules()), projections(model)
    adapted, fused = {}, {}
    for path, r in ranks.items():
        if path not in modules:
            projection, _, name = path.rpartition(".")
            fused.setdefault(projection, {})[name] = r
        else:
            kind = LoRAExperts if is_stacked(modules[path]) else LoRARouter
            kind = LoRALinear if is_linear(modules[path]) else kind
            adapted[path] = kind.from_base(modules[path], r, scale)
    beside = {}  # by their parent and its input, or what else has that width
    for path, layer in adapted.items():
        reads_input = path not in roles or roles[path].role not in ("o", "down")
        place = path.rpartition(".")[0], len(layer.lora_a), reads_input
        beside.setdefault(place, []).append(layer)
    for layers in beside.values():
        Beside(layers)
    for path, slices in fused.items():
        parent, _, name = path.rpartition(".")
        layout = fused_layout(model, modules[parent], name)
        adapted[path] = LoRAFused(modules[path], layout, slices, scale)
    if not hasattr(model, "_no_grad"):  # recurrent_gemma leaves its base class's __init__ out
        nn.Module.__init__(model)
    model.freeze()
    model.update_modules(tree_unflatten(list(adapted.items())))


def count_trainable(model: nn.Module, of_experts: bool = False) -> int:
    """The number of trainable parameters, or of those of experts alone."""
    modules = lora_modules(model).items()
    counted = [m for path, m in modules if not of_experts or is_expert(path, m.frozen)]
    return sum(array.size for m in counted for _, array in tree_flatten(m.trainable_parameters()))
