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
from pathlib import Path
from typing import Any

from lora_finetune.base import memory
from lora_finetune.base.errors import hint_if_slow, warn
from lora_finetune.mlx_patches import rope
from lora_finetune.mlx_patches.modules import intercepted
from lora_finetune.mlx_patches.transforms import TRYING, compiled_if_possible
from lora_finetune.model_folder.config import model_family
from lora_finetune.texts import batching
from lora_finetune.training.losses import Loss

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

# Whether the layers are called compiled. A GPU might have to wait for Python to call them.
COMPILED = mx.default_device() == mx.gpu


class Prefix:
    """The first `num_layers` layers of a model, none of which is trained."""

    def __init__(self, model: nn.Module, num_layers: int):
        self.model, self.num_layers = model, num_layers
        self.call = compiled_if_possible(self.hidden) if COMPILED else self.hidden

    def states(self, tokens: np.ndarray, lengths: np.ndarray) -> mx.array:
        """The hidden states (rows, width − 1, size) that a batch comes to above these layers.

        Not computed yet, of the model's own type, and zero in padding.

        Args:
            tokens: int32 (rows, width); all but the last of a row are inputs.
            lengths: tokens of each text, int64 (rows,).
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


@contextmanager
def all_intercepted(layers: list[nn.Module], reply: Callable[..., mx.array]) -> Iterator[None]:
    """A block in which `reply` answers in place of each of these layers."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(intercepted(layer, reply))
        yield


def find(model: nn.Module) -> Prefix | None:
    """The layers of a model below the first one that is trained; None where there are none.

    None too, with a warning, where some architectures hand more than states to later layers.
    """
    trained = [bool(tree_flatten(layer.trainable_parameters())) for layer in model.layers]
    if not any(trained) or trained[0]:
        return None
    prefix = Prefix(model, trained.index(True))
    # Suppressed: whatever an architecture raises where layers do not do their work.
    with hint_if_slow(TRYING), suppress(Exception):
        if states_suffice(prefix):
            return prefix
    warn(
        f"in models of this kind ({model_family(type(model))}) the layers below the first adapted "
        "one have to be computed again in each epoch, though nothing in them changes; training is "
        "right, only slower"
    )
    return None


def states_suffice(prefix: Prefix) -> bool:
    """Whether a model's logits are the same from states, and padding has no effect on states.

    Tried on two texts, of which the shorter one is padded. It is computed alone in between, which
    replaces what layers may have left behind for others.
    """
    # int32 as in a batch, and no array[0], which is a gather: CUDA would have to compile another.
    tokens = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 0, 0, 0, 0]], np.int32)
    model, inputs, lengths = prefix.model.eval(), mx.array(tokens[:, :-1]), np.array([9, 5])
    logits, states = model(inputs), prefix.states(tokens, lengths)
    mx.eval(logits, states)
    if not mx.isfinite(logits[:1]).all().item():
        return True  # of a broken model nothing can be shown, and its first validation ends the run
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
    norms = mx.linalg.norm(found - expected, axis=-1) / mx.linalg.norm(expected, axis=-1)
    return norms.mean().item()


# --- Keeping ------------------------------------------------------------------------------------

# The share of the free memory that the states of a split may take, and of a disk that they leave.
MEMORY_SHARE, FREE_SHARE = 1 / 16, 1 / 10


class WithStates:
    """Texts in batches with their states, for `Prefix.loss`: computed for each batch, or kept.

    Attributes:
        groups: indices of the texts that are computed and kept together, when one of them is first
            asked for: so the last bits of a text's states do not depend on which batch asked, such
            as the one after which a run was resumed.
        kept: the states of each text, (length − 1, size), or their bytes in the file.
        file: uint8 (inputs, bytes of a state); None where all stay in memory.
    """

    def __init__(self, prefix: Prefix, examples: batching.Examples):
        self.prefix, self.examples = prefix, examples
        self.lengths, self.max_length = examples.lengths, examples.max_length
        self.groups: list[np.ndarray] = []
        self.kept: dict[int, mx.array | np.ndarray] = {}
        self.file, self.used = None, 0

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, mx.array]:
        """The given texts, padded on the right, and their states (rows, width − 1, size)."""
        tokens, is_target = self.examples.batch(rows)
        if self.groups:
            return tokens, is_target, self.kept_states(rows.tolist(), tokens.shape[1] - 1)
        return tokens, is_target, self.prefix.states(tokens, self.lengths[rows])

    def keep(self, groups: list[np.ndarray], folder: Path) -> bool:
        """Keep the states from now on; False, and a warning, where there is no room for them.

        Args:
            folder: for a temporary file, if the states take too much memory.
        """
        one = self.prefix.states(np.zeros((1, 2), np.int32), np.array([2]))  # never computed
        widths = [batching.padded_width(self.lengths[rows], self.max_length) - 1 for rows in groups]
        inputs = sum(len(rows) * width for rows, width in zip(groups, widths, strict=True))
        free = min(memory.available(), memory.machine_memory()) - mx.get_active_memory()
        if inputs * one.nbytes > free * MEMORY_SHARE:
            size = inputs * one.nbytes / 1e9
            taken = f"the hidden states of layers that do not change take {size:.3g} GB"
            try:
                self.file = make_file((inputs, one.nbytes), folder)
            except OSError:
                warn(f"{taken}, for which {folder} has no room, so each epoch computes them again")
                return False
            warn(f"{taken} and are kept in a temporary file in {folder} until this process ends")
        self.groups, self.dtype = groups, one.dtype
        self.group_of = {text: n for n, rows in enumerate(groups) for text in rows.tolist()}
        return True

    def kept_states(self, texts: list[int], width: int) -> mx.array:
        """The states (texts, width, size), zero in padding."""
        missing = sorted({self.group_of[text] for text in texts if text not in self.kept})
        for number in missing:
            rows = self.groups[number]
            states = self.prefix.states(self.examples.batch(rows)[0], self.lengths[rows])
            # MLX may compute a single group together with the step that the batch is for.
            if len(missing) > 1 or self.file is not None:
                mx.eval(states)
            for row, text in enumerate(rows.tolist()):
                self.kept[text] = self.stored(states[row, : self.lengths[text] - 1])
        return mx.stack([self.padded(self.kept[text], width) for text in texts])

    def stored(self, states: mx.array) -> mx.array | np.ndarray:
        """The states of a text, or the place in the file where their bytes now are."""
        if self.file is None:
            return states
        room = self.file[self.used : self.used + len(states)]
        self.used += len(states)
        room[:] = np.array(states.view(mx.uint8))
        return room

    def padded(self, kept: mx.array | np.ndarray, width: int) -> mx.array:
        states = kept if self.file is None else mx.array(kept).view(self.dtype)
        return mx.pad(states, [(0, width - len(states)), (0, 0)])


def make_file(shape: tuple[int, int], folder: Path) -> np.memmap:
    """Bytes in a file without a name, which ends with the process; raises OSError without room."""
    disk, size = shutil.disk_usage(folder), shape[0] * shape[1]
    if disk.free - size < disk.total * FREE_SHARE:
        raise OSError
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is full later would end the process
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, np.uint8, "w+", shape=shape)


def keep_states(examples: dict[str, WithStates], run: Any) -> None:
    """Keep the frozen states of all texts that come more than once, if there is room.

    They are computed in the batches of the first epoch, and of one validation. The last bits of
    later epochs depend on it, so a run that had no room must not begin to keep when it is resumed.
    Each of several processes meets texts that were another's before, so the more there are, the
    more epochs it takes to pay.
    """
    config, progress, group = run.config, run.progress, run.group
    training, validation = examples["train"], examples["valid"]
    micro_batches, folder = progress.micro_batches, run.adapter.parent
    groups = batching.evaluation_batches(
        validation, config.batch_size, config.val_batches, micro_batches * group.size
    )
    validation.keep(groups, folder)
    lengths = training.lengths
    batches = batching.epoch_batches(lengths, config.batch_size, config.seed, epoch=0)
    if run.iters > len(batches) * max(1, group.size - 1) and progress.has_room:
        groups = [
            micro_batch
            for rows in batches
            for share in batching.split_batch(rows, group.size)
            for micro_batch in batching.split_batch(share, micro_batches)
        ]
        progress.has_room = training.keep(groups, folder)
