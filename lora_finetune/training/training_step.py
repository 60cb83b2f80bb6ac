"""One step of training, steps one after the other, and how much of a batch fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import models
from lora_finetune.base import memory
from lora_finetune.base.errors import UserError, first_line, warn
from lora_finetune.mlx_patches import rope
from lora_finetune.mlx_patches.compiling import compiled_if_possible, hint_if_compiling
from lora_finetune.texts import batching
from lora_finetune.training.distributed import ALONE, Group
from lora_finetune.training.losses import Loss

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

ALL = "all"  # what the optimizer calls its one array
ALIGNED = 64  # float32 numbers; on CUDA the products that MLX calls take factors to begin so


def make_optimizer(
    model: nn.Module, learning_rate: float, saved: dict[str, np.ndarray]
) -> optim.Adam:
    """Adam for the model's trainable parameters, with the moments and the step that were saved.

    It is MLX's own as it comes, without bias correction, as in mlx-examples and mlx_lm.lora: the
    default learning rate and recipes for MLX are made for it. For it all parameters are one array:
    on a GPU one operation on all of them costs no more than on one.

    Args:
        saved: as `named_state` has them; parameters without moments start fresh.
    """
    optimizer, parameters = optim.Adam(learning_rate), model.trainable_parameters()
    optimizer.init({ALL: joined(parameters)})
    optimizer.state["step"] = mx.array(saved.get("step", optimizer.state["step"]))
    for moment in ("m", "v"):
        of_each = {
            name: mx.array(saved.get(f"{name}.{moment}", np.zeros(array.shape, np.float32)))
            for name, array in tree_flatten(parameters)
        }
        optimizer.state[ALL][moment] = joined(of_each)
    return optimizer


def named_state(model: nn.Module, optimizer: optim.Adam) -> dict[str, mx.array]:
    """The step, the learning rate and each parameter's moments, as MLX names them."""
    state, parameters = dict(optimizer.state), model.trainable_parameters()
    for moment, flat in state.pop(ALL).items():
        of_each = tree_flatten(parted(flat, parameters))
        state |= {f"{name}.{moment}": array for name, array in of_each}
    return state


@mx.compile
def joined(arrays: dict) -> mx.array:
    """All arrays of a tree as one, of one dimension; each has zeros to a multiple of ALIGNED."""
    flat = [array.flatten() for array in leaves(arrays)]
    return mx.concatenate([mx.pad(a, (0, gap_after(a))) if gap_after(a) else a for a in flat])


@mx.compile
def parted(flat: mx.array, like: dict) -> dict:
    """The arrays that were `joined`, as a tree of such shapes."""
    parts, start = [], 0
    for name, array in tree_flatten(like):
        parts.append((name, flat[start : start + array.size].reshape(array.shape)))
        start += array.size + gap_after(array)
    return tree_unflatten(parts)


def gap_after(array: mx.array) -> int:
    """How many zeros stand between an array that was joined and the next."""
    return -array.size % ALIGNED


# Whether steps are begun ahead. A CPU is no faster for it, and would be slower to stop.
AHEAD = mx.default_device() == mx.gpu


class LazyStep(NamedTuple):
    """What a step makes, as arrays that MLX need not have computed yet.

    Attributes:
        total: the sum of the loss.
        num_targets: of the batch.
        parameter_sum: of all updated parameters, finite only if each gradient and parameter is.
        changed: the updated parameters and the optimizer's state.
        undo: gives the model and the optimizer back what they held before.
    """

    total: mx.array
    num_targets: int
    parameter_sum: mx.array
    changed: list[mx.array]
    undo: Callable[[], None]

    def compute(self) -> tuple[float, int, float]:
        """The sum of the loss, the number of targets, and the sum of all updated parameters.

        Raises:
            RuntimeError, MemoryError: MLX's, where the device fails.
        """
        mx.eval(self.total, self.parameter_sum, self.changed)
        return self.total.item(), self.num_targets, self.parameter_sum.item()


def make_step(
    model: nn.Module, loss: Loss, optimizer: optim.Optimizer, group: Group = ALONE
) -> Callable[[list[batching.Batch]], LazyStep]:
    """A step that updates the model's trainable parameters on one batch, given in parts.

    The gradients of the sum of the loss are added over the parts, and over the processes, and
    divided by the batch's targets: memory is needed for one part only, and the sum is the same to
    rounding.

    Returns:
        A function of this process's share of a batch. It leaves model and optimizer with what the
        step makes, which need not be computed yet. Where the device fails it gives both back what
        they held, which stays in memory for that, and raises what `LazyStep.compute` does.
    """
    gradients_of = make_gradients(model, loss)
    # Not collected from the model and joined anew in each step, which would be felt on a GPU.
    parameters = model.trainable_parameters()
    flat = joined(parameters)

    def step(batch: list[batching.Batch]) -> LazyStep:
        nonlocal parameters, flat
        before, flat_before = parameters, flat
        moments = tree_map(lambda a: a, optimizer.state)

        def undo() -> None:
            nonlocal parameters, flat
            parameters, flat = before, flat_before
            model.update(before)
            optimizer.state.update(moments)

        num_targets = sum(int(is_target[:, 1:].sum()) for _, is_target, *_ in batch)
        try:
            if batch:
                sums = gradients_of(before, *batch[0])
            else:  # a share without texts
                sums = tree_map(mx.zeros_like, (mx.array(0.0), before))
            for part in batch[1:]:
                mx.eval(sums)
                sums = tree_map(mx.add, sums, gradients_of(before, *part))
            total, gradients, num_targets = group.sum(*sums, num_targets)
            flat = update(optimizer, flat, gradients, mx.array(max(num_targets, 1)))
            parameters, parameter_sum = parted(flat, before), flat.sum()
        except memory.FAILURES:
            undo()
            raise
        model.update(parameters)
        changed = leaves([parameters, optimizer.state])
        return LazyStep(total, num_targets, parameter_sum, changed, undo)

    return step


def run_steps(
    step: Callable[[list[batching.Batch]], LazyStep],
    batches: Iterator[list[batching.Batch]],
    ahead: bool,
) -> Iterator[tuple[float, int, float]]:
    """What `LazyStep.compute` returns of a step on each batch.

    A step in which the device fails, or whose numbers are not asked for, is undone.

    Args:
        ahead: whether MLX is given the next step before the present one has ended, so that a GPU
            does not wait for Python. Python prepares it while the GPU has the most to do, between
            the loss and the gradients. Where a step waits for something in its middle, such as
            other processes or a part of its batch, there is nothing to gain.
    """

    def prepare() -> LazyStep | None:
        return next(map(step, batches), None)

    present = prepare()
    try:
        while present:
            mx.async_eval(present.total)
            following = prepare() if ahead else None
            mx.async_eval(present.parameter_sum, present.changed)
            if following:
                mx.async_eval(following.total)
            numbers = present.compute()
            present = following
            yield numbers
            present = present or prepare()
    finally:
        if present:
            present.undo()


def make_gradients(model: nn.Module, loss: Loss) -> Callable[..., tuple[mx.array, dict]]:
    """The sum of the loss over (part of) a batch, and its gradients to the parameters, compiled.

    The function takes the trainable parameters and the batch, and raises UserError where MLX has no
    gradient of something in the model.
    """

    def total(parameters: dict, *batch: mx.array) -> mx.array:
        model.update(parameters)
        return loss(model, *batch)[0]

    # With frozen weights as constants, and outside of it the lengths, for layers computed twice.
    function = compiled_if_possible(rope.by_length(mx.value_and_grad(total)))

    def gradients_of(parameters: dict, *batch: np.ndarray) -> tuple[mx.array, dict]:
        try:
            return function(parameters, *map(mx.array, batch))
        except ValueError as error:  # of an operation that MLX has no gradient of
            raise UserError(f"this architecture cannot be trained: {first_line(error)}") from error
        finally:
            model.update(parameters)  # in the place of MLX's placeholders

    return gradients_of


def update(
    optimizer: optim.Optimizer, flat: mx.array, gradients: dict, divisor: mx.array
) -> mx.array:
    """All updated parameters as one array, for the gradients of a sum and what divides it."""
    # Not compiled: on a GPU that would take seconds, and operations on one array are few.
    gradient = joined(gradients) / divisor
    return optimizer.apply_gradients({ALL: gradient}, {ALL: flat})[ALL]


def leaves(tree: dict) -> list[mx.array]:
    return [array for _, array in tree_flatten(tree)]


def fit_memory(
    model: nn.Module, loss: Loss, examples: batching.Examples, batch_size: int, parts: int
) -> int:
    """In how many parts, at least `parts`, the largest batch fits into memory, by steps undone.

    Where a single text does not fit, the layers keep only their inputs for the backward pass, and
    compute the rest again.

    Raises:
        UserError: even so it takes more memory than there is.
    """
    longest = np.argsort(examples.lengths, kind="stable")[-batch_size:]
    rows, tokens, limit = len(longest), examples.lengths.max(), memory.available()

    def try_step(number: int) -> None:
        step = make_step(model, loss, make_optimizer(model, 0.0, {}))
        tried = step([examples.batch(longest[-number:])])
        try:
            tried.compute()
        finally:
            tried.undo()

    most = -(-rows // parts)
    with hint_if_compiling("a step for its memory"):
        fitting = memory.number_that_fits(try_step, most, limit)
    if not fitting:
        warn(
            f"a text of {tokens} tokens takes too much memory, so layers are computed "
            "twice, which is slower"
        )
        models.checkpoint_layers(model)
        fitting = memory.number_that_fits(try_step, most, limit)
    if not fitting:
        raise UserError(
            f"a text of {tokens} tokens takes more memory than the {limit / 1e9:.3g} "
            "GB there are; lower --max-seq-length or --lora-layers, or take a smaller or a "
            "quantized model"
        )
    if fitting < most:
        parts = -(-rows // fitting)
        warn(
            f"{rows} texts of up to {tokens} tokens do not fit into {limit / 1e9:.3g} "
            f"GB of memory, so each batch is computed in {parts} parts, with the same result"
        )
    return parts
