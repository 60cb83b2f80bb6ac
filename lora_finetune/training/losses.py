"""The loss of a batch: the plain one, and the same by chunks, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

from lora_finetune.base.errors import bar_options, warn
from lora_finetune.mlx_patches import patches, rope
from lora_finetune.mlx_patches.activations import exp, log_sum_exp
from lora_finetune.mlx_patches.modules import intercepted
from lora_finetune.mlx_patches.transforms import in_turn
from lora_finetune.model_folder.targets import is_linear, linear_shape
from lora_finetune.texts import batching
from lora_finetune.training.distributed import ALONE, Group
from lora_finetune.training.shard import whole

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

# Takes the model and the arrays of a batch.
Loss = Callable[..., tuple[mx.array, mx.array]]


def loss(model: nn.Module, tokens: mx.array, is_target: mx.array) -> tuple[mx.array, mx.array]:
    """Sum of the cross-entropy over the target tokens of a batch that count, in float32.

    The sum and not the mean, whose gradients would be too small for the layers of a float16 model.

    Args:
        tokens: int32 (rows, width), padded on the right; token t predicts token t + 1.
        is_target: bool (rows, width), whether a token counts; padding and prompts do not.

    Returns:
        The sum in nats, and the number of targets that count; both scalars.
    """
    inputs, targets, mask = tokens[:, :-1], tokens[:, 1:], is_target[:, 1:]
    logits = model(inputs).astype(mx.float32)
    target_logits = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ((mx.logsumexp(logits, axis=-1) - target_logits) * mask).sum(), mask.sum()


# --- Cross-entropy ------------------------------------------------------------------------------

# How many logits the cache of a CPU can hold while they are worked on.
CACHED_LOGITS = 2**19


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """−log softmax(logits)[target] in nats and float32; on a GPU with MLX's own kernel.

    Args:
        logits: (rows, vocabulary), of any floating-point type.
        targets: integers (rows,).
    """
    if mx.default_device() == mx.gpu:
        # MLX refuses a gradient to targets, and asks for one where they wait for another chunk.
        return mx.fast.cross_entropy(logits, mx.stop_gradient(targets))
    return cross_entropy_in_cache(logits, targets)[0]


@mx.custom_function
def cross_entropy_in_cache(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """The losses, and the log-sum-exp of the logits; both float32 (rows,).

    In half the time of MLX's own with its gradient (115 ms, not 202, for 96 × 49,152 logits).
    """
    log_sums = in_cache(lambda rows: log_sum_exp(rows.astype(mx.float32)), logits)
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return log_sums - target_logits.astype(mx.float32), log_sums


@cross_entropy_in_cache.vjp
def cross_entropy_vjp(inputs: tuple, cotangents: tuple, outputs: tuple) -> tuple:
    """(Softmax − one-hot) · cotangent; and nothing to the targets."""

    def gradient(logits: mx.array, *columns: mx.array) -> mx.array:
        targets, log_sums, cotangent = (column[:, None] for column in columns)
        softmax = exp(logits.astype(mx.float32) - log_sums)
        one_hot = mx.arange(logits.shape[1]) == targets
        return ((softmax - one_hot) * cotangent).astype(logits.dtype)

    return in_cache(gradient, *inputs, outputs[1], cotangents[0]), mx.zeros_like(inputs[1])


def in_cache(function: Callable[..., mx.array], logits: mx.array, *arrays: mx.array) -> mx.array:
    """The results of a function for as many rows at a time as the cache holds."""
    size = max(1, CACHED_LOGITS // logits.shape[1])
    return mx.concatenate(in_turn(function, chunks_of(size, logits, *arrays)))


def chunks_of(size: int, *arrays: mx.array) -> list[list[mx.array]]:
    """Arrays of the same number of rows, `size` rows at a time."""
    starts = range(0, len(arrays[0]), size)
    return [[array[start : start + size] for array in arrays] for start in starts]


# --- By chunks of tokens ------------------------------------------------------------------------

# Rows of a chunk on a CPU, whose products of fewer are slow, and its logits on a GPU, to fill it.
CHUNK_ROWS, CHUNK_LOGITS = 96, 2**27


def make_loss(model: nn.Module, plain: bool = False) -> Loss:
    """`loss`, or unless `plain` the same without an array of tokens × vocabulary.

    The head's logits, the loss and, in training, the gradient to the hidden states are computed for
    one chunk of tokens after another, and only the gradient is kept. Without a frozen head that
    makes the logits it is `loss` itself.
    """
    head = None if plain else find_head(model)
    return partial(loss_by_chunks, head) if head else loss


def loss_by_chunks(
    head: nn.Module, model: nn.Module, tokens: mx.array, is_target: mx.array
) -> tuple[mx.array, mx.array]:
    """As `loss`; the gradient is computed along with it where the model is in training mode."""
    hidden, logits_of = split_at(head, model, tokens[:, :-1])
    hidden, mask = hidden.flatten(0, 1), is_target[:, 1:].flatten()

    def losses_of(hidden: mx.array, targets: mx.array) -> mx.array:
        return cross_entropy(logits_of(hidden), targets)

    def total_of(hidden: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        return (losses_of(hidden, targets) * mask).sum()

    def total_and_gradient(*chunk: mx.array) -> tuple[mx.array, mx.array]:
        hidden, targets, mask = chunk
        (losses,), (gradient,) = mx.vjp(partial(losses_of, targets=targets), [hidden], [mask])
        return (losses * mask).sum(), gradient

    def chunks(hidden: mx.array) -> list[list[mx.array]]:
        size = rows_of_chunk(len(hidden), num_outputs(head))
        return chunks_of(size, hidden, tokens[:, 1:].flatten(), mask.astype(mx.float32))

    @mx.custom_function
    def with_gradient(hidden: mx.array) -> tuple[mx.array, mx.array]:
        totals, gradients = zip(*in_turn(total_and_gradient, chunks(hidden)), strict=True)
        return mx.stack(totals).sum(), mx.concatenate(gradients)

    @with_gradient.vjp
    def with_gradient_vjp(_: mx.array, cotangents: tuple, outputs: tuple) -> mx.array:
        gradient = outputs[1]
        # Spread out first: multiplied by a scalar, it would be a kernel to compile on a GPU.
        factor = mx.broadcast_to(cotangents[0].astype(gradient.dtype), gradient.shape)
        return gradient * mx.contiguous(factor)

    with whole(head, hidden):
        if model.training:
            return with_gradient(hidden)[0], mask.sum()
        return mx.stack(in_turn(total_of, chunks(hidden))).sum(), mask.sum()


def rows_of_chunk(rows: int, num_logits: int) -> int:
    """Rows in a chunk, a multiple of 16 that makes the chunks about equal."""
    on_gpu = mx.default_device() == mx.gpu
    chunks = -(-rows * num_logits // CHUNK_LOGITS) if on_gpu else -(-rows // CHUNK_ROWS)
    return -(-rows // chunks // 16) * 16


def disagree_on_metal(examples: dict[str, batching.Examples], model: nn.Module) -> bool:
    """Whether, on a Mac, a first text's loss and gradients are not those of MLX's own functions."""
    if "train" not in examples or not mx.metal.is_available():
        return False
    tokens, *_ = examples["train"].batch(np.array([0]))
    why = patches.differs_from_plain(model, make_loss, tokens)
    if why:
        warn(
            f"on this Mac this program's fast functions and MLX's own differ ({why}), so the run "
            "goes on with MLX's, as with --plain; please report this line and the model"
        )
    return bool(why)


# --- The head -----------------------------------------------------------------------------------


def find_head(model: nn.Module) -> nn.Module | None:
    """The linear layer or embedding whose single call makes the logits, if there is one.

    Some models scale or cap its logits; that must depend on nothing else.
    """
    called: list[nn.Module] = []

    def record(module: nn.Module, method: Callable, *args: mx.array) -> mx.array:
        called.append(module)
        return method(module, *args)

    with ExitStack() as stack:
        for module in model.modules():
            if num_outputs(module):
                reply = partial(record, module, linear_method(module))
                stack.enter_context(replaced(module, reply))
        num_logits = model(mx.array([[0]])).shape[-1]  # not computed
    head = called[-1]
    if num_outputs(head) != num_logits or sum(module is head for module in called) != 1:
        return None
    logits = mx.arange(num_logits)[None] / num_logits
    first, second = (finished(head, model, logits, token) for token in (0, 1))
    return head if mx.array_equal(first, second) else None


def split_at(
    head: nn.Module, model: nn.Module, inputs: mx.array
) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
    """The head's input (rows, length, width), and what makes logits (rows, …) of its rows."""
    given, logits = [], mx.zeros((*inputs.shape, num_outputs(head)))  # which is never computed
    with replaced(head, lambda hidden: (given.append(hidden), logits)[1]):
        is_finished = model(inputs) is logits

    def logits_of(hidden: mx.array) -> mx.array:
        logits = linear_method(head)(head, hidden)
        return logits if is_finished else finished(head, model, logits)

    return given[0], logits_of


def finished(head: nn.Module, model: nn.Module, logits: mx.array, token: int = 0) -> mx.array:
    """The model's logits from its head's, both (rows, vocabulary), whatever the tokens are."""
    with replaced(head, lambda _: logits[None]):
        return model(mx.array([[token]])).flatten(0, 1)


def linear_method(module: nn.Module) -> Callable[..., mx.array]:
    """The method by which a linear layer, or an embedding used as one, is called."""
    return getattr(type(module), "as_linear", type(module).__call__)


def replaced(
    module: nn.Module, reply: Callable[[mx.array], mx.array]
) -> AbstractContextManager[None]:
    return intercepted(module, reply, linear_method(module).__name__)


def num_outputs(module: nn.Module) -> int:
    """The rows of the weight of a linear layer or embedding; 0 for other modules."""
    if hasattr(module, "as_linear"):
        return module.weight.shape[0]
    return linear_shape(module)[0] if is_linear(module) else 0


# --- The loss of many batches -------------------------------------------------------------------


def evaluate(
    model: nn.Module, loss: Loss, examples: batching.Examples, batch_size: int, num_batches: int,
    group: Group = ALONE, micro_batches: int = 1,
) -> float:  # fmt: skip
    """Mean loss in nats per target token over the first batches (-1: over all examples)."""
    model.eval()
    total, num_targets = 0.0, 0
    shares = micro_batches * group.size
    batches = batching.evaluation_batches(examples, batch_size, num_batches, shares)
    starts = range(0, len(batches), group.size)  # of rounds, in which each process has one
    for start in tqdm(starts, "Evaluating", leave=False, **bar_options()):
        group.check_stop()
        own, number = (0.0, 0), start + group.rank
        if number < len(batches) or group.shares_weights:
            batch = map(mx.array, examples.batch(batches[min(number, len(batches) - 1)]))
            found = group.compute(rope.by_length(loss), model, *batch)
            own = [n.item() for n in found] if number < len(batches) else own
        for batch_total, number in group.gather(*own):
            total += batch_total
            num_targets += number
    return total / max(num_targets, 1)
