"""The models of train_lora.py: load one, put LoRA into it, and where in each architecture."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_finetune.base import memory
from lora_finetune.base.errors import UserError, hint
from lora_finetune.base.files import file_checksum
from lora_finetune.mlx_patches import activations, rope
from lora_finetune.mlx_patches.corrections import corrected
from lora_finetune.mlx_patches.modules import intercepted
from lora_finetune.mlx_patches.settings import reads_recorded, warn_of_unread
from lora_finetune.model_folder.model_config import in_mlx_words, is_untied
from lora_finetune.model_folder.model_folder import (
    TOKENIZER_FILES,
    check_files,
    check_memory,
    check_settings,
    find_model,
    shortened,
)
from lora_finetune.model_folder.model_weights import (
    check_head,
    has_own_head,
    in_mlx_layout,
    read_weights,
    with_tied_head,
)
from lora_finetune.model_folder.tokenizer import load as load_tokenizer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.utils import _get_classes, dequantize_model, load_config, load_model
from transformers import PretrainedConfig
from transformers.utils import logging

# Only on CUDA, since without TF32 the newest Macs do not use their matrix units for float32.
if mx.cuda.is_available():
    # TF32 rounds the factors of float32 products to 10 bits, which puts gradients 1 % off.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    # The gradients of cuDNN's attention differ from run to run, so that none could be resumed
    # exactly.
    os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")
    # MLX hands operations over in groups, of which ten may wait: large ones hold gigabytes.
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "20")
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "100")

logging.set_verbosity_error()  # its warnings are for programmers


# --- Loading ------------------------------------------------------------------------------------


def load(path_or_repo: str | Path) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer from a folder or a Hugging Face repository.

    No code that comes with a model is run: no remote code, no pickle. The weights get the types
    that the device is fast with.

    Args:
        path_or_repo: a folder with `config.json`, `model*.safetensors` and a tokenizer, or a
            repository id such as `GuminiResearch/Gumini-1B-Base`.

    Raises:
        UserError: there is no such model, or it cannot be loaded; says which and why.
    """
    folder = find_model(path_or_repo)
    model_type = check_files(folder)
    check_memory(folder)
    read: set[str] = set()
    try:
        with reads_recorded(read):
            model, config, theirs = built(folder, with_weights)
            find_limits(model)  # what is wrong with some settings shows only in a call
        warn_of_unread(model, theirs, read)
        model = in_fast_types(model)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # mlx-lm may raise anything; importing olmo exits
        check_memory(folder, error)
        check_settings(folder)
        raise UserError(
            f"the model {folder} cannot be loaded as mlx-lm's {model_type} ({shortened(error)}); "
            "download its config.json and weights again, or take another model"
        ) from error
    try:
        tokenizer = load_tokenizer(folder, config)
        tokenizer.encode("a")  # what is wrong with some settings shows only in use
    except Exception as error:  # transformers may raise anything too
        check_memory(folder, error)
        check_settings(folder)
        why = "" if (folder / "tokenizer.json").exists() else "there is no tokenizer.json: "
        raise UserError(
            f"the tokenizer of the model {folder} cannot be loaded ({why}{shortened(error)}); "
            "download tokenizer.json, tokenizer_config.json and the like again"
        ) from error
    return model, tokenizer


def in_fast_types(model: nn.Module) -> nn.Module:
    """A model with weights of the types that the device is fast with, evaluated.

    On the CPU they become float32, quantized ones too: MLX's CPU products of other types are 40 and
    more times slower. On CUDA quantized ones are dequantized where that leaves half of the memory
    free, since training takes three times as long with them. Elsewhere they stay as they are.
    """
    if mx.default_device() == mx.cpu:
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
    elif mx.cuda.is_available() and 0 < dequantized_bytes(model) <= memory.available() // 2:
        size = dequantized_bytes(model) / 1e9
        hint(f"the weights are dequantized to {size:.1f} GB for speed on CUDA")
        model = dequantize_model(model)
    mx.eval(model.parameters())
    return model


def load_as_stored(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model as it is in its folder, not evaluated yet, and its configuration there."""
    return built(folder, with_weights)[:2]


def with_weights(words: dict[str, Any], classes: Callable) -> tuple[nn.Module, dict[str, Any]]:
    """The model in the working directory by a configuration, which is returned as it was used."""
    return load_model(Path(), lazy=True, model_config=words, get_model_classes=classes)


def without_weights(words: dict[str, Any], classes: Callable) -> tuple[nn.Module, dict[str, Any]]:
    """A model by a configuration alone, not quantized."""
    model_class, arguments = classes(words)
    return model_class(arguments.from_dict(words)), {}


def built(
    folder: Path, build: Callable[..., tuple[nn.Module, dict[str, Any]]]
) -> tuple[nn.Module, dict[str, Any], PretrainedConfig | None]:
    """A model of mlx-lm for a folder, which may be as transformers 5 saves it.

    Args:
        build: `with_weights` or `without_weights`.

    Returns:
        The model, which computes what PyTorch's does; the configuration in the folder; and the
        settings of the text model as transformers has them, None where it has none.
    """
    # From within the folder, since mlx-lm takes a path for a pattern: [8bit] for one of 8bit. What
    # its modules print is not always so: phi3 says that it leaves out a scaling that is put right.
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        config = load_config(Path())
        if not is_untied(config) and has_own_head(read_weights(Path())):
            config["tie_word_embeddings"] = False
        theirs = rope.read_settings(config)
        classes = partial(model_classes, theirs=theirs)
        words = in_mlx_words(config, theirs)
        model, used = rope.load(partial(build, classes=classes), words, theirs)
    quantization = {name: used[name] for name in used if name.startswith("quantization")}
    return model, config | quantization, theirs


def model_classes(
    config: dict[str, Any], theirs: PretrainedConfig | None
) -> tuple[Callable[[Any], nn.Module], type]:
    """What makes mlx-lm's model, for weights as transformers 5 saves them, and of what arguments.

    Args:
        config: in mlx-lm's words.
        theirs: the settings of the text model as transformers has them, None where it has none.
    """
    base, arguments = _get_classes(config)
    settings = config | (config.get("text_config") or {})

    class Model(base):
        __module__ = base.__module__  # which tells the family

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if settings.get("tie_word_embeddings") is False:
                check_head(self, weights)
            weights = in_mlx_layout(weights, self, settings)
            if hasattr(base, "sanitize"):
                weights = super().sanitize(weights)
            return with_tied_head(self, weights) if settings.get("tie_word_embeddings") else weights

    return corrected(Model, config, theirs), arguments


def as_loaded(folder: Path, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The parameters of the model in a folder, by mlx-lm's names, from arrays such as it has."""
    model, *_ = built(folder, without_weights)
    # Copies, since some are changed in place.
    return model.sanitize({name: array.astype(array.dtype) for name, array in arrays.items()})


def dequantized_bytes(model: nn.Module) -> int:
    """Bytes that the quantized weights of a model have dequantized; 0 where there are none."""
    quantized = [module for module in model.modules() if "scales" in module]
    return sum(m.weight.size * 32 // m.bits * float_type(m).size for m in quantized)


def float_type(module: nn.Module) -> mx.Dtype:
    """The type that the weight of a layer has where it is float, and dequantized else."""
    dtype = module.scales.dtype if "scales" in module else module.weight.dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16


# --- Vocabulary and positions -------------------------------------------------------------------


class Limits(NamedTuple):
    """What a model may be given; MLX does not check the bounds of embedding lookups.

    Attributes:
        vocab_size: each id below it has all its embeddings and a logit.
        max_positions: how many positions have an embedding; infinite where none are looked up.
    """

    vocab_size: int
    max_positions: float


def find_limits(model: nn.Module) -> Limits:
    """The limits of a model, from the indices that its embeddings are asked for in one call.

    The call has three tokens, all of an id that no table has. A table that is asked for this id is
    indexed by ids, and one that is asked for consecutive numbers by positions. Other indices the
    model has computed itself, and keeps in range. The tables answer with their first row, and
    nothing but indices is computed.
    """
    lookups = []

    def look_up(table: nn.Module, kind: type, indices: mx.array) -> mx.array:
        lookups.append((table.weight.shape[0], np.array(indices).flatten()))
        return kind.__call__(table, mx.zeros_like(indices))

    tables = [m for m in model.modules() if "Embedding" in type(m).__name__ and "weight" in m]
    unknown = 2**31 - 1
    with contextlib.ExitStack() as stack:
        for table in {id(table): table for table in tables}.values():
            stack.enter_context(intercepted(table, partial(look_up, table, type(table))))
        logits = model(mx.full((1, 3), unknown, mx.int32))
    by_id = [rows for rows, indices in lookups if (indices == unknown).all()]
    by_position = [rows - int(i[0]) for rows, i in lookups if (np.diff(i) == 1).all()]
    return Limits(min([logits.shape[-1], *by_id]), min(by_position, default=math.inf))


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

    def pair(self) -> tuple[mx.array, mx.array]:
        """A (d_in, r) and B (r, d_out) for the scale of adapter files, 20."""
        b = self.lora_b if self.scale == SCALE else self.lora_b * (self.scale / SCALE)
        return self.lora_a, b


def project(
    x: mx.array, linears: list[nn.Module], pairs: list[tuple[mx.array, mx.array]], scale: float
) -> list[mx.array]:
    """linear(x) + scale · (x a) b for each of some frozen layers with its A and B.

    The updates are computed in float32, the type of A and B, and rounded to that of the outputs. Of
    x no copy in float32 is kept for the gradients. The gradient to x is summed up in the products
    with the weights, where they are float: additions of their own would be passes over the array,
    and a kernel for CUDA to compile.
    """
    number = len(linears)

    @mx.custom_function
    def forward(x: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        a, b = arrays[:number], arrays[number:]
        wide, outputs, kept = x.astype(a[0].dtype), [], []
        for i in range(number):
            y, z = linears[i](x), activations.scaled_product(wide, a[i], scale)
            # Else, compiled, the cast and the sum would be a kernel for CUDA to compile.
            (update,) = mx.depends([(z @ b[i]).astype(y.dtype)], [y])
            outputs.append(y + update)
            kept.append(z)  # scaled, since it has r columns only
        return *outputs, *kept

    @forward.vjp
    def gradients(primals: tuple, cotangents: tuple, outputs: tuple) -> list[mx.array]:
        x, *arrays = primals
        a, b, z, dy = arrays[:number], arrays[number:], outputs[number:], cotangents[:number]
        (x,) = mx.depends([x], [dy[0]])  # else, compiled, its copy of above would be kept
        rows = [array.flatten(0, -2).astype(a[0].dtype) for array in (x, *dy)]
        dz = [activations.scaled_product(rows[1 + i], b[i].T, scale) for i in range(number)]
        of_b = [z[i].flatten(0, -2).T @ rows[1 + i] for i in range(number)]
        joined, ends = mx.concatenate(dz, axis=1), np.cumsum([each.shape[1] for each in a])
        of_a = (rows[0].T @ joined).split(ends[:-1].tolist(), axis=1)
        of_x = (joined @ mx.concatenate(a, axis=1).T).reshape(x.shape).astype(x.dtype)
        for linear, cotangent in zip(linears, dy, strict=True):
            if type(linear) is nn.Linear:
                of_x = mx.addmm(of_x, cotangent, linear.weight)
            else:
                of_x += mx.vjp(linear, [x], [cotangent])[1][0]
        return [of_x.astype(x.dtype), *of_a, *of_b]

    a, b = zip(*pairs, strict=True)
    return list(forward(x, *a, *b)[:number])


class Adapted:
    """What has taken the place of a layer: the frozen layer with an update, one A and B in all."""

    @property
    def frozen(self) -> nn.Module:
        return self.linear

    def merged(self) -> nn.Module:
        """A layer that does the same, with the update in its weight."""
        return with_update(self.frozen, *self.pair())


class LoRALinear(Adapted, LowRank):
    """A frozen linear layer, float or quantized, with a low-rank update.

    Attributes:
        together: it and the others that are called on the same input.
    """

    @staticmethod
    def from_base(linear: nn.Module, r: int = RANK, scale: float = SCALE) -> LoRALinear:
        d_out, d_in = linear_shape(linear)
        adapted = LoRALinear(d_in, d_out, r, scale)
        adapted.linear = linear
        Together([adapted])  # on its own at first
        return adapted

    def __call__(self, x: mx.array) -> mx.array:
        return self.together(self, x)


class Together:
    """Adapted layers that are called one after the other on the same input: the first computes all.

    The outputs of the others wait for their calls. If one is called on another input (another
    array, even an equal one), each is on its own from then on. All have one scale.
    """

    def __init__(self, layers: list[LoRALinear]):
        self.layers, self.input, self.waiting = layers, None, {}
        for layer in layers:
            layer.together = self

    def __call__(self, layer: LoRALinear, x: mx.array) -> mx.array:
        if self.waiting and self.input is not x:
            for each in self.layers:
                Together([each])
            return layer(x)
        if id(layer) not in self.waiting:
            pairs = [(each.lora_a, each.lora_b) for each in self.layers]
            outputs = project(x, [each.linear for each in self.layers], pairs, layer.scale)
            self.input, self.waiting = x, dict(zip(map(id, self.layers), outputs, strict=True))
        y = self.waiting.pop(id(layer))
        self.input = x if self.waiting else None
        return y


class LoRARouter(Adapted, LowRank):
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

    @property
    def frozen(self) -> nn.Module:
        return self.router


class LoRAFused(Adapted, nn.Module):
    """A frozen projection to queries, keys and values at once; queries and values are updated.

    The keys stay bit for bit those of the frozen projection. The updates are named `q` and `v`.
    """

    def __init__(
        self, linear: nn.Module, layout: Layout, ranks: dict[str, int], scale: float = SCALE
    ):
        super().__init__()
        self.linear = linear
        self.layout = layout
        d_in = linear_shape(linear)[1]
        for part, r in ranks.items():
            self[part] = LowRank(d_in, layout.num_rows(part), r, scale)

    def __call__(self, x: mx.array) -> mx.array | list[mx.array]:
        ends = self.linear.get("indices")  # of one such layer, which splits its output itself
        if ends is None:
            return project(x, [self.linear], [self.pair()], SCALE)[0]

        def whole(x: mx.array) -> mx.array:
            return mx.concatenate(self.linear(x), axis=-1)

        return project(x, [whole], [self.pair()], SCALE)[0].split(ends, axis=-1)

    def pair(self) -> tuple[mx.array, mx.array]:
        """One A and B for the whole projection: the A's side by side, the B's with zeros added."""
        groups = self.layout.groups
        rows = linear_shape(self.linear)[0] // groups
        low_a, low_b = [], []
        for part in "qv":
            if part in self:
                a, b = self[part].pair()
                b = b.reshape(len(b), groups, -1)
                start = self.layout.first(part)
                end = rows - start - b.shape[2]
                low_a.append(a)
                low_b.append(mx.pad(b, [(0, 0), (0, 0), (start, end)]).flatten(1))
        return mx.concatenate(low_a, axis=1), mx.concatenate(low_b)


class Layout(NamedTuple):
    """How a fused projection's rows are ordered: in groups, each of so many q, k, v, other rows."""

    groups: int
    q: int
    k: int
    v: int

    def num_rows(self, part: str) -> int:
        """The rows of the part "q" or "v" in all groups."""
        return self.groups * getattr(self, part)

    def first(self, part: str) -> int:
        """Where in a group the rows of "q" or "v" begin."""
        return {"q": 0, "v": self.q + self.k}[part]

    def rows(self, part: str, d_out: int) -> np.ndarray:
        """Which of the projection's d_out rows those of "q" or "v" are, in their order."""
        in_group = self.first(part) + np.arange(getattr(self, part))
        return (np.arange(0, d_out, d_out // self.groups)[:, None] + in_group).flatten()


def is_linear(module: object) -> bool:
    """Whether a module is a linear layer, of MLX or of mlx-lm, float or quantized."""
    return (
        isinstance(module, nn.Module)
        and "Linear" in type(module).__name__
        and "weight" in module
        and module.weight.ndim == 2
    )


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, which quantized weights do not show."""
    if hasattr(linear, "in_features"):
        return linear.out_features, linear.in_features
    d_out, d_in = linear.weight.shape
    if "scales" in linear:
        d_in = linear.scales.shape[-1] * linear.group_size
    return d_out, d_in


def with_update(module: nn.Module, a: mx.array, b: mx.array) -> nn.Module:
    """A copy of a linear layer or router with the update of A and B, for scale 20, in its weight.

    The sum is made in float32 and rounded once, to the type of the weight. A quantized layer
    is dequantized for it and not quantized again, which would cost more than many an update.
    """
    weight, dtype = float_weight(module)
    if "scales" in module:
        merged = nn.Linear(1, 1, bias="bias" in module)
        if "bias" in module:
            merged.bias = module.bias
    else:
        merged = copy.copy(module)
    merged.weight = (weight + SCALE * (a @ b).T).astype(dtype)
    return merged


def can_merge(module: nn.Module) -> bool:
    """Whether `float_weight` knows the weight of a linear layer or router."""
    if type(module) is nn.QuantizedLinear:
        return True
    return "scales" not in module and mx.issubdtype(module.weight.dtype, mx.floating)


def float_weight(module: nn.Module) -> tuple[mx.array, mx.Dtype]:
    """The weight (d_out, d_in) of a linear layer or router in float32, and its own float type."""
    weight = module.weight
    if "scales" in module:
        weight = mx.dequantize(
            weight, module.scales, module.get("biases"), module.group_size, module.bits,
            module.mode, module.get("global_scale"), dtype=mx.float32,
        )  # fmt: skip
    return weight.astype(mx.float32), float_type(module)


def lora_modules(model: nn.Module) -> dict[str, Adapted]:
    """What has taken the place of the adapted layers, by their paths."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, Adapted)}
    return {path: found[path] for path in sorted(found, key=natural_order)}


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """While it lasts, LoRA is in the weights of the layers that are not quantized.

    Such a model generates as fast as without an adapter.
    """
    adapted = {p: m for p, m in lora_modules(model).items() if "scales" not in m.frozen}
    plain = {path: module.merged() for path, module in adapted.items()}
    mx.eval([module.parameters() for module in plain.values()])
    model.update_modules(tree_unflatten(list(plain.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapted.items())))


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
EXCLUDED = ("indexer", "compressor")


def find_targets(model: nn.Module, num_layers: int) -> dict[str, tuple[int, int]]:
    """Where LoRA goes in the last `num_layers` layers (in all, where there are fewer).

    That is into the query and value projections of each attention, linear attention too, and in a
    mixture of experts into the router. Of a fused projection P the parts P.q and P.v are meant.

    Returns:
        Paths such as `model.layers.9.self_attn.q_proj`, first layer first, and their (d_out, d_in).

    Raises:
        UserError: there is no attention in those layers.
    """
    last = last_layers(model, num_layers)
    attention = {path: s for path, s in attention_projections(model) if path.startswith(last)}
    routers = {path: s for path, s in router_projections(model) if path.startswith(last)}
    if not attention:
        raise UserError(
            f"the last {min(num_layers, len(model.layers))} layers of this model "
            f"({model_family(model)}) have no attention for LoRA to adapt; raise "
            "--lora-layers, or take another model"
        )
    found = attention | routers
    return {path: found[path] for path in sorted(found, key=natural_order)}


def attention_projections(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """The query and value projections of all attention modules, and their (d_out, d_in)."""
    for path, attention in model.named_modules():
        if any(part in EXCLUDED for part in path.split(".")):
            continue
        linears = linear_names(attention)
        for name in fused_names(attention):
            layout = fused_layout(model, attention, name)
            for part in "qv":
                d_in = linear_shape(attention[name])[1]
                yield f"{path}.{name}.{part}", (layout.num_rows(part), d_in)
        query = [name for name in QUERIES if name in linears]
        value = [name for name in VALUES if name in linears]
        for name in [*query[:1], *(value[:1] if query else [])]:
            yield f"{path}.{name}", linear_shape(attention[name])


def linear_names(module: nn.Module) -> set[str]:
    """What the linear layers directly in a module are called there."""
    return {name for name, child in module.items() if is_linear(child)}


def fused_names(attention: nn.Module) -> list[str]:
    """What the fused projections of an attention module are called."""
    return [name for name in (*CONTIGUOUS, *GROUPED) if name in linear_names(attention)]


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
        raise UserError(
            f"where in {name} of this kind of model ({model_family(model)}) queries and values "
            "are is not known, so it cannot be adapted; take another model"
        )
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


def router_projections(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
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


def last_layers(model: nn.Module, number: int) -> tuple[str, ...]:
    """What the paths in the last layers of a model begin with; in all, where there are fewer."""
    return tuple(f"{path}." for path in layer_paths(model)[-number:])


def natural_order(path: str) -> list[tuple[int, str]]:
    """A sort key under which layer 9 comes before layer 10."""
    return [(len(part) if part.isdecimal() else 0, part) for part in path.split(".")]


def checkpoint_layers(model: nn.Module) -> None:
    """Let layers keep only their inputs for the backward pass, and compute the rest again."""
    for layer in {type(layer): layer for layer in model.layers}.values():
        grad_checkpoint(layer)


def add_lora(model: nn.Module, ranks: dict[str, int], scale: float = SCALE) -> None:
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
            wrapped[path] = LoRALinear.from_base(modules[path], r, scale)
        else:
            wrapped[path] = LoRARouter.from_base(modules[path], r, scale)
    beside: dict[tuple[str, int], list[LoRALinear]] = {}  # of one parent and input size
    for path, layer in wrapped.items():
        if isinstance(layer, LoRALinear):
            beside.setdefault((path.rpartition(".")[0], len(layer.lora_a)), []).append(layer)
    for layers in beside.values():
        Together(layers)
    for path, parts in fused.items():
        attention, _, name = path.rpartition(".")
        layout = fused_layout(model, modules[attention], name)
        wrapped[path] = LoRAFused(modules[path], layout, parts, scale)
    if not hasattr(model, "_no_grad"):  # recurrent_gemma leaves its base class's __init__ out
        nn.Module.__init__(model)
    model.freeze()
    model.update_modules(tree_unflatten(list(wrapped.items())))


def count_trainable(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.trainable_parameters()))


def fingerprints(model: nn.Module, folder: Path) -> dict[str, str]:
    """Checksums that tell a model from others: of its weights, configuration and tokenizer.

    Of each weight the name, the shape and the first numbers count.
    """
    # Of copies: to read numbers of an array on CUDA, MLX would move all of it to shared memory.
    sample = [
        (name, a.shape, mx.contiguous(a.flatten()[:16]))
        for name, a in tree_flatten(model.parameters())
    ]
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
