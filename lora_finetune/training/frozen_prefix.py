"""The hidden states below the first adapted layer, which training does not change: computed once.

Where layers are causal, the states of a text depend neither on what is padded behind it nor on the
texts beside it. So they can be kept for later epochs, and for every validation.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import models
from lora_finetune.base import memory
from lora_finetune.base.errors import warn
from lora_finetune.mlx_patches import rope
from lora_finetune.mlx_patches.compiling import compiled_if_possible, hint_if_compiling
from lora_finetune.mlx_patches.module_classes import intercepted
from lora_finetune.texts import dataset
from lora_finetune.training.distributed import Group
from lora_finetune.training.losses import Loss

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# Whether the layers are called compiled. A GPU might have to wait for Python to call them.
COMPILED = mx.default_device() == mx.gpu


class Prefix:
    """The first `num_layers` layers of a model, below the first one that is trained."""

    def __init__(self, model: nn.Module, num_layers: int):
        self.model, self.num_layers = model, num_layers
        self.call = compiled_if_possible(self.hidden) if COMPILED else self.hidden

    def states(self, tokens: np.ndarray, lengths: np.ndarray) -> mx.array:
        """The hidden states that the first trained layer is given for a batch.

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
        """The states (rows, width, size) of inputs (rows, width), in padding too."""
        given = []

        def pass_on(hidden: mx.array, *_: object, **__: object) -> mx.array:
            given.append(hidden)
            return hidden

        was_training = self.model.training
        self.model.eval()  # some layers have faster kernels where there is no gradient
        try:
            trained = all_intercepted(self.model.layers[self.num_layers :], pass_on)
            with trained, rope.text_lengths(lengths):
                self.model(inputs)
        finally:
            self.model.train(was_training)
        return given[0]

    @contextmanager
    def replaced(self, states: mx.array) -> Iterator[None]:
        """A block in which these layers return given states for a batch of that shape."""

        def reply(hidden: mx.array, *_: object, **__: object) -> mx.array:
            return states if hidden.shape == states.shape else hidden

        with all_intercepted(self.model.layers[: self.num_layers], reply):
            yield

    def loss(self, loss: Loss) -> Loss:
        """A loss that takes the states of the batch as its last argument."""

        def loss_from_states(model: nn.Module, *batch: mx.array) -> tuple[mx.array, mx.array]:
            *arrays, states = batch
            with self.replaced(states):
                return loss(model, *arrays)

        return loss_from_states

    def examples(self, examples: dataset.Examples) -> WithStates:
        """The same texts in batches with their states, computed anew for each batch."""
        lengths = examples.lengths
        return WithStates(examples, lambda rows, tokens: self.states(tokens, lengths[rows]))


@contextmanager
def all_intercepted(layers: list[nn.Module], reply: Callable[..., mx.array]) -> Iterator[None]:
    """A block in which `reply` answers in place of each of these layers."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(intercepted(layer, reply))
        yield


class WithStates:
    """Texts in batches with the states of the frozen layers, for `Prefix.loss`.

    Attributes:
        states: gives the states (rows, width − 1, size) for the indices and the tokens of a batch.
    """

    def __init__(self, examples: dataset.Examples, states: Callable[..., mx.array]):
        self.examples, self.states = examples, states
        self.lengths, self.max_length = examples.lengths, examples.max_length

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, mx.array]:
        tokens, is_target = self.examples.batch(rows)
        return tokens, is_target, self.states(rows, tokens)


def find(model: nn.Module) -> Prefix | None:
    """The layers of a model below the first one that is trained; None where there are none.

    None too, with a warning, where the model needs more of them than their states: some
    architectures hand keys and values of one layer to others.
    """
    trained = [bool(tree_flatten(layer.trainable_parameters())) for layer in model.layers]
    if not any(trained) or trained[0]:
        return None
    prefix = Prefix(model, trained.index(True))
    # Suppressed: whatever an architecture raises where layers do not do their work.
    with hint_if_compiling("the model's layers on a few tokens"), suppress(Exception):
        if states_suffice(prefix):
            return prefix
    warn(
        f"in models of this kind ({models.model_family(model)}) the layers below the first adapted "
        "one have to be computed again in each epoch, though nothing in them changes; training is "
        "right, only slower"
    )
    return None


def states_suffice(prefix: Prefix) -> bool:
    """Whether a model's logits are the same from states, and padding has no effect on states.

    Tried on two texts, of which the shorter one is padded. It is also computed alone, in between,
    so that nothing that layers may have left behind for others can serve.
    """
    # int32 as in a batch, and no array[0], which is a gather: CUDA would have to compile another.
    tokens = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 0, 0, 0, 0]], np.int32)
    model, inputs, lengths = prefix.model.eval(), mx.array(tokens[:, :-1]), np.array([9, 5])
    logits, states = model(inputs), prefix.states(tokens, lengths)
    mx.eval(logits, states)
    alone = prefix.states(tokens[1:, :5], lengths[1:])
    mx.eval(alone)
    with prefix.replaced(states):
        from_states = model(inputs)
    errors = [
        relative_error(alone, states[1:, :4]),
        relative_error(from_states[:1], logits[:1]),
        relative_error(from_states[1:, :4], logits[1:, :4]),
    ]
    return all(error <= mx.finfo(states.dtype).eps ** 0.5 for error in errors)


def relative_error(found: mx.array, expected: mx.array) -> float:
    """The norm of the error of a row against that of the row, on average."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    norm = mx.linalg.norm
    return (norm(found - expected, axis=-1) / norm(expected, axis=-1)).mean().item()


# --- Keeping ------------------------------------------------------------------------------------

# The share of the memory that the states of training texts may take, and as much those of
# validation; and the share of a disk that they leave free.
MEMORY_SHARE, FREE_SHARE = 1 / 16, 1 / 10


class Kept:
    """The states of texts, computed for a whole group when one of its texts is first asked for.

    The groups are fixed, so that the last bits of a text's states do not depend on which batch
    asked for them first: on the one after which a run was resumed, for example.

    Attributes:
        examples: the texts, in batches with states that are computed anew.
        groups: arrays of their indices, no two with a text in common.
        states: of each text, (length − 1, size), or their bytes in the file.
        dtype: of the states.
        file: uint8 (tokens, bytes of a state); None where all stay in memory.
    """

    def __init__(
        self, examples: WithStates, groups: list[np.ndarray], dtype: mx.Dtype,
        file: np.ndarray | None,
    ):  # fmt: skip
        self.examples, self.groups, self.dtype, self.file = examples, groups, dtype, file
        self.group_of = {text: n for n, rows in enumerate(groups) for text in rows.tolist()}
        self.states: dict[int, mx.array | np.ndarray] = {}
        self.used = 0  # rows of the file

    def __call__(self, rows: np.ndarray, tokens: np.ndarray) -> mx.array:
        """The states (rows, width − 1, size) of a batch, zero in padding."""
        texts = rows.tolist()
        missing = sorted({self.group_of[text] for text in texts if text not in self.states})
        for number in missing:
            *_, states = self.examples.batch(self.groups[number])
            # One group alone MLX may compute with the step that the batch is for.
            if len(missing) > 1 or self.file is not None:
                mx.eval(states)
            self.keep(self.groups[number], states)
        return mx.stack([self.padded(text, tokens.shape[1] - 1) for text in texts])

    def keep(self, group: np.ndarray, states: mx.array) -> None:
        """Keep the states (rows, width, size) of a group of texts."""
        for row, text in enumerate(group.tolist()):
            kept = states[row, : self.examples.lengths[text] - 1]
            if self.file is not None:
                room = self.file[self.used : self.used + len(kept)]
                room[:] = np.array(kept.view(mx.uint8))
                self.used, kept = self.used + len(kept), room
            self.states[text] = kept

    def padded(self, text: int, width: int) -> mx.array:
        """The states of a text, (width, size)."""
        states = self.states[text]
        if self.file is not None:
            states = mx.array(states).view(self.dtype)
        return mx.pad(states, [(0, width - len(states)), (0, 0)])


def keep(
    prefix: Prefix, examples: WithStates, groups: list[np.ndarray], folder: Path
) -> WithStates | None:
    """The same texts in batches with states that are kept; None, and a warning, without room.

    Args:
        groups: of texts that are computed together; each is as much work as a batch.
        folder: for a temporary file, if they take too much memory.
    """
    one = prefix.states(np.zeros((1, 2), np.int32), np.array([2]))  # which is never computed
    lengths, longest = examples.lengths, examples.max_length
    inputs = sum(len(g) * (dataset.padded_width(lengths[g], longest) - 1) for g in groups)
    free, file = min(memory.available(), memory.machine_memory()) - mx.get_active_memory(), None
    if inputs * one.nbytes > free * MEMORY_SHARE:
        size = inputs * one.nbytes / 1e9
        taken = f"the hidden states of layers that do not change take {size:.3g} GB"
        try:
            file = make_file((inputs, one.nbytes), folder)
        except OSError:
            warn(f"{taken}, for which {folder} has no room, so each epoch computes them again")
            return None
        warn(f"{taken} and are kept in a temporary file in {folder}, gone when this process ends")
    return WithStates(examples.examples, Kept(examples, groups, one.dtype, file))


def make_file(shape: tuple[int, int], folder: Path) -> np.memmap:
    """Bytes in a file without a name, which ends with the process; raises OSError without room."""
    disk, size = shutil.disk_usage(folder), shape[0] * shape[1]
    if disk.free - size < disk.total * FREE_SHARE:
        raise OSError
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is full later would end the process
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, np.uint8, "w+", shape=shape)


def keep_states(
    prefix: Prefix, examples: dict[str, dataset.Examples], config: Any, this: Any,
    group: Group,
) -> dict[str, dataset.Examples]:  # fmt: skip
    """Keep the frozen states of all texts that come more than once, if there is room.

    They are computed in the batches of the first epoch, and of one validation. So that epoch takes
    no longer, and is the same to the last bit as without keeping. Later epochs have other batches,
    so their last bits do depend on it: a run that had no room must not begin to keep when it is
    resumed. Of several processes, each meets texts in later epochs that were another's before, so
    the more there are, the more epochs it takes to pay.
    """
    training, validation, progress = examples["train"], examples["valid"], this.progress
    keep_some = partial(keep, prefix, folder=this.adapter.parent)
    batches = dataset.evaluation_batches(
        validation, config.batch_size, config.val_batches, progress.micro_batches * group.size
    )
    kept = {"valid": keep_some(validation, batches) or validation, "train": training}
    lengths = training.lengths
    batches = dataset.epoch_batches(lengths, config.batch_size, config.seed, epoch=0)
    if this.iters > len(batches) * max(1, group.size - 1) and progress.has_room:
        groups = [
            micro_batch
            for rows in batches
            for share in dataset.shares(rows, lengths[rows], group.size)
            for micro_batch in dataset.split_batch(share, progress.micro_batches)
        ]
        kept["train"] = keep_some(training, groups) or training
        progress.has_room = kept["train"] is not training
    return kept
