"""A model of which each process of a run holds a part (--shard), for models larger than a machine.

Each layer's weights, and those of the embedding and the head, are cut into as many parts as there
are processes. All parts are gathered before the layer computes, again before its gradients, which
is why layers are checkpointed, and dropped after. (It is the third stage of ZeRO, Rajbhandari et
al. 2020, without gradients and moments, which frozen weights do not have.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import models
from lora_finetune.mlx_patches.modules import checkpoint_layers, replace
from lora_finetune.model_folder.files import first_numbers
from lora_finetune.training.distributed import Group

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

ALIGNED = 64  # 32-bit words; on CUDA the products that MLX calls take factors to begin so

Weight = tuple[nn.Module, str]  # a module and a name in it


class Part:
    """One process's part of the weights of a module: 1/N of their bytes, one after the other.

    They are exchanged as 32-bit words, so one exchange brings a layer, whatever its types are.

    Attributes:
        words: uint32, as many in each process.
        places: of each weight its module, name, shape, type, and the first of its words.
        is_whole: whether the module has its weights at present.
    """

    def __init__(self, weights: list[Weight], group: Group):
        self.comm, self.places, self.is_whole, end = group.comm, [], False, 0
        for module, name in weights:
            array = module[name]
            self.places.append((module, name, array.shape, array.dtype, end))
            end += -(-array.nbytes // (4 * ALIGNED)) * ALIGNED
        size = -(-end // group.size)
        first, pieces = group.rank * size, [mx.array([], mx.uint32)]
        for module, name, *_, start in self.places:
            words, module[name] = as_words(module[name]), None
            pieces.append(words[max(0, first - start) : max(0, first + size - start)])
        part = mx.concatenate(pieces)
        self.words = mx.pad(part, (0, size - part.size))
        mx.eval(self.words)
        self.put_weights()

    def put_weights(self, *after: mx.array) -> None:
        """Put the whole weights into the module, to be gathered when these arrays are computed."""
        words = self.words
        if after:  # words take no part in the gradients, for which MLX would need rules
            [words] = mx.depends([words], list(map(mx.stop_gradient, after)))
        words = mx.distributed.all_gather(words, group=self.comm)
        for module, name, shape, dtype, start in self.places:
            size = prod(shape)
            end = start - (-size * dtype.size // 4)
            module[name] = words[start:end].view(dtype)[:size].reshape(shape)


def as_words(array: mx.array) -> mx.array:
    """The bytes of an array as uint32, with zeros up to a multiple of ALIGNED."""
    padding = -array.size % (4 * ALIGNED // array.itemsize)
    return mx.pad(array.flatten(), (0, padding)).view(mx.uint32)


def share_out(model: nn.Module, group: Group, numbers: dict[str, list[float]]) -> None:
    """Read a model, but keep only a part of each layer, embedding and head; freeze it.

    Args:
        numbers: gets the first numbers of each of these weights, by their paths.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    in_layers = {id(module) for layer in model.layers for module in layer.modules()}
    beside = [m for m in model.modules() if models.is_linear(m) or hasattr(m, "as_linear")]
    beside = [module for module in beside if id(module) not in in_layers]
    taken = set()
    for unit in [*model.layers, *beside]:
        weights = [each for each in arrays_of(unit) if key(*each) not in taken]  # some are shared
        taken |= {key(*each) for each in weights}
        numbers |= first_numbers({f"{paths[id(m)]}.{name}": m[name] for m, name in weights})
        unit.part = Part(weights, group)
    mx.eval([m[name] for m, name in arrays_of(model) if key(m, name) not in taken])
    replace([*model.layers, *beside], with_weights)
    replace(
        [module for module in beside if hasattr(module, "as_linear")], with_weights, "as_linear"
    )
    for layer in model.layers:
        layer.freeze()
    checkpoint_layers(model)


def key(module: nn.Module, name: str) -> tuple[int, str]:
    return id(module), name


def arrays_of(module: nn.Module) -> list[Weight]:
    """All arrays in a module and those below it."""
    return [(m, n) for m in module.modules() for n, a in m.items() if isinstance(a, mx.array)]


def with_weights(method: Callable, module: nn.Module, *args: Any, **options: Any) -> Any:
    """A call of a module that has its weights meanwhile."""
    arrays = [a for _, a in tree_flatten((args, options)) if isinstance(a, mx.array)]
    with whole(module, *arrays):
        return method(module, *args, **options)


@contextmanager
def whole(module: nn.Module, *after: mx.array) -> Iterator[None]:
    """While it lasts, a module has its weights, gathered when these arrays have been computed.

    At other times it has what MLX would gather if it were computed: their shapes and types.
    """
    part = getattr(module, "part", None)
    if part is None or part.is_whole:
        yield
        return
    stand_ins = [module[name] for module, name, *_ in part.places]
    part.put_weights(*after)
    part.is_whole = True
    try:
        yield
    finally:
        part.is_whole = False
        for (owner, name, *_), stand_in in zip(part.places, stand_ins, strict=True):
            owner[name] = stand_in
