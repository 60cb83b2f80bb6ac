"""Loss, gradients and optimizer steps equal those of PyTorch + PEFT on the same weights and batch.

reference/make_reference.py says where the values come from; no PyTorch is needed here.
"""

from pathlib import Path

import models
import tiny
from lora_finetune.training import losses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(params=["tiny_llama", "tiny_qwen2_moe"])
def reference(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """A model adapted as the reference was, and the reference's arrays by name."""
    folder = REFERENCE / request.param
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    models.add_lora(model, dict.fromkeys(models.find_targets(model, 2), 8))
    with np.load(folder / "reference.npz") as file:
        arrays = dict(file)
    adapter = [(name, mx.array(arrays[name])) for name in arrays if name.startswith("model.")]
    model.load_weights(adapter, strict=False)
    return model, arrays


def batch(arrays: dict[str, np.ndarray]) -> tuple[mx.array, mx.array]:
    """The reference's batch as the loss takes it: tokens, and whether each is a target."""
    positions = np.arange(arrays["tokens"].shape[1])
    is_target = (positions > 0) & (positions < arrays["lengths"][:, None])
    return mx.array(arrays["tokens"]), mx.array(is_target)


def test_the_adapted_layers_are_those_of_the_reference(reference):
    model, arrays = reference
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trained == {name for name in arrays if name.startswith("model.")}


def test_the_loss_is_that_of_pytorch(reference):
    model, arrays = reference
    total, number = losses.loss(model, *batch(arrays))
    assert number.item() == arrays["num_tokens"]
    assert total.item() / number.item() == pytest.approx(arrays["loss"].item(), abs=1e-5)


def test_each_gradient_is_that_of_peft(reference):
    model, arrays = reference
    for name, gradient in mean_gradients(model, arrays).items():
        expected = arrays[f"grad/{name}"]
        error = np.abs(gradient - expected).max()
        assert error <= 1e-4 * np.abs(expected).max(), name


def mean_gradients(model: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradients of the mean loss over the reference's batch, float64."""
    (_, number), gradients = nn.value_and_grad(model, losses.loss)(model, *batch(arrays))
    return {
        name: np.array(gradient, np.float64) / number.item()
        for name, gradient in tree_flatten(gradients)
    }


def test_padding_to_the_right_changes_nothing(reference):
    model, arrays = reference
    tokens, is_target = batch(arrays)
    wider = mx.pad(tokens, [(0, 0), (0, 15)], constant_values=7)
    total, number = losses.loss(model, wider, mx.pad(is_target, [(0, 0), (0, 15)]))
    assert number.item() == arrays["num_tokens"]
    assert total.item() / number.item() == pytest.approx(arrays["loss"].item(), abs=1e-5)


def test_the_masked_loss_is_the_mean_over_the_answers_by_hand(reference):
    """Also where a row has no answer, all of one, or two."""
    model, arrays = reference
    tokens, is_target = map(np.array, batch(arrays))
    is_target[0, :3] = is_target[0, 5:7] = is_target[2] = False
    logits = np.array(model(mx.array(tokens[:, :-1])), np.float64)
    expected = [
        np.log(np.exp(logits[row, t - 1]).sum()) - logits[row, t - 1, tokens[row, t]]
        for row, t in zip(*np.nonzero(is_target), strict=True)
    ]
    total, number = losses.loss(model, mx.array(tokens), mx.array(is_target))
    assert number.item() == len(expected)
    assert total.item() / number.item() == pytest.approx(np.mean(expected), abs=1e-5)


def test_three_steps_of_training_are_adam_without_bias_correction(reference):
    """m and v are the moving averages of g and g²; a step is rate · m / (√v + ε)."""
    model, arrays = reference
    steps = tiny.train_on(model, losses.loss, [[batch(arrays)]] * 3)
    expected = parameters(model)
    m, v = ({name: np.zeros_like(array) for name, array in expected.items()} for _ in "mv")
    for _ in range(3):
        for name, g in mean_gradients(model, arrays).items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            expected[name] -= 1e-3 * m[name] / (np.sqrt(v[name]) + 1e-8)
        next(steps)
        for name, array in parameters(model).items():
            np.testing.assert_allclose(array, expected[name], atol=1e-5, rtol=0)


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    """The trainable parameters, float64."""
    flat = tree_flatten(model.trainable_parameters())
    return {name: np.array(array, np.float64) for name, array in flat}


@pytest.mark.parametrize("reference", ["tiny_llama"], indirect=True)  # a CPU's experts are float32
def test_a_float16_model_has_the_gradients_of_the_same_in_float32(reference):
    """Of many targets too, of whose mean the gradients would be too small for float16."""
    model, arrays = reference
    arrays = {name: np.tile(arrays[name], [500] + [1] * (arrays[name].ndim - 1))
              for name in ("tokens", "lengths")}  # fmt: skip
    exact = mean_gradients(model, arrays)
    adapter = model.trainable_parameters()
    model.set_dtype(mx.float16)
    model.update(adapter)  # which stays float32
    for name, gradient in mean_gradients(model, arrays).items():
        assert np.linalg.norm(gradient - exact[name]) <= 0.02 * np.linalg.norm(exact[name]), name
