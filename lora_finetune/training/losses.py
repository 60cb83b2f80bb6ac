"""The loss of a batch: the plain one, and one that takes the head's logits piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple

import models
from lora_finetune.mlx_patches.activations import exp, log_sum_exp
from lora_finetune.mlx_patches.compiling import hint_if_compiling
from lora_finetune.mlx_patches.modules import intercepted

import mlx.core as mx
import mlx.nn as nn

# Takes the model and the arrays of a batch.
Loss = Callable[..., tuple[mx.array, mx.array]]


def in_turn(function: Callable[..., Any], size: int, *arrays: mx.array) -> list[Any]:
    """What a function makes of `size` rows of arrays at a time, in turn."""
    values = []
    for start in range(0, len(arrays[0]), size):
        rows = [array[start : start + size] for array in arrays]
        values.append(function(*(mx.depends(rows, values[-1]) if values else rows)))
    return values


# How many logits the cache of a CPU can hold while they are worked on.
CACHED_LOGITS = 2**19


def in_cache(function: Callable[..., mx.array], logits: mx.array, *arrays: mx.array) -> mx.array:
    """What a function makes of the rows of logits and arrays, for as many at a time as fit."""
    size = max(1, CACHED_LOGITS // logits.shape[1])
    return mx.concatenate(in_turn(function, size, logits, *arrays))


@mx.custom_function
def cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """−log softmax(logits)[target] in float32.

    Args:
        logits: (rows, vocabulary), of any floating-point type.
        targets: integers (rows,).

    Returns:
        The losses in nats, and the log-sum-exp of the logits; both float32 (rows,).
    """
    log_sums = in_cache(lambda rows: log_sum_exp(rows.astype(mx.float32)), logits)
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return log_sums - target_logits.astype(mx.float32), log_sums


@cross_entropy.vjp
def cross_entropy_vjp(
    primals: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
    outputs: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    """Softmax − one-hot, times the cotangent."""
    (logits, targets), (_, log_sums) = primals, outputs

    def gradient(
        logits: mx.array, targets: mx.array, log_sums: mx.array, cotangent: mx.array
    ) -> mx.array:
        softmax = exp(logits.astype(mx.float32) - log_sums[:, None])
        one_hot = mx.arange(logits.shape[1]) == targets[:, None]
        return ((softmax - one_hot) * cotangent[:, None]).astype(logits.dtype)

    return in_cache(gradient, logits, targets, log_sums, cotangents[0]), mx.zeros_like(targets)


def losses_of(logits: mx.array, targets: mx.array) -> mx.array:
    """The cross-entropy of each row, in nats and float32; on a GPU with MLX's own kernel."""
    if mx.default_device() == mx.gpu:
        # MLX refuses a gradient to targets, and asks for one where they wait for another piece.
        return mx.fast.cross_entropy(logits, mx.stop_gradient(targets))
    return cross_entropy(logits, targets)[0]


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
    losses = losses_of(model(inputs).flatten(0, 1), targets.flatten())
    return (losses * mask.flatten()).sum(), mask.sum()


# --- Piece by piece -----------------------------------------------------------------------------

# How large a piece is: in rows on a CPU, whose products of fewer rows are slow, and in logits on a
# GPU, which small pieces would not fill.
PIECE_ROWS, PIECE_LOGITS = 96, 2**27


def make_loss(model: nn.Module) -> Loss:
    """`loss` with little memory for this model: without an array of tokens × vocabulary.

    The head's logits, the loss and, in training, the gradient to the hidden states are computed for
    some tokens after the other, and only the gradient is kept. This needs a frozen head that is the
    last to see hidden states, whatever is done to its logits; for other models it is `loss` itself.
    """
    model.eval()
    head = find_head(model)
    if head is None:
        return loss
    by_pieces = partial(loss_by_pieces, head)
    tokens, is_target = mx.arange(9)[None] % head.num_logits, mx.ones((1, 9), mx.bool_)
    with hint_if_compiling("the model on a few tokens"):
        expected, found = (
            function(model, tokens, is_target)[0].item() for function in (loss, by_pieces)
        )
    return by_pieces if abs(found - expected) <= 1e-3 * abs(expected) else loss


def loss_by_pieces(
    head: Head, model: nn.Module, tokens: mx.array, is_target: mx.array
) -> tuple[mx.array, mx.array]:
    """As `loss`; the gradient is computed along with it where the model is in training mode."""
    hidden = head.hidden_states(tokens[:, :-1]).flatten(0, 1)
    targets, mask = tokens[:, 1:].flatten(), is_target[:, 1:].flatten()

    def of_piece(hidden: mx.array, targets: mx.array) -> mx.array:
        return losses_of(head.logits(hidden), targets)

    def piece_loss(hidden: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        return (of_piece(hidden, targets) * mask).sum()

    def piece_gradient(
        hidden: mx.array, targets: mx.array, mask: mx.array
    ) -> tuple[mx.array, mx.array]:
        (losses,), (gradient,) = mx.vjp(partial(of_piece, targets=targets), [hidden], [mask])
        return (losses * mask).sum(), gradient

    size = rows_of_piece(len(hidden), head.num_logits)

    @mx.custom_function
    def with_gradient(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        totals, gradients = zip(*in_turn(piece_gradient, size, *arrays), strict=True)
        return mx.stack(totals).sum(), mx.concatenate(gradients)

    @with_gradient.vjp
    def with_gradient_vjp(arrays, cotangents, outputs):
        gradient, others = outputs[1], [mx.zeros_like(array) for array in arrays[1:]]
        # Spread out first: multiplied by a scalar, it would be a kernel to compile on a GPU.
        factor = mx.broadcast_to(cotangents[0].astype(gradient.dtype), gradient.shape)
        return gradient * mx.contiguous(factor), *others

    if model.training:
        total, _ = with_gradient(hidden, targets, mask.astype(mx.float32))
    else:
        total = mx.stack(in_turn(piece_loss, size, hidden, targets, mask)).sum()
    return total, mask.sum()


def rows_of_piece(rows: int, num_logits: int) -> int:
    """Rows in a piece, a multiple of 16 that makes the pieces of so many rows about equal."""
    on_gpu = mx.default_device() == mx.gpu
    pieces = -(-rows * num_logits // PIECE_LOGITS) if on_gpu else -(-rows // PIECE_ROWS)
    return -(-rows // pieces // 16) * 16


class Head(NamedTuple):
    """The module that makes logits of hidden states.

    Attributes:
        model: the model that it is in.
        module: a frozen linear layer, or an embedding that serves as one.
        num_logits: for each token; as many as there are tokens, and often some more.
        is_last: whether its logits are the model's; some models scale or cap them.
    """

    model: nn.Module
    module: nn.Module
    num_logits: int
    is_last: bool

    def hidden_states(self, inputs: mx.array) -> mx.array:
        """What the head is given for tokens (rows, length): (rows, length, width)."""
        given, logits = [], mx.zeros((*inputs.shape, self.num_logits))  # which is never computed
        with replaced(self.module, lambda hidden: (given.append(hidden), logits)[1]):
            self.model(inputs)
        return given[0]

    def logits(self, hidden: mx.array) -> mx.array:
        """The model's logits (rows, num_logits) for hidden states (rows, width)."""
        logits = as_linear(self.module)(hidden)
        if self.is_last:
            return logits
        with replaced(self.module, lambda _: logits[None]):
            # Whatever the tokens are, this is made of the logits.
            return self.model(ONE_TOKEN).flatten(0, 1)


ONE_TOKEN = mx.array([[0]])


def find_head(model: nn.Module) -> Head | None:
    """The module that makes the logits of a model, the last with so many outputs, if one does."""
    logits, called = model(ONE_TOKEN), []
    with ExitStack() as stack:
        for module in model.modules():
            if num_outputs(module) == logits.shape[-1]:
                stack.enter_context(replaced(module, recorder(module, called)))
        model(ONE_TOKEN)
    if sum(module is called[-1] for module in called) != 1:
        return None
    module, same = called[-1], mx.zeros(logits.shape)
    with replaced(module, lambda _: same):
        return Head(model, module, logits.shape[-1], model(ONE_TOKEN) is same)


def recorder(module: nn.Module, called: list[nn.Module]) -> Callable[[mx.array], mx.array]:
    """What a module does as a linear layer, and in `called` that it did."""
    apply = as_linear(module)
    return lambda x: (called.append(module), apply(x))[1]


def as_linear(module: nn.Module) -> Callable[[mx.array], mx.array]:
    """The method of a linear layer, or of an embedding that serves as one, to be called with x."""
    return getattr(type(module), "as_linear", type(module).__call__).__get__(module)


def replaced(
    module: nn.Module, reply: Callable[[mx.array], mx.array]
) -> AbstractContextManager[None]:
    """While it lasts, `reply` answers in place of a linear layer, or an embedding used as one."""
    return intercepted(module, reply, as_linear(module).__name__)


def num_outputs(module: nn.Module) -> int:
    """The rows of the weight of a linear layer or embedding; 0 for other modules."""
    if hasattr(module, "as_linear"):
        return module.weight.shape[0]
    return models.linear_shape(module)[0] if models.is_linear(module) else 0
