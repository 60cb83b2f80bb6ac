"""One step of training as a function, steps one after the other, and how much of a batch fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from lora_finetune.base import memory
from lora_finetune.base.errors import UserError, first_line, hint_if_slow, warn
from lora_finetune.mlx_patches import rope
from lora_finetune.mlx_patches.modules import checkpoint_layers
from lora_finetune.mlx_patches.transforms import TRYING, compiled_if_possible
from lora_finetune.texts import batching
from lora_finetune.training.distributed import ALONE, Group
from lora_finetune.training.losses import Loss
from lora_finetune.training.optimizer import Optimizer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

ALIGNED = 64  # float32 numbers; on CUDA the products that MLX calls take factors to begin so

# Whether the next step is begun before the present one has ended, so that a GPU does not wait for
# Python. A CPU is no faster for it, and would be slower to stop.
AHEAD = mx.default_device() == mx.gpu


class NotFiniteError(UserError):
    """A loss, a gradient or a parameter is infinite or not a number."""


Moments = dict[str, mx.array | int]  # as `read_moments` has them

# --- Parameters ---------------------------------------------------------------------------------

# All trained parameters are one array for the optimizer, and so are their gradients and moments: on
# a GPU one operation on all costs no more than on one.


def joined(arrays: dict) -> mx.array:
    """All arrays of a tree as one, of one dimension; each has zeros to a multiple of ALIGNED."""
    flat = [array.flatten() for _, array in tree_flatten(arrays)]
    return mx.concatenate([mx.pad(array, (0, -array.size % ALIGNED)) for array in flat])


def parted(flat: mx.array, like: dict) -> dict:
    """The arrays that were `joined`, as a tree of such shapes."""
    named = tree_flatten(like)
    ends = np.cumsum([-(-array.size // ALIGNED) * ALIGNED for _, array in named]).tolist()
    pieces = zip(named, mx.split(flat, ends[:-1]), strict=True)
    return tree_unflatten([(n, piece[: a.size].reshape(a.shape)) for (n, a), piece in pieces])


def read_moments(model: nn.Module, saved: dict[str, np.ndarray], iteration: int = 0) -> Moments:
    """Adam's moments `m` and `v` of all parameters, the `steps` they are of, and the `iteration`.

    Args:
        saved: as `Trainer.named_moments` has it; parameters without moments start fresh.
        iteration: of the run, the last one done.
    """
    moments = {"iteration": iteration, "steps": int(saved.get("steps", [0])[0])}
    for moment in ("m", "v"):
        of_each = {
            name: mx.array(saved.get(f"{name}.{moment}", mx.zeros(array.shape)))
            for name, array in tree_flatten(model.trainable_parameters())
        }
        moments[moment] = joined(of_each)
    return moments


# --- A step -------------------------------------------------------------------------------------


class Result(NamedTuple):
    """The results of a step, which MLX need not have computed yet."""

    parameters: mx.array
    moments: Moments
    loss: mx.array  # the sum over all targets, in nats
    tokens: int  # how many targets there are
    norm: mx.array  # of the gradient of the mean loss, before it is clipped
    parameter_sum: mx.array  # finite only if each gradient and updated parameter is


NO_TARGETS = np.zeros((1, 2), np.int32), np.zeros((1, 2), bool)  # a batch

Step = Callable[[mx.array, Moments, list[batching.Batch]], Result]


def make_step(model: nn.Module, loss: Loss, optimizer: Optimizer, group: Group = ALONE) -> Step:
    """A function of the parameters, Adam's moments and a batch; it changes none of them.

    The gradients of the sum of the loss are added up over the micro-batches that a batch is given
    in, and over the processes, and divided by the batch's targets: memory is needed for one
    micro-batch only, and the sum is the same to rounding.
    """
    gradients_of = partial(group.compute, make_gradients(model, loss))

    def step(parameters: mx.array, moments: Moments, batch: list[batching.Batch]) -> Result:
        tokens = sum(int(is_target[:, 1:].sum()) for _, is_target, *_ in batch)
        if group.shares_weights:  # all compute as often as any, since all gather
            most = max(number for _, number in group.gather(count=len(batch)))
            batch = batch + [NO_TARGETS] * (most - len(batch))
        if batch:
            total, gradient = gradients_of(parameters, *batch[0])
        else:  # this process has no text of it
            total, gradient = mx.array(0.0), mx.zeros_like(parameters)
        for micro_batch in batch[1:]:
            mx.eval(total, gradient)
            more, gradient_of_more = gradients_of(parameters, *micro_batch)
            total, gradient = total + more, gradient + gradient_of_more
        total, gradient, tokens = group.sum(total, gradient, tokens)
        mean = gradient / mx.array(max(tokens, 1))
        updated, moments, norm = optimizer.update(mean, parameters, moments)
        # A norm that overflows would clip the gradient to 0, which is finite.
        checked = updated.sum() if optimizer.max_grad_norm is None else updated.sum() + 0 * norm
        return Result(updated, moments, total, tokens, norm, checked)

    return step


def make_gradients(model: nn.Module, loss: Loss) -> Callable[..., tuple[mx.array, mx.array]]:
    """The sum of the loss over a micro-batch, and its gradient, compiled.

    The function takes the parameters as one array, and the micro-batch; it leaves others, of MLX's,
    in the model. It raises UserError where MLX has no gradient of something in the model.
    """
    like = model.trainable_parameters()

    def total(parameters: mx.array, *batch: mx.array) -> mx.array:
        model.update(parted(parameters, like))
        return loss(model, *batch)[0]

    # With frozen weights as constants, and outside of it the lengths, for layers computed twice.
    function = compiled_if_possible(rope.by_length(mx.value_and_grad(total)))

    def gradients_of(parameters: mx.array, *batch: np.ndarray) -> tuple[mx.array, mx.array]:
        try:
            return function(parameters, *map(mx.array, batch))
        except ValueError as error:  # of an operation that MLX has no gradient of
            raise UserError(f"this architecture cannot be trained: {first_line(error)}") from error

    return gradients_of


class Trainer:
    """The parameters and Adam's moments while they are trained, step after step.

    A step's results are taken over when they have been computed and are finite. So whatever ends
    training, the model holds the last whole step.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: Optimizer, saved: dict[str, np.ndarray],
        group: Group = ALONE, iteration: int = 0,
    ):  # fmt: skip
        self.model, self.step = model, make_step(model, loss, optimizer, group)
        self.like = self.present = model.trainable_parameters()
        self.parameters = joined(self.like)
        self.moments = read_moments(model, saved, iteration)
        # Where MLX waits for a process that hangs, it computes nothing else, but a save must go on.
        self.saves_computed, self.saved = group.shares_weights, {}

    def steps(
        self, batches: Iterator[list[batching.Batch]], ahead: Callable[[], bool]
    ) -> Iterator[tuple[float, int, float, float]]:
        """Of each step the sum of the loss, the targets, the seconds, and the gradient's norm.

        Args:
            ahead: asked in each step whether the next may be begun before it has ended.

        Raises:
            NotFiniteError: a loss, a gradient or a parameter is not finite.
            RuntimeError, MemoryError: MLX's, where the device fails.
        """

        def begin(parameters: mx.array, moments: Moments) -> Result | None:
            batch = next(batches, None)
            return None if batch is None else self.step(parameters, moments, batch)

        start = time.perf_counter()
        try:
            present = begin(self.parameters, self.moments)
            while present:
                mx.async_eval(present.loss)
                # Python prepares it while a GPU has most to do, between the loss and the gradients.
                following = begin(present.parameters, present.moments) if ahead() else None
                mx.async_eval(*present)
                if following:
                    mx.async_eval(following.loss)
                self.take_over(present)
                seconds = time.perf_counter() - start
                yield present.loss.item(), present.tokens, seconds, present.norm.item()
                start = time.perf_counter()
                present = following or begin(self.parameters, self.moments)
        finally:  # a step that was begun leaves other parameters in the model
            self.update_model()

    def take_over(self, result: Result) -> None:
        """Wait for the results of a step, and make them the model's; raises as `steps` does."""
        mx.eval(*result)
        check_finite(result.loss.item(), "the loss")
        check_finite(result.parameter_sum.item(), "a gradient or a parameter")
        self.parameters, self.moments = result.parameters, result.moments
        self.present = parted(self.parameters, self.like)
        if self.saves_computed:
            self.saved = self.split_moments()
            mx.eval(self.present, self.saved)
        self.update_model()

    def update_model(self) -> None:
        self.model.update(self.present)

    def named_moments(self) -> dict[str, mx.array]:
        """The moments of each parameter (`….m`, `….v`), as MLX names them, and their `steps`."""
        return self.saved or self.split_moments()

    def split_moments(self) -> dict[str, mx.array]:
        return {"steps": mx.array([self.moments["steps"]])} | {
            f"{name}.{moment}": array
            for moment in ("m", "v")
            for name, array in tree_flatten(parted(self.moments[moment], self.like))
        }


def check_finite(number: float, name: str) -> None:
    if not math.isfinite(number):
        raise NotFiniteError(f"{name} is not finite ({number})")


# --- Memory -------------------------------------------------------------------------------------


def fit_memory(
    model: nn.Module, loss: Loss, examples: batching.Examples, batch_size: int, micro_batches: int,
    group: Group = ALONE,
) -> int:  # fmt: skip
    """In how many micro-batches, at least, the largest batch fits into memory, found by trying.

    It is the same number for all processes, of which one may have less memory. Where a single text
    does not fit, layers are checkpointed.

    Raises:
        UserError: even so it takes more memory than there is.
    """
    longest = np.argsort(examples.lengths, kind="stable")[-batch_size:]
    rows, tokens, parameters = len(longest), examples.lengths.max(), model.trainable_parameters()
    together = group if group.shares_weights else ALONE  # all do the same steps, or each its own
    limit = -together.largest(-memory.available())

    def try_step(number: int) -> None:
        batch = examples.batch(longest[-number:])
        step = make_step(model, loss, Optimizer(0.0), together)
        mx.eval(step(joined(parameters), read_moments(model, {}), [batch]))

    most = -(-rows // micro_batches)
    with hint_if_slow(TRYING):
        fitting = memory.number_that_fits(try_step, most, limit, together.largest)
    if not fitting and not group.shares_weights:  # else layers are so already
        warn(
            f"a text of {tokens} tokens takes too much memory, so layers are computed twice, slower"
        )
        checkpoint_layers(model)
        fitting = memory.number_that_fits(try_step, most, limit)
    if not fitting:
        raise UserError(
            f"a text of {tokens} tokens takes more memory than the {limit / 1e9:.3g} GB there are; "
            "lower --max-seq-length or --lora-layers, or take a smaller or a quantized model"
        )
    model.update(parameters)
    own = micro_batches if fitting == most else -(-rows // fitting)
    needed = max(number for _, number in group.gather(count=own))
    if needed > micro_batches:
        warn(
            f"{rows} texts of up to {tokens} tokens do not fit into the memory, so each batch is "
            f"computed in {needed} micro-batches, with the same result"
        )
    return needed
