"""The hidden states below the first adapted layer, which training does not change: computed once.

Of causal layers, the states of a text depend neither on what is padded behind it nor on the texts
beside it. So they can be kept for later epochs, and for every validation.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_finetune.base import memory
from lora_finetune.base.errors import warn
from lora_finetune.mlx_patches import rope
from lora_finetune.mlx_patches.compiling import compiled_if_possible, hint_if_compiling
from lora_finetune.mlx_patches.modules import intercepted
from lora_finetune.model_folder.config import model_family
from lora_finetune.texts import batching
from lora_finetune.training.distributed import Group
from lora_finetune.training.losses import Loss

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# Whether the layers are called compiled. Python takes milliseconds to call them, which a GPU might
# have to wait for; what a CPU takes to compute them is a hundred times as long.
COMPILED = mx.default_device() == mx.gpu


class Prefix:
    """The layers of a model below the first one that is trained.

    Attributes:
        model: the model that they are in.
        num_layers: how many they are.
    """

    def __init__(self, model: nn.Module, num_layers: int):
        self.model, self.num_layers = model, num_layers
        self.call = compiled_if_possible(self.hidden) if COMPILED else self.hidden

    def states(self, tokens: np.ndarray, lengths: np.ndarray) -> mx.array:
        """What these layers make of a batch: what the first trained layer is given.

        Args:
            tokens: int32 (rows, width); all but the last of a row are inputs.
            lengths: tokens of each text, int64 (rows,).

        Returns:
            (rows, width − 1, size), zero in padding, of the model's own type; not computed yet.
        """
        inputs = mx.array(tokens[:, :-1])
        lengths = mx.array(lengths.astype(np.int32))
        is_text = mx.arange(inputs.shape[1]) < lengths[:, None] - 1
        return mx.where(is_text[..., None], self.call(inputs, lengths), 0)

    def hidden(self, inputs: mx.array, lengths: mx.array) -> mx.array:
        """The states (rows, length, size) of texts (rows, length) of lengths, in padding too."""
        given = []

        def pass_on(hidden: mx.array, *_: object, **__: object) -> mx.array:
            given.append(hidden)
            return hidden

        was_training = self.model.training
        self.model.eval()  # some layers have faster kernels where there is no gradient
        try:
            layers = intercepted_layers(self.model.layers[self.num_layers :], pass_on)
            with layers, rope.text_lengths(lengths):
                self.model(inputs)
        finally:
            self.model.train(was_training)
        return given[0]

    @contextmanager
    def replaced(self, states: mx.array) -> Iterator[None]:
        """While it lasts, these layers put out given states for a batch of that shape."""

        def reply(hidden: mx.array, *_: object, **__: object) -> mx.array:
            return states if hidden.shape == states.shape else hidden

        with intercepted_layers(self.model.layers[: self.num_layers], reply):
            yield

    def loss(self, loss: Loss) -> Loss:
        """A loss that takes the states of the batch as its last argument."""

        def loss_from_states(model: nn.Module, *batch: mx.array) -> tuple[mx.array, mx.array]:
            *arrays, states = batch
            with self.replaced(states):
                return loss(model, *arrays)

        return loss_from_states

    def examples(self, examples: batching.Examples) -> batching.Examples:
        """The same texts in batches with their states, computed anew for each batch."""

        def states(rows: np.ndarray, tokens: np.ndarray) -> mx.array:
            return self.states(tokens, examples.lengths[rows])

        return replace(examples, states=states)


@contextmanager
def intercepted_layers(layers: list[nn.Module], reply: Callable[..., mx.array]) -> Iterator[None]:
    """While it lasts, `reply` answers in place of each of these layers."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(intercepted(layer, reply))
        yield


def find(model: nn.Module) -> Prefix | None:
    """The layers of a model below the first one that is trained; None where there are none.

    None too, with a line that says so, where their states do not stand for all that they do: some
    architectures hand keys and values of one layer to others, or more than states.
    """
    trained = [bool(tree_flatten(layer.trainable_parameters())) for layer in model.layers]
    if not any(trained) or trained[0]:
        return None
    prefix = Prefix(model, trained.index(True))
    # Suppressed: whatever an architecture does where layers do not do their part.
    with hint_if_compiling("the model's layers on a few tokens"), suppress(Exception):
        if stands_for_its_layers(prefix):
            return prefix
    warn(
        f"in models of this kind ({model_family(type(model))}) the layers below the first adapted "
        "one have to be computed again in each epoch, though nothing in them changes; training is "
        "right, only slower"
    )
    return None


def stands_for_its_layers(prefix: Prefix) -> bool:
    """Whether a model's logits are the same from states, and a text's states the same alone.

    Shown on a text, and a shorter one with padding behind it. The shorter one is computed alone in
    between, so that nothing that layers may have left behind for others can serve.
    """
    # int32 as in a batch, and no array[0], which is a gather: CUDA would have to compile another.
    tokens = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 0, 0, 0, 0]], np.int32)
    model, lengths = prefix.model.eval(), [9, 5]
    logits, states = model(mx.array(tokens[:, :-1])), prefix.states(tokens, np.array(lengths))
    mx.eval(logits, states)
    if not mx.isfinite(logits[:1]).all().item():
        return True  # of a broken model nothing can be shown, and its first validation ends the run
    alone = prefix.states(tokens[1:, :5], np.array([5]))
    mx.eval(alone)
    with prefix.replaced(states):
        from_states = model(mx.array(tokens[:, :-1]))
    most = mx.finfo(states.dtype).eps ** 0.5
    errors = [relative_error(alone, states[1:, :4])]
    errors += [
        relative_error(from_states[i, : n - 1], logits[i, : n - 1]) for i, n in ((0, 9), (1, 5))
    ]
    return all(error <= most for error in errors) and mx.isfinite(from_states).all().item()


def relative_error(found: mx.array, expected: mx.array) -> float:
    """The norm of the error of a row against that of the row, on average."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    norm = mx.linalg.norm
    return (norm(found - expected, axis=-1) / norm(expected, axis=-1)).mean().item()


# --- Keeping ------------------------------------------------------------------------------------


class Kept:
    """The states of texts, computed for a whole group when one of its texts is first asked for.

    The groups are fixed, so that the last bits of a text's states do not depend on which batch
    asked for them first: on the one after which a run was resumed, for example.

    Attributes:
        examples: the texts, in batches with states that are computed anew.
        groups: arrays of their indices, no two with a text in common.
        place: of each text in them, its group and its row there.
        states: those of each group, (rows, width, size), zero in padding; None until then.
        dtype: of the states.
        room: for each group, where the bytes of its states go in a file: uint8 (rows, width, bytes
            of one). None where they stay in memory.
    """

    def __init__(
        self, examples: batching.Examples, groups: list[np.ndarray], dtype: mx.Dtype,
        room: list[np.ndarray] | None,
    ):  # fmt: skip
        self.examples, self.groups, self.dtype, self.room = examples, groups, dtype, room
        self.place = {
            text: (number, row)
            for number, rows in enumerate(groups)
            for row, text in enumerate(rows.tolist())
        }
        self.states: list[mx.array | np.ndarray | None] = [None] * len(groups)

    def __call__(self, rows: np.ndarray, tokens: np.ndarray) -> mx.array:
        """The states (rows, width − 1, size) of a batch, zero in padding; `rows` are its texts.

        Where one group is missing, MLX may compute it with the step that the batch is for.
        """
        places = [self.place[text] for text in rows.tolist()]
        missing = sorted({number for number, _ in places if self.states[number] is None})
        for number in missing:
            self.states[number] = self.compute(number)
            if len(missing) > 1:
                mx.eval(self.states[number])  # each in turn, in the memory that one takes
        width = tokens.shape[1] - 1
        return mx.stack([self.padded(*place, width) for place in places])

    def compute(self, number: int) -> mx.array | np.ndarray:
        """The states of a group, or their bytes in the file."""
        *_, states = self.examples.batch(self.groups[number])
        if self.room is None:
            return states
        # Of an array that the device failed to compute, NumPy itself would drop the error.
        self.room[number][:] = np.asarray(memoryview(states.view(mx.uint8)))
        return self.room[number]

    def padded(self, number: int, row: int, width: int) -> mx.array:
        """The states of a row of a group, (width, size)."""
        states = self.states[number][row, :width]
        if self.room is not None:
            states = mx.array(states).view(self.dtype)
        return mx.pad(states, [(0, width - len(states)), (0, 0)])


# How much of the memory there is the states of training texts may take, and as much those of
# validation.
MEMORY_SHARE = 1 / 16
# How much of a disk they leave free.
FREE_SHARE = 1 / 10


def keep(
    prefix: Prefix, examples: batching.Examples, groups: list[np.ndarray], folder: Path
) -> batching.Examples | None:
    """The same texts in batches with states that are kept; None, and a line, without room for it.

    Args:
        examples: as `Prefix.examples` gives them.
        groups: of texts that are computed together; each is as much work as a batch.
        folder: for the file, if there has to be one.
    """
    one = prefix.states(np.zeros((1, 2), np.int32), np.array([2]))  # which is never computed
    widths = [batching.padded_width(examples.lengths[g], examples.max_length) - 1 for g in groups]
    size, room = one.shape[-1] * one.dtype.size, None
    shapes = [(len(rows), width, size) for rows, width in zip(groups, widths, strict=True)]
    free = min(memory.available(), memory.machine_memory()) - mx.get_active_memory()
    if sum(map(math.prod, shapes)) > free * MEMORY_SHARE:
        room = make_file(shapes, folder)
        if room is None:
            return None
    return replace(examples, states=Kept(examples, groups, one.dtype, room))


def make_file(shapes: list[tuple[int, ...]], folder: Path) -> list[np.ndarray] | None:
    """Arrays of bytes in a file without a name, which ends with the process; None without room."""
    sizes = [*map(math.prod, shapes)]
    size = sum(sizes)
    taken = f"the hidden states of layers that do not change take {size / 1e9:.3g} GB"
    try:
        disk = shutil.disk_usage(folder)
        if disk.free - size < disk.total * FREE_SHARE:
            raise OSError
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a disk that is full later would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            array = np.memmap(file, np.uint8, "w+", shape=size)
    except OSError:
        warn(f"{taken}, for which {folder} has no room, so they are computed again in each epoch")
        return None
    warn(f"{taken} and are kept in a temporary file in {folder}, gone when this process ends")
    parts = np.split(array, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def keep_states(
    prefix: Prefix, examples: dict[str, batching.Examples], config: Any, this: Any,
    group: Group,
) -> dict[str, batching.Examples]:  # fmt: skip
    """Keep the frozen states of all texts that come more than once, if there is room.

    They are computed in the batches of the first epoch, and of one validation. So that epoch takes
    no longer, and is the same to the last bit as without keeping. Later epochs have other batches,
    so their last bits do depend on it: a run that had no room must not begin to keep when it is
    resumed. Of several processes, each meets texts in later epochs that were another's before, so
    the more there are, the more epochs it takes to pay.
    """
    training, validation, progress = examples["train"], examples["valid"], this.progress
    keep_some = partial(keep, prefix, folder=this.adapter.parent)
    batches = batching.evaluation_batches(
        validation, config.batch_size, config.val_batches, progress.micro_batches * group.size
    )
    kept = {"valid": keep_some(validation, batches) or validation, "train": training}
    lengths = training.lengths
    batches = batching.epoch_batches(lengths, config.batch_size, config.seed, epoch=0)
    if this.iters > len(batches) * max(1, group.size - 1) and progress.has_room:
        groups = [
            micro_batch
            for rows in batches
            for share in batching.split_batch(rows, group.size)
            for micro_batch in batching.split_batch(share, progress.micro_batches)
        ]
        kept["train"] = keep_some(training, groups) or training
        progress.has_room = kept["train"] is not training
    return kept
