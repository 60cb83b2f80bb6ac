"""The table of all that stands in the place of MLX's and mlx-lm's own functions.

The other replacement is the loss, which `training.losses.make_loss` chooses.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from lora_finetune.base.errors import first_line
from lora_finetune.mlx_patches import activations, attention, recurrences, rope
from lora_finetune.mlx_patches.compiling import compiled_if_possible

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import activations as mlx_lm_activations
from mlx_lm.models import (
    bailing_hybrid,
    bailing_moe_linear,
    gated_delta,
    jamba,
    recurrent_gemma,
    ssm,
)

mlx_compile = mx.compile


def compile_for_each_shape(
    fun: Callable, inputs: object = None, outputs: object = None, shapeless: bool = False
) -> Callable:
    """mx.compile, but never for all shapes at once, which needs rules that our operations lack."""
    return mlx_compile(fun, inputs, outputs)


def table() -> list[tuple[object, str, Callable]]:
    """Owners, names and what is put there."""
    # mlx-lm's form of the same attention by chunks, written for another architecture.
    lightning_attention = partial(bailing_hybrid.recurrent_gla)
    return [
        (mx, "compile", compile_for_each_shape),
        (mx.fast, "scaled_dot_product_attention", attention.attention),
        (nn, "silu", activations.silu),
        (nn, "gelu_approx", activations.gelu_approx),
        (mlx_lm_activations, "swiglu", activations.swiglu),
        (gated_delta, "gated_delta_ops", recurrences.gated_delta_by_chunks),
        (bailing_moe_linear, "recurrent_gla", lightning_attention),
        (ssm, "ssm_attn", recurrences.ssm_in_chunks),
        (recurrent_gemma, "rnn_scan", recurrences.rnn_scan_in_chunks),
        (jamba.JambaMambaMixer, "ssm_step", recurrences.jamba_ssm_in_chunks),
    ]


@contextmanager
def applied() -> Iterator[None]:
    """While it lasts, the functions of the table are in use, in all modules of mlx-lm.

    It does not matter which of these were imported before. What they compiled for all shapes is
    compiled for each instead.
    """
    activations.has_slow_exp()  # where MLX cannot compile, this turns it off
    kind = type(mlx_compile(abs))
    compiled = [v for module in mlx_lm_modules() for v in vars(module).values() if type(v) is kind]
    # MLX does not tell what function was compiled; Python's garbage collector knows.
    pairs = [(f, compile_for_each_shape(gc.get_referents(f)[-1])) for f in compiled]
    pairs += [(getattr(owner, name), function) for owner, name, function in table()]
    exchange(pairs)
    try:
        yield
    finally:
        exchange([(new, old) for old, new in pairs])


def exchange(pairs: list[tuple[Callable, Callable]]) -> None:
    """Put the second function of a pair wherever the first is."""
    new = {id(old): function for old, function in pairs}
    owners = {id(owner): owner for owner, _, _ in table()}
    for owner in [*owners.values(), *mlx_lm_modules()]:
        for name, value in list(vars(owner).items()):
            if id(value) in new:
                setattr(owner, name, new[id(value)])


def mlx_lm_modules() -> list[object]:
    return [m for name, m in list(sys.modules.items()) if name.startswith("mlx_lm.models.")]


# --- A comparison -------------------------------------------------------------------------------


def differs_from_plain(
    model: nn.Module, make_loss: Callable[..., Callable], tokens: mx.array
) -> str | None:
    """Why a text's loss and gradients with the table are not those without it; None if they are.

    Rounding adds up through the layers, so what counts as more is twice the square root of the
    precision of the coarsest type among the model's parameters: 18 % in bfloat16 (8.5 % was seen
    with gemma3n, 1.3 % with SmolLM2), and 6 % in float16 (1.2 % seen) and in float32 (1e-5 seen),
    whose factors Macs may round to ten bits. That is of the loss, and of the norm of each
    parameter's gradient, or of a tenth of the largest such norm. A wrong mask or formula makes more
    of a difference. Where the plain way fails or is not finite, there is nothing to compare with.

    Args:
        make_loss: `training.losses.make_loss`; called outside of `applied`.
        tokens: (rows, width), of which up to 64 of the first row are taken, all as targets.
    """
    tokens = mx.array(tokens)[:1, :64]
    try:
        with applied():
            found = loss_and_gradients(model, make_loss(model), tokens)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    try:
        expected = loss_and_gradients(model, make_loss(model, plain=True), tokens)
    except Exception:
        return None
    norms = {name: mx.linalg.norm(array).item() for name, array in expected.items()}
    floor = max(norm for name, norm in norms.items() if name != LOSS) / 10
    if not all(map(math.isfinite, norms.values())):
        return None
    dtypes = {array.dtype for _, array in tree_flatten(model.parameters())}
    floats = [dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating)]
    most = 2 * math.sqrt(max(2**-10, *(mx.finfo(dtype).eps for dtype in floats)))
    for name, norm in norms.items():
        difference = mx.linalg.norm(found[name] - expected[name]).item()
        share = difference / max(norm, floor if name != LOSS else 0, 1e-30)
        if not share <= most:  # not a number either
            return f"{name} differs by {100 * share:.3g} %"
    return None


LOSS = "the loss"


def loss_and_gradients(model: nn.Module, loss: Callable, tokens: mx.array) -> dict[str, mx.array]:
    """The loss of a text, and the gradients by their parameters' names."""
    parameters, was_training = model.trainable_parameters(), model.training
    function = nn.value_and_grad(model, lambda *batch: rope.by_length(loss)(model, *batch)[0])
    try:
        model.train()
        total, gradients = compiled_if_possible(function)(tokens, mx.ones_like(tokens) > 0)
        found = {LOSS: total} | {f"the gradient of {n}": g for n, g in tree_flatten(gradients)}
        mx.eval(found)
        return found
    finally:
        model.train(was_training)
        model.update(parameters)  # in the place of MLX's placeholders
