"""One step of training as a function, steps one after the other, and how much of a batch fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import models
from lora_finetune.base import memory
from lora_finetune.base.errors import UserError, first_line, hint_if_slow, warn
from lora_finetune.mlx_patches import rope
from lora_finetune.mlx_patches.transforms import TRYING, compiled_if_possible
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

# Whether the next step is begun before the present one has ended, so that a GPU does not wait for
# Python. A CPU is no faster for it, and would be slower to stop.
AHEAD = mx.default_device() == mx.gpu


class NotFiniteError(UserError):
    """A loss, a gradient or a parameter is infinite or not a number."""


class Parameters(NamedTuple):
    """All trained parameters as one array, and the same as a tree.

    For the optimizer they are one: on a GPU one operation on all costs no more than on one.
    """

    flat: mx.array
    tree: dict

    @staticmethod
    def of(model: nn.Module) -> Parameters:
        tree = model.trainable_parameters()
        return Parameters(joined(tree), tree)


class Result(NamedTuple):
    """The results of a step, which MLX need not have computed yet.

    Attributes:
        parameters, state: the updated parameters, and Adam's state with them.
        loss: the sum over all targets, in nats.
        tokens: how many targets there are.
        parameter_sum: of all updated parameters: finite only if each gradient and parameter is.
    """

    parameters: Parameters
    state: dict[str, Any]
    loss: mx.array
    tokens: int
    parameter_sum: mx.array


Step = Callable[[Parameters, dict, list[batching.Batch]], Result]


def make_step(model: nn.Module, loss: Loss, group: Group = ALONE) -> Step:
    """A function of the parameters, Adam's state and a batch; it changes none of them.

    The gradients of the sum of the loss are added up over the micro-batches that a batch is given
    in, and over the processes, and divided by the batch's targets: memory is needed for one
    micro-batch only, and the sum is the same to rounding.
    """
    gradients_of = make_gradients(model, loss)
    optimizer = optim.Adam(0.0)  # its learning rate is in the state

    def step(parameters: Parameters, state: dict, batch: list[batching.Batch]) -> Result:
        tokens = sum(int(is_target[:, 1:].sum()) for _, is_target, *_ in batch)
        if batch:
            sums = gradients_of(parameters.tree, *batch[0])
        else:  # this process has no text of it
            sums = tree_map(mx.zeros_like, (mx.array(0.0), parameters.tree))
        for micro_batch in batch[1:]:
            mx.eval(sums)
            sums = tree_map(mx.add, sums, gradients_of(parameters.tree, *micro_batch))
        total, gradients, tokens = group.sum(*sums, tokens)
        # Not compiled: on a GPU that would take seconds, and operations on one array are few.
        gradient = joined(gradients) / mx.array(max(tokens, 1))
        optimizer.state = tree_map(lambda array: array, state)  # Adam changes it in place
        flat = optimizer.apply_gradients({ALL: gradient}, {ALL: parameters.flat})[ALL]
        updated = Parameters(flat, parted(flat, parameters.tree))
        return Result(updated, optimizer.state, total, tokens, flat.sum())

    return step


def make_gradients(model: nn.Module, loss: Loss) -> Callable[..., tuple[mx.array, dict]]:
    """The sum of the loss over a micro-batch, and its gradients to the parameters, compiled.

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


class Trainer:
    """The parameters and Adam's state while they are trained, step after step.

    A step's results are taken over when they have been computed and are finite. So whatever ends
    training, the model holds the last whole step.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, learning_rate: float, saved: dict[str, np.ndarray],
        group: Group = ALONE,
    ):  # fmt: skip
        self.model, self.step = model, make_step(model, loss, group)
        self.parameters, self.state = Parameters.of(model), adam_state(model, learning_rate, saved)

    def steps(
        self, batches: Iterator[list[batching.Batch]], ahead: Callable[[], bool]
    ) -> Iterator[tuple[float, int, float]]:
        """The sum of the loss of each step, its number of targets, and the seconds it took.

        Args:
            ahead: asked in each step whether the next may be begun before it has ended.

        Raises:
            NotFiniteError: a loss, a gradient or a parameter is not finite.
            RuntimeError, MemoryError: MLX's, where the device fails.
        """

        def begin(parameters: Parameters, state: dict) -> Result | None:
            batch = next(batches, None)
            return None if batch is None else self.step(parameters, state, batch)

        start = time.perf_counter()
        try:
            present = begin(self.parameters, self.state)
            while present:
                mx.async_eval(present.loss)
                # Python prepares it while a GPU has most to do, between the loss and the gradients.
                following = begin(present.parameters, present.state) if ahead() else None
                mx.async_eval(present.parameter_sum, present.parameters, present.state)
                if following:
                    mx.async_eval(following.loss)
                self.take_over(present)
                yield present.loss.item(), present.tokens, time.perf_counter() - start
                start = time.perf_counter()
                present = following or begin(self.parameters, self.state)
        finally:  # a step that was begun leaves its own parameters in the model
            self.model.update(self.parameters.tree)

    def take_over(self, result: Result) -> None:
        """Wait for the results of a step, and make them the model's; raises as `steps` does."""
        mx.eval(result.loss, result.parameter_sum, result.parameters, result.state)
        check_finite(result.loss.item(), "the loss")
        check_finite(result.parameter_sum.item(), "a gradient or a parameter")
        self.parameters, self.state = result.parameters, result.state
        self.model.update(self.parameters.tree)

    def named_state(self) -> dict[str, mx.array]:
        """The step and each parameter's moments (`….m`, `….v`), as MLX names them."""
        named = {"step": self.state["step"]}
        for moment, flat in self.state[ALL].items():
            of_each = tree_flatten(parted(flat, self.parameters.tree))
            named |= {f"{name}.{moment}": array for name, array in of_each}
        return named


def check_finite(number: float, name: str) -> None:
    if not math.isfinite(number):
        raise NotFiniteError(f"{name} is not finite ({number})")


# --- Adam's state -------------------------------------------------------------------------------


def adam_state(
    model: nn.Module, learning_rate: float, saved: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Adam's state for the trainable parameters of a model, as one array.

    Adam is MLX's own as it comes, without bias correction, as in mlx-examples and mlx_lm.lora: the
    default learning rate and recipes for MLX are made for it.

    Args:
        saved: as `Trainer.named_state` has it; parameters without moments start fresh.
    """
    parameters, optimizer = model.trainable_parameters(), optim.Adam(learning_rate)
    optimizer.init({ALL: joined(parameters)})
    state = dict(optimizer.state)
    state["step"] = mx.array(saved.get("step", state["step"]))
    for moment in ("m", "v"):
        of_each = {
            name: mx.array(saved.get(f"{name}.{moment}", np.zeros(array.shape, np.float32)))
            for name, array in tree_flatten(parameters)
        }
        state[ALL][moment] = joined(of_each)
    return state


@mx.compile
def joined(arrays: dict) -> mx.array:
    """All arrays of a tree as one, of one dimension; each has zeros to a multiple of ALIGNED."""
    flat = [array.flatten() for _, array in tree_flatten(arrays)]
    return mx.concatenate([mx.pad(a, (0, gap_after(a))) if gap_after(a) else a for a in flat])


@mx.compile
def parted(flat: mx.array, like: dict) -> dict:
    """The arrays that were `joined`, as a tree of such shapes."""
    arrays, start = [], 0
    for name, array in tree_flatten(like):
        arrays.append((name, flat[start : start + array.size].reshape(array.shape)))
        start += array.size + gap_after(array)
    return tree_unflatten(arrays)


def gap_after(array: mx.array) -> int:
    """How many zeros stand between an array that was joined and the next."""
    return -array.size % ALIGNED


# --- Memory -------------------------------------------------------------------------------------


def fit_memory(
    model: nn.Module, loss: Loss, examples: batching.Examples, batch_size: int, micro_batches: int,
    group: Group = ALONE,
) -> int:  # fmt: skip
    """In how many micro-batches, at least, the largest batch fits into memory, found by trying.

    It is the same number for all processes, of which one may have less memory.

    Where a single text does not fit, the layers keep only their inputs for the backward pass, and
    compute the rest again.

    Raises:
        UserError: even so it takes more memory than there is.
    """
    longest = np.argsort(examples.lengths, kind="stable")[-batch_size:]
    rows, tokens, limit = len(longest), examples.lengths.max(), memory.available()

    def try_step(number: int) -> None:
        step, state = make_step(model, loss), adam_state(model, 0.0, {})
        result = step(Parameters.of(model), state, [examples.batch(longest[-number:])])
        mx.eval(result.loss, result.parameter_sum, result.state)

    most = -(-rows // micro_batches)
    fitting = fit_texts(model, try_step, most, limit, tokens)
    if fitting < most:
        micro_batches = -(-rows // fitting)
        warn(
            f"{rows} texts of up to {tokens} tokens do not fit into {limit / 1e9:.3g} "
            f"GB of memory, so each batch is computed in {micro_batches} micro-batches, with the "
            "same result"
        )
    most = max(number for _, number in group.gather(count=micro_batches))
    if micro_batches < most:
        warn(
            "another process has less memory, so each share of a batch is computed in "
            f"{most} micro-batches, with the same result"
        )
    return most


def fit_texts(
    model: nn.Module, try_step: Callable[[int], None], most: int, limit: int, tokens: int
) -> int:
    """How many of the longest texts fit; if not one does, layers are computed twice from now on.

    Raises:
        UserError: even so not one fits.
    """
    with hint_if_slow(TRYING):
        if fitting := memory.number_that_fits(try_step, most, limit):
            return fitting
    warn(f"a text of {tokens} tokens takes too much memory, so layers are computed twice, slower")
    models.checkpoint_layers(model)
    if fitting := memory.number_that_fits(try_step, most, limit):
        return fitting
    raise UserError(
        f"a text of {tokens} tokens takes more memory than the {limit / 1e9:.3g} GB there are; "
        "lower --max-seq-length or --lora-layers, or take a smaller or a quantized model"
    )
