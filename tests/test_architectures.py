"""LoRA is in the right place in every architecture that mlx-lm ships, and trains there.

architectures.json has a tiny configuration of each module of mlx_lm.models, with the paths that are
adapted in its last three layers, or the reason why it cannot be built on a CPU.
"""

import copy
import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import models  # before mlx, since it puts a fast BLAS in place

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten, tree_map

import train_lora

ARCHITECTURES = json.loads((Path(__file__).parent / "architectures.json").read_text("utf-8"))
BUILT = {name: entry for name, entry in ARCHITECTURES.items() if "config" in entry}
ADAPTED = {name: entry for name, entry in BUILT.items() if entry["adapted"]}

LAYERS = 3
TOKENS = mx.array([[1, 17, 33, 49, 65, 81, 97, 113, 2], [5, 3, 8, 13, 21, 34, 55, 0, 0]])
LENGTHS = mx.array([9, 7])

# Parts that other modules are made of; they are no architectures.
PARTS = {
    *("activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline"),
    *("rope_utils", "ssm", "switch_layers"),
}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Compiling a hundred models for five steps each would take most of the time."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def build(name: str) -> nn.Module:
    """The model of an architecture, float32, the same random weights each time."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    config = copy.deepcopy(ARCHITECTURES[name]["config"])  # which some architectures change
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)
    model.update(tree_map(lambda x: noise(x) if is_zero(x) else x, model.parameters()))
    mx.eval(model.parameters())
    return model


def is_zero(array: mx.array) -> bool:
    """Whether an array holds zeros alone; some start so, and would keep gradients from passing."""
    return isinstance(array, mx.array) and array.size > 1 and not array.any().item()


def noise(array: mx.array) -> mx.array:
    if mx.issubdtype(array.dtype, mx.integer):
        return mx.random.randint(0, 2**31 - 1, array.shape).astype(array.dtype)
    return mx.random.normal(array.shape, scale=0.1).astype(array.dtype)


def adapt(model: nn.Module) -> None:
    mx.random.seed(1)
    models.add_lora(model, dict.fromkeys(models.find_targets(model, LAYERS), models.RANK))


def trainable(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def train(model: nn.Module, steps: int) -> list[float]:
    """Train on one batch; the loss before each step, and after the last."""
    model.train()
    optimizer = optim.Adam(5e-3, bias_correction=True)
    loss_and_gradients = nn.value_and_grad(model, train_lora.loss)
    losses = []
    for _ in range(steps):
        (mean, _), gradients = loss_and_gradients(model, TOKENS, LENGTHS)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
        losses.append(mean.item())
    return [*losses, train_lora.loss(model, TOKENS, LENGTHS)[0].item()]


def logits(model: nn.Module) -> np.ndarray:
    model.eval()
    return np.array(model(TOKENS))


def test_every_architecture_of_mlx_lm_is_looked_at():
    shipped = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    assert set(ARCHITECTURES) == shipped - PARTS
    assert len(ADAPTED) >= 85


def test_those_that_cannot_be_built_on_a_cpu_are_these():
    assert set(ARCHITECTURES) - set(BUILT) == {"bitnet", "muse_spark", "olmo"}


@pytest.mark.parametrize("name", sorted(set(BUILT) - set(ADAPTED)))
def test_a_model_without_attention_is_told(name: str):
    with pytest.raises(models.UserError, match=rf"\({name}\) have no attention"):
        models.find_targets(build(name), LAYERS)


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_is_in_its_place_and_trains(name: str, tmp_path: Path):
    model = build(name)
    before = logits(model)
    adapt(model)

    expected = {f"{path}.lora_{x}" for path in ADAPTED[name]["adapted"] for x in "ab"}
    fresh = trainable(model)
    assert set(fresh) == expected
    np.testing.assert_array_equal(logits(model), before)

    losses = train(model, 5)
    assert losses[-1] < losses[0]
    unmoved = [n for n, array in trainable(model).items() if np.array_equal(array, fresh[n])]
    assert not unmoved

    models.write_adapter(tmp_path / "a.npz", model)
    adapter = models.read_adapter(tmp_path / "a.npz")
    again = build(name)
    models.check_adapter(tmp_path / "a.npz", adapter, again)
    models.add_lora(again, {path: a.shape[1] for path, (a, _) in adapter.items()})
    models.load_adapter(again, adapter)
    np.testing.assert_array_equal(logits(again), logits(model))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ADAPTED)
def test_lora_trains_on_a_quantized_base(name: str, bits: int):
    model = build(name)
    quantize(model, bits)
    before = logits(model)
    adapt(model)
    assert {array.dtype for array in trainable(model).values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(logits(model), before)
    losses = train(model, 5)
    assert losses[-1] < losses[0]


def quantize(model: nn.Module, bits: int) -> None:
    """Quantize what mlx-lm would, as far as the widths allow."""
    wanted = getattr(model, "quant_predicate", None) or (lambda *_: True)

    def predicate(path: str, module: nn.Module) -> bool | dict:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return fits and wanted(path, module)

    nn.quantize(model, group_size=32, bits=bits, class_predicate=predicate)
