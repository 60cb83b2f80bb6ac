"""The table of all that stands in the place of MLX's and mlx-lm's own functions.

The other replacement is the loss, which `training.losses.make_loss` chooses.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora_finetune.base.errors import first_line
from lora_finetune.mlx_patches import activations, attention, recurrences, rope
from lora_finetune.mlx_patches.transforms import compiled_if_possible

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import bailing_hybrid, bailing_moe_linear, jamba, recurrent_gemma
from mlx_lm.models.activations import swiglu


def table() -> dict[Callable, Callable]:
    """The functions of MLX and mlx-lm, and what stands in their place."""
    return {
        mx.fast.scaled_dot_product_attention: attention.attention,
        nn.silu: activations.silu,
        nn.gelu_approx: activations.gelu_approx,
        swiglu: activations.swiglu,
        recurrences.gated_delta_by_tokens: recurrences.gated_delta_by_chunks,
        # mlx-lm's form of the same attention by chunks, written for another architecture.
        bailing_moe_linear.recurrent_gla: bailing_hybrid.recurrent_gla,
        recurrences.whole_ssm: recurrences.ssm_in_chunks,
        recurrent_gemma.rnn_scan: recurrences.rnn_scan_in_chunks,
        jamba.JambaMambaMixer.ssm_step: recurrences.jamba_ssm_in_chunks,
    }


@contextmanager
def applied() -> Iterator[None]:
    """While it lasts, the functions of the table are in use in all modules of mlx-lm so far.

    What these compiled for all shapes at once, which needs rules that our operations lack, is
    compiled for each shape instead.
    """
    activations.has_slow_exp()  # where MLX cannot compile, this turns it off
    modules = [module for name, module in sys.modules.items() if name.startswith("mlx_lm.models.")]
    places = [mx.fast, nn, jamba.JambaMambaMixer, *modules]
    present = [(place, name, value) for place in places for name, value in vars(place).items()]
    kind = type(mx.compile(abs))
    compiled = [value for *_, value in present if type(value) is kind]
    # MLX does not tell what function was compiled; Python's garbage collector knows.
    new = {id(value): mx.compile(gc.get_referents(value)[-1]) for value in compiled}
    new |= {id(original): function for original, function in table().items()}
    replaced = [each for each in present if id(each[2]) in new]
    for place, name, value in replaced:
        setattr(place, name, new[id(value)])
    try:
        yield
    finally:
        for place, name, value in replaced:
            setattr(place, name, value)


# --- A comparison -------------------------------------------------------------------------------


def differs_from_plain(
    model: nn.Module, make_loss: Callable[..., Callable], tokens: mx.array
) -> str | None:
    """Why a text's loss and gradients with the table are not those without it; None if they are.

    Rounding adds up through the layers: twice the square root of the coarsest parameter's precision
    is allowed, 18 % in bfloat16 (8.5 % was seen with gemma3n) and 6 % in other types, whose factors
    Macs may round to ten bits (1.2 % was seen in float16). That is of the loss and of the norm of
    each gradient, or of a tenth of the largest such norm. A wrong mask or formula differs by more.
    Where the plain way fails or is not finite, there is nothing to compare with.

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
    if not all(map(math.isfinite, norms.values())):
        return None
    floor = max(norm for name, norm in norms.items() if name != LOSS) / 10
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
    parameters = model.trainable_parameters()
    function = nn.value_and_grad(model, lambda *batch: rope.by_length(loss)(model, *batch)[0])
    model.train()
    try:
        total, gradients = compiled_if_possible(function)(tokens, mx.ones_like(tokens) > 0)
        found = {LOSS: total} | {f"the gradient of {n}": g for n, g in tree_flatten(gradients)}
        mx.eval(found)
        return found
    finally:
        model.eval()
        model.update(parameters)  # in the place of MLX's placeholders
