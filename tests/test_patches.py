"""The fast ways to compute are the plain ones, to rounding."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext

import models
import tiny
from conftest import ROOT
from lora_finetune.mlx_patches import activations, attention, patches
from lora_finetune.training import losses
from lora_finetune.training.losses import Loss
from test_models import ADAPTED, IS_TARGET, TOKENS, adapt, build, trainable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import bailing_moe_linear, jamba, recurrent_gemma, ssm

# --- exp ----------------------------------------------------------------------------------------


@pytest.fixture
def fast_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast exp, for this test alone."""
    monkeypatch.setattr(activations, "has_slow_exp", lambda: True)


def test_exp_is_right_to_two_parts_in_ten_million(fast_exp: None) -> None:
    x = np.linspace(-87, 88, 2_000_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(np.array(activations.exp(mx.array(x)), np.float64) / exact - 1).max() < 2e-7


def test_exp_of_what_float32_cannot_hold_is_next_to_nothing_or_huge(fast_exp: None) -> None:
    x = mx.array([-math.inf, -1e30, -100, 0, 100, 1e30, math.inf, math.nan])
    found = activations.exp(x).tolist()
    assert all(0 <= value < 2e-38 for value in found[:3])
    assert found[3] == 1
    assert all(value > 1e38 for value in found[4:7])
    assert math.isnan(found[7])


def test_the_log_sum_exp_is_that_of_mlx(fast_exp: None) -> None:
    x = mx.random.normal((50, 3000)) * 10
    x[0, 0] = 1e4
    expected = mx.logsumexp(x, axis=-1)
    np.testing.assert_allclose(activations.log_sum_exp(x), expected, rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize(("device", "slow_exp"), [(mx.cpu, True), (mx.cpu, False), (mx.gpu, False)])
def test_the_gated_unit_and_its_gradients_are_those_of_mlx(
    monkeypatch: pytest.MonkeyPatch, device: mx.DeviceType, slow_exp: bool
) -> None:
    """As it is computed on a GPU, too."""
    monkeypatch.setattr(activations, "has_slow_exp", lambda: slow_exp)
    monkeypatch.setattr(mx, "default_device", lambda: device)
    gate, x, weight = (mx.random.normal((40, 30)) * 4 for _ in range(3))

    def plain(gate: mx.array, x: mx.array) -> mx.array:
        return (gate * mx.sigmoid(gate) * x * weight).sum()

    def fast(gate: mx.array, x: mx.array) -> mx.array:
        return (activations.swiglu(gate, x) * weight).sum()

    np.testing.assert_allclose(
        activations.swiglu(gate, x), gate * mx.sigmoid(gate) * x, rtol=2e-6, atol=1e-6
    )
    for a, b in zip(*(mx.grad(f, argnums=(0, 1))(gate, x) for f in (plain, fast)), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-6, atol=2e-5)


ACTIVATIONS = {
    "silu": (activations.silu, lambda x: x / (1 + np.exp(-x))),
    "gelu_approx": (
        activations.gelu_approx,
        lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
}


@pytest.mark.parametrize("slow_exp", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_gradient_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, name: str, slow_exp: bool
) -> None:
    monkeypatch.setattr(activations, "has_slow_exp", lambda: slow_exp)
    function, formula = ACTIVATIONS[name]
    x = np.concatenate([np.linspace(-200, 200, 4001), np.linspace(-6, 6, 4001)])
    gradient = (formula(x + 1e-5) - formula(x - 1e-5)) / 2e-5
    of_sum = mx.compile(mx.value_and_grad(lambda x: function(x).sum()))
    array = mx.array(x.astype(np.float32))
    np.testing.assert_allclose(function(array), formula(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(of_sum(array)[1], gradient, rtol=1e-6, atol=2e-6)


def test_gelu_of_bfloat16_is_rounded_once() -> None:
    """Where MLX's own rounds each of its steps."""
    formula = ACTIVATIONS["gelu_approx"][1]
    array = mx.array(np.linspace(-5, 5, 4001)).astype(mx.bfloat16)
    x = np.array(array.astype(mx.float32), np.float64)
    gradient = (formula(x + 1e-5) - formula(x - 1e-5)) / 2e-5
    values, (found,) = mx.vjp(activations.gelu_approx, [array], [mx.ones_like(array)])
    np.testing.assert_allclose(values[0].astype(mx.float32), formula(x), rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(found.astype(mx.float32), gradient, rtol=2**-8, atol=1e-6)


def test_an_activation_keeps_its_input_only() -> None:
    """The peak of memory says so: twenty more in a row keep some twenty arrays more."""
    x, peaks = mx.random.normal((500, 1000)), []
    for number in (20, 40):

        def in_a_row(x: mx.array, number: int = number) -> mx.array:
            for _ in range(number):
                x = activations.gelu_approx(x * 1.1)
            return x.sum()

        mx.eval(x)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.compile(mx.grad(in_a_row))(x))
        peaks.append((mx.get_peak_memory() - before) / x.nbytes)
    assert peaks[1] - peaks[0] < 40  # MLX's own keeps eighty


# --- The table ----------------------------------------------------------------------------------

# Their functions compiled for all shapes call activations that are replaced.
SHAPELESS = ["gemma3n", "gemma4_text", "iquestloopcoder", "step3p5"]

IMPORTED_FIRST = """
import sys
import mlx_lm, mlx_lm.models.activations, mlx_lm.models.switch_layers
from mlx_lm.models import gemma4_text, iquestloopcoder, llama, qwen3_next
sys.path[:0] = ["tests", "."]
import mlx.core as mx
from test_models import adapt, build
from lora_finetune.mlx_patches import patches
from lora_finetune.training import losses

for name in "gemma4_text", "step3p5":
    model = build(name)
    with patches.applied():
        adapt(model)
        model.eval()
        for width in 9, 12:
            tokens = mx.arange(width)[None]
            found = losses.make_loss(model)(model, tokens, tokens > 0)[0].item()
            plain = losses.loss(model, tokens, tokens > 0)[0].item()
            assert abs(found - plain) < 1e-4 * plain, (name, found, plain)
    plain = losses.loss(model, tokens, tokens > 0)[0].item()
    assert abs(found - plain) < 1e-4 * plain, (name, found, plain)
    mx.disable_compile()  # which would take most of the time
    assert patches.differs_from_plain(model, losses.make_loss, tokens) is None, name
    mx.enable_compile()
"""


def test_it_does_not_matter_whether_mlx_lm_was_imported_before() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTED_FIRST], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_table_is_in_use_everywhere_and_then_nowhere() -> None:
    modules = [importlib.import_module(f"mlx_lm.models.{name}") for name in ("llama", *SHAPELESS)]
    places = [(mx.fast, "scaled_dot_product_attention"), (nn, "silu"), (nn, "gelu_approx")]
    places += [(jamba.JambaMambaMixer, "ssm_step"), (ssm, "ssm_attn")]
    places += [(bailing_moe_linear, "recurrent_gla"), (recurrent_gemma, "rnn_scan")]
    places += [(module, "swiglu") for module in modules if hasattr(module, "swiglu")]
    places += [(modules[2], "geglu"), (modules[4], "clamped_swiglu")]
    originals = [getattr(*place) for place in places]
    with pytest.raises(ZeroDivisionError), patches.applied():
        for place, original in zip(places, originals, strict=True):
            assert getattr(*place) is not original, place
        assert modules[0].swiglu is activations.swiglu
        raise ZeroDivisionError
    assert [getattr(*place) for place in places] == originals


# --- The comparison with what is plain ----------------------------------------------------------


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Compiling would take most of the time."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def fresh(name: str, roles: str = "all") -> nn.Module:
    model = build(name)
    adapt(model, roles)
    return model


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(name, mx.float32) for name in ("llama", "mixtral", "qwen3_next", "jamba", "talkie")],
        *[(name, mx.bfloat16) for name in ("llama", "gemma2", "gemma3n", "falcon_h1")],
        ("llama", mx.float16),
    ],
)
def test_right_ways_differ_by_rounding_only(uncompiled: None, name: str, dtype: mx.Dtype) -> None:
    model = fresh(name)
    adapter = model.trainable_parameters()
    model.set_dtype(dtype)
    model.update(adapter)
    model.eval()
    before = trainable(model)
    assert patches.differs_from_plain(model, losses.make_loss, TOKENS) is None
    assert not model.training
    assert all((before[path] == array).all() for path, array in trainable(model).items())


@pytest.mark.parametrize(
    "name", ["llama", "qwen3_moe", "phi3", "gemma3", "gpt_neox", "qwen3_next", "phi3small"]
)
def test_with_every_role_adapted_the_gradients_are_the_plain_ones(
    uncompiled: None, name: str
) -> None:
    model = fresh(name, "all,experts")
    for module in model.modules():
        if isinstance(module, models.LowRank):
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.02
    expected = patches.loss_and_gradients(model, losses.make_loss(model, plain=True), TOKENS)
    with patches.applied():
        found = patches.loss_and_gradients(model, losses.make_loss(model), TOKENS)
    most = max(mx.linalg.norm(array).item() for array in expected.values())
    for each, array in expected.items():
        error = mx.linalg.norm(found[each] - array).item()
        assert error < 1e-4 * max(mx.linalg.norm(array).item(), 1e-3 * most), each


def wrong_attention(*args: mx.array, scale: float, **options: object) -> mx.array:
    return attention.whole_attention(*args, scale=2 * scale, **options)


def failing(*_: object, **__: object) -> mx.array:
    raise RuntimeError("no such kernel\nand more")


WRONG = {
    "attention": (attention, "attention", wrong_attention, "differs by"),
    "activation": (activations, "swiglu", lambda gate, x: gate * x, "differs by"),
    "not a number": (activations, "swiglu", lambda gate, x: gate * x + math.nan, "differs by nan"),
    "loss": (losses, "cross_entropy", lambda logits, targets: logits[:, 0], "differs by"),
    "failing": (attention, "attention", failing, "RuntimeError: no such kernel"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_replacement_that_is_wrong_is_found_out(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    *place, function, message = WRONG[case]
    monkeypatch.setattr(*place, function)
    why = patches.differs_from_plain(fresh("llama"), losses.make_loss, TOKENS)
    assert message in why
    assert "\n" not in why


def test_what_is_not_finite_plainly_either_is_no_difference(uncompiled: None) -> None:
    model = fresh("llama")
    model.lm_head.weight *= math.inf
    assert patches.differs_from_plain(model, losses.make_loss, TOKENS) is None


# --- Attention by blocks ------------------------------------------------------------------------


def random_mask(*shape: int) -> mx.array:
    return mx.random.uniform(shape=shape) > 0.3


@pytest.mark.parametrize(
    ("block", "slow_exp", "on_cuda"),
    [(8, True, False), (8, False, False), (8, False, True), (64, False, True), (64, True, False)],
)
@pytest.mark.parametrize(
    ("heads", "mask", "has_sinks"),
    [
        ((4, 2), lambda: "causal", False),
        ((4, 2), lambda: "causal", True),
        ((4, 2), lambda: random_mask(33, 33), False),
        ((4, 4), lambda: random_mask(33, 33), True),
        ((4, 2), lambda: random_mask(2, 4, 33, 33), False),
        ((4, 1), lambda: mx.random.normal((33, 33)), False),
    ],
)
def test_attention_by_blocks_and_its_gradients_are_those_of_mlx(
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    slow_exp: bool,
    on_cuda: bool,
    heads: tuple[int, int],
    mask: Callable[[], object],
    has_sinks: bool,
) -> None:
    monkeypatch.setattr(activations, "has_slow_exp", lambda: slow_exp)
    monkeypatch.setattr(attention, "BLOCK", block)  # 64: a text shorter than a block
    monkeypatch.setattr(attention, "ON_CUDA", on_cuda)
    monkeypatch.setattr(attention, "LONG", 20 if on_cuda else math.inf)
    mx.random.seed(0)
    inputs = [mx.random.normal((2, n, 33, 16)) for n in (heads[0], heads[1], heads[1])]
    weight = mx.random.normal((2, heads[0], 33, 16))
    options = {"mask": mask(), "sinks": mx.random.normal((heads[0],)) if has_sinks else None}

    def of_inputs(*inputs: mx.array) -> mx.array:
        found = mx.fast.scaled_dot_product_attention(*inputs, scale=0.3, **options)
        return (found * weight).sum()

    function = mx.value_and_grad(of_inputs, argnums=(0, 1, 2))
    expected = function(*inputs)
    with patches.applied():
        found = function(*inputs)
        # compiled, what the backward pass computes again must not be merged into something else
        others = [mx.compile(function)(*inputs)] if isinstance(options["mask"], str) else []
    for other in (found, *others):
        for (_, a), (_, b) in zip(tree_flatten(expected), tree_flatten(other), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5)


def attention_gradients(
    q: mx.array, k: mx.array, v: mx.array, by_blocks: bool
) -> tuple[mx.array, ...]:
    def of_inputs(*inputs: mx.array) -> mx.array:
        found = mx.fast.scaled_dot_product_attention(*inputs, scale=1.0, mask="causal")
        return (found.astype(mx.float32) * mx.arange(1, 17)).sum()

    with patches.applied() if by_blocks else nullcontext():
        return mx.grad(of_inputs, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("on_cuda", [True, False])
def test_gradients_of_attention_have_the_types_of_its_inputs(
    monkeypatch: pytest.MonkeyPatch, on_cuda: bool
) -> None:
    """Some models (Phi) compute queries in float32, and keys and values in bfloat16."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setattr(attention, "ON_CUDA", on_cuda)
    for types in ([mx.float32, mx.bfloat16, mx.bfloat16], [mx.float32, mx.float32, mx.float16]):
        inputs = [mx.random.normal((1, 2, 20, 16)).astype(dtype) for dtype in types]
        expected = attention_gradients(*inputs, by_blocks=False)
        for a, b in zip(expected, attention_gradients(*inputs, by_blocks=True), strict=True):
            assert a.dtype == b.dtype
            a, b = a.astype(mx.float32), b.astype(mx.float32)
            assert mx.abs(a - b).max().item() < 0.05 * mx.abs(a).max().item()


def exact_attention_gradients(q: mx.array, k: mx.array, v: mx.array) -> list[np.ndarray]:
    """The same in float64, from differences of dP, which cancel nowhere."""
    q, k, v = (np.array(array.astype(mx.float32)).astype(np.float64) for array in (q, k, v))
    is_seen = np.tri(q.shape[2], dtype=bool)
    p = np.exp(np.where(is_seen, q @ k.swapaxes(-1, -2), -np.inf))
    p /= p.sum(axis=-1, keepdims=True)
    of_output = np.broadcast_to(np.arange(1.0, 17), v.shape)
    of_p = of_output @ v.swapaxes(-1, -2)
    of_scores = p * np.einsum("...ij,...ijk->...ik", p, of_p[..., None, :] - of_p[..., None])
    return [of_scores @ k, of_scores.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ of_output]


@pytest.mark.parametrize("on_cuda", [True, False])
@pytest.mark.parametrize("gap", [8, 24])
@pytest.mark.parametrize(("dtype", "most"), [(mx.bfloat16, 0.05), (mx.float32, 1e-4)])
def test_gradients_of_attention_to_one_key_are_exact(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, most: float, gap: int,
    on_cuda: bool,
) -> None:  # fmt: skip
    """Heads that look at the first token alone are many; what is left of dP must not be lost.

    MLX's own are off by a third in float32, and by more than all in bfloat16.
    """
    monkeypatch.setattr(attention, "BLOCK", 64)
    monkeypatch.setattr(attention, "ON_CUDA", on_cuda)
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, 4, 200, 16)) * 0.5 for _ in range(3))
    q[..., 0] = 4
    k[..., 0, 0] = gap / 4  # a score of so much more than those of other keys
    inputs = [array.astype(dtype) for array in (q, k, v)]
    found = attention_gradients(*inputs, by_blocks=True)
    for a, b in zip(exact_attention_gradients(*inputs), found, strict=True):
        b = np.array(b.astype(mx.float32))
        assert np.linalg.norm(b - a) < most * np.linalg.norm(a)


@pytest.mark.parametrize("on_cuda", [True, False])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_what_the_mask_hides_has_no_part_in_anything_however_high_its_score(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, on_cuda: bool
) -> None:
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setattr(attention, "ON_CUDA", on_cuda)
    mask = mx.arange(20) < 10
    q, k = mx.full((1, 1, 20, 16), 45, dtype), mx.full((1, 1, 20, 16), 45, dtype)
    k = mx.where(mask[:, None], -k, k)  # scores of ±32,400, near the most that float16 can hold
    v = mx.where(mask[:, None], 0, mx.ones((1, 1, 20, 16), dtype)).astype(dtype)
    mask = mx.broadcast_to(mask, (20, 20))

    def of_values(v: mx.array) -> tuple[mx.array, mx.array]:
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
        return found.sum(), found

    with patches.applied():
        (_, output), of_v = mx.value_and_grad(of_values)(v)
    assert (output == 0).all()
    assert (of_v[:, :, 10:] == 0).all()
    np.testing.assert_allclose(of_v[:, :, :10].astype(mx.float32), 2, rtol=0.01)


OF_CUDNN = """
import lora_finetune
from lora_finetune.mlx_patches import attention
import mlx.core as mx
for length in (512, 480):  # the second has no kernel for gradients
    q, k, v, weight = (mx.random.normal((2, heads, length, 64)) for heads in (4, 2, 2, 4))
    def both(*inputs):
        attend = lambda *qkv: attention.attention(*qkv, scale=0.1, mask="causal")
        outputs, gradients = mx.vjp(attend, inputs, [weight.astype(inputs[0].dtype)])
        return outputs + gradients
    half = [x.astype(mx.bfloat16) for x in (q, k, v)]
    assert attention.has_kernel(*half) and not attention.has_kernel(q, k, v)
    exact = both(*(x.astype(mx.float32) for x in half))
    for a, b in zip(both(*half), exact):
        assert mx.abs(a - b).max() < 0.02 * mx.abs(b).max()
"""


@pytest.mark.skipif(not mx.cuda.is_available(), reason="cuDNN is on CUDA alone")
def test_attention_of_cudnn_is_exact_to_the_rounding_of_its_type() -> None:
    """In a process of its own, since the tests are told to do without it."""
    environment = {k: v for k, v in os.environ.items() if k != "MLX_CUDA_USE_CUDNN_SDPA"}
    subprocess.run([sys.executable, "-c", OF_CUDNN], cwd=ROOT, env=environment, check=True)


def test_no_array_of_length_squared_is_kept_for_the_gradients() -> None:
    """The peak of memory says so: of ten layers it is less than a third of what MLX takes."""
    q, k, v = (mx.random.normal((1, 4, 1024, 8)) for _ in range(3))
    mx.eval(q, k, v)
    peaks = []
    for blocks in (nullcontext(), patches.applied()):
        with blocks:

            def ten_layers(q: mx.array) -> mx.array:
                for _ in range(10):
                    q = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
                return q.sum()

            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(mx.compile(mx.grad(ten_layers))(q))
            peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < peaks[0] / 3


# --- The low-rank update ------------------------------------------------------------------------


def float_layer(d_out: int, dtype: mx.Dtype) -> nn.Module:
    layer = nn.Linear(64, d_out)
    layer.set_dtype(dtype)
    return layer


def quantized_layer(d_out: int, dtype: mx.Dtype) -> nn.Module:
    return float_layer(d_out, dtype).to_quantized(32, 8)


@pytest.mark.parametrize("make_layer", [float_layer, quantized_layer])
@pytest.mark.parametrize(("dtype", "most"), [(mx.float32, 1e-5), (mx.bfloat16, 1e-2)])
def test_an_adapted_layer_does_as_the_formula_and_has_its_gradients(
    make_layer: Callable, dtype: mx.Dtype, most: float
) -> None:
    mx.random.seed(0)
    linear, a, b = make_layer(96, dtype), mx.random.normal((64, 5)), mx.random.normal((5, 96))
    x, weight = (mx.random.normal((2, 5, d)).astype(dtype) for d in (64, 96))

    def formula(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return linear(x) + (20 * (x.astype(mx.float32) @ a @ b)).astype(dtype)

    def ours(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return models.add_update(linear(x), models.low_product(x, a), b)

    results = []
    for function in (formula, ours):

        def total(*arrays: mx.array, function: Callable = function) -> mx.array:
            return (function(*arrays) * weight).astype(mx.float32).sum()

        found = mx.compile(mx.value_and_grad(total, argnums=(0, 1, 2)))(x, a, b)
        results.append([array for _, array in tree_flatten(found)])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        expected, found = expected.astype(mx.float32), found.astype(mx.float32)
        assert mx.linalg.norm(found - expected) <= most * mx.linalg.norm(expected)


def test_layers_beside_each_other_share_a_product_as_long_as_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mx.random.seed(0)
    q, v = (
        models.LoRALinear.from_base(float_layer(d, mx.float32), r) for d, r in ((96, 5), (32, 3))
    )
    q.lora_b, v.lora_b = mx.random.normal((5, 96)), mx.random.normal((3, 32))
    beside, low_product, calls = models.Beside([q, v]), models.low_product, []
    monkeypatch.setattr(models, "low_product", lambda *args: calls.append(1) or low_product(*args))

    def check(layer: nn.Module, x: mx.array, number: int) -> None:
        expected = layer.frozen(x) + 20 * (x @ layer.lora_a @ layer.lora_b)
        assert mx.allclose(layer(x), expected, 1e-4, 1e-3).item()
        assert len(calls) == number

    x, other = mx.random.normal((2, 5, 64)), mx.random.normal((2, 5, 64))
    for layer, array, number in [(q, x, 1), (v, x, 1), (v, other, 2), (q, x, 3), (v, x, 3)]:
        check(layer, array, number)
    v.lora_a = -v.lora_a
    for layer in (q, v):
        check(layer, x, 4)
    assert len(beside.kept) == 2
    del array, x
    assert not beside.kept


# --- The loss by chunks -------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 16 tokens, blocks of 5, and no compiling, which would take most of the time."""
    for name in ("CHUNK_ROWS", "CHUNK_LOGITS", "CACHED_LOGITS"):
        monkeypatch.setattr(losses, name, 1)
    monkeypatch.setattr(attention, "BLOCK", 5)
    mx.disable_compile()
    yield
    mx.enable_compile()


def gradients(model: nn.Module, loss: Loss) -> tuple[float, int, dict[str, mx.array]]:
    """The loss, its tokens, and in training mode its gradients; nothing asks for others."""

    def of_batch(*batch: mx.array) -> tuple[mx.array, mx.array]:
        return loss(model, *batch)

    function = nn.value_and_grad(model, of_batch) if model.training else of_batch
    batch = [mx.concatenate([array] * 2, axis=1) for array in (TOKENS, IS_TARGET)]
    with nullcontext() if loss is losses.loss else patches.applied():
        found, of_parameters = function(*batch) if model.training else (function(*batch), {})
        mx.eval(found, of_parameters)
    return found[0].item(), found[1].item(), dict(tree_flatten(of_parameters))


@pytest.mark.parametrize("name", [name for name in ADAPTED if name != "deepseek_v41"])
def test_by_chunks_every_architecture_has_the_loss_and_gradients_of_the_whole(
    small_chunks: None, name: str
) -> None:
    model = build(name)
    loss = losses.make_loss(model)
    assert (loss is losses.loss) == (name == "talkie")  # whose head is no module
    adapt(model, "qv")
    for set_mode in (model.eval, model.train):
        set_mode()
        expected, found = gradients(model, losses.loss), gradients(model, loss)
        assert found[0] == pytest.approx(expected[0], 1e-5)
        assert found[1] == expected[1]
        for path, gradient in expected[2].items():
            error = mx.abs(found[2][path] - gradient).max().item()
            assert error <= 1e-4 * mx.abs(gradient).max().item() + 1e-9, path


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_next"]
)
def test_by_chunks_twenty_steps_end_where_the_plain_ones_do(small_chunks: None, name: str) -> None:
    ends = []
    for make_loss in (lambda model: losses.loss, losses.make_loss):
        model = build(name)
        loss = make_loss(model)
        adapt(model, "qv")
        model.train()
        batch = [(np.array(TOKENS), np.array(IS_TARGET))]
        with ExitStack() as stack:
            if loss is not losses.loss:
                stack.enter_context(patches.applied())
            ends.append(list(tiny.train_on(model, loss, [batch] * 20, 3e-4)))
    assert ends[1] == pytest.approx(ends[0], 1e-4)
    assert ends[0][-1] < 0.9 * ends[0][0]


@pytest.mark.skipif(
    mx.default_device() == mx.gpu, reason="a GPU is given all of so little at a time"
)
def test_no_array_of_all_tokens_and_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of memory says so: it is a fraction of what the logits of all tokens take."""
    monkeypatch.setattr(losses, "CHUNK_ROWS", 16)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 2**19)
    rows, width, num_logits = 2, 257, 40_000
    model = build("llama")
    model.lm_head = nn.Linear(model.lm_head.weight.shape[1], num_logits, bias=False)
    adapt(model)
    tokens = mx.broadcast_to(mx.arange(width)[None] % 100, (rows, width))
    batch, peaks = (tokens, mx.ones((rows, width), mx.bool_)), []
    for loss in (losses.loss, losses.make_loss(model)):
        model.train()
        function = nn.value_and_grad(model, lambda *batch, loss=loss: loss(model, *batch))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(function(*batch))
        peaks.append(mx.get_peak_memory() - before)
    all_logits = rows * (width - 1) * num_logits * 4
    assert peaks[1] < 0.7 * all_logits < 1.4 * all_logits < peaks[0]
