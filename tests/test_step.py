"""A step is a function; what it gives is taken over when it is whole, and nothing else ever is."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import models
import tiny
from conftest import Run as CommandLine
from lora_finetune.training import losses
from lora_finetune.training import step as training_step
from lora_finetune.training.optimizer import Optimizer
from lora_finetune.training.step import Trainer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

Arrays = dict[str, np.ndarray]


def make_trainer(loss: losses.Loss = losses.loss) -> Trainer:
    """Of a fresh tiny model."""
    mx.random.seed(0)
    model = tiny.build_model(tiny.LLAMA)
    models.add_lora(model, dict.fromkeys(models.find_targets(model, 2), 8))
    model.train()
    return Trainer(model, loss, Optimizer(1e-2), {})


def saved(trainer: Trainer) -> Arrays:
    """The arrays of a save: the parameters and the moments."""
    arrays = dict(tree_flatten(trainer.model.trainable_parameters())) | trainer.named_moments()
    return {name: np.array(array) for name, array in arrays.items()}


def batches(number: int) -> Iterator[list]:
    rng = np.random.default_rng(0)
    for _ in range(number):
        tokens = rng.integers(0, 50, (2, 9)).astype(np.int32)
        yield [(tokens, np.ones((2, 9), bool))]


def take(trainer: Trainer, given: Iterator[list], ahead: bool) -> Iterator[tuple[float, int]]:
    """The loss and the targets of each step."""
    for total, tokens, *_ in trainer.steps(given, ahead=lambda: ahead):
        yield total, tokens


@pytest.fixture(scope="module")
def one_by_one() -> tuple[list[tuple[float, int]], list[Arrays]]:
    """The numbers of five steps, each computed before the next is begun, and what each leaves."""
    trainer = make_trainer()
    numbers, states = [], [saved(trainer)]
    for found in take(trainer, batches(5), False):
        numbers.append(found)
        states.append(saved(trainer))
    return numbers, states


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


def test_a_step_changes_nothing_by_itself(one_by_one):
    trainer, (numbers, states) = make_trainer(), one_by_one
    for batch in batches(2):
        mx.eval(trainer.step(trainer.parameters, trainer.moments, batch))
    trainer.update_model()
    assert_equal(saved(trainer), states[0])
    assert list(take(trainer, batches(5), False)) == numbers


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("taken", [1, 3, 5])
def test_a_run_that_stops_keeps_the_steps_whose_numbers_it_has_and_no_other(
    one_by_one, taken: int, ahead: bool
):
    trainer, (numbers, states) = make_trainer(), one_by_one
    steps = take(trainer, batches(5), ahead)
    assert [next(steps) for _ in range(taken)] == numbers[:taken]
    assert_equal(saved(trainer), states[taken])


@pytest.mark.parametrize("ahead", [True, False])
def test_of_a_step_in_which_the_device_fails_nothing_is_left(one_by_one, ahead: bool):
    trainer, (numbers, states), found = make_trainer(), one_by_one, []
    of_none = mx.linalg.inv(mx.zeros((1, 1)), stream=mx.cpu)  # which shows when it is computed
    step, number = trainer.step, iter(range(5))

    def failing(*given: object) -> training_step.Result:
        result = step(*given)
        fails = next(number) == 2
        return result._replace(moments=result.moments | {"x": of_none}) if fails else result

    trainer.step = failing
    with pytest.raises(RuntimeError):
        found.extend(take(trainer, batches(5), ahead))
    assert found == numbers[:2]
    assert_equal(saved(trainer), states[2])


@pytest.mark.parametrize("ahead", [True, False])
def test_where_a_step_cannot_even_be_begun_whole_steps_are_left(one_by_one, ahead: bool):
    """Of the one begun before, whose numbers nobody has yet, nothing is left either."""

    def loss(model: nn.Module, tokens: mx.array, is_target: mx.array) -> tuple[mx.array, mx.array]:
        if tokens.shape[1] > 9:
            raise RuntimeError("the device failed")
        return losses.loss(model, tokens, is_target)

    trainer, (numbers, states), found = make_trainer(loss), one_by_one, []
    longer = [(np.ones((2, 12), np.int32), np.ones((2, 12), bool))]
    with pytest.raises(RuntimeError, match="the device failed"):
        found.extend(take(trainer, iter([*batches(3), longer]), ahead))
    assert found == numbers[: 2 if ahead else 3]
    assert_equal(saved(trainer), states[len(found)])


def test_a_step_that_is_not_finite_is_an_error_and_not_taken_over(one_by_one):

    def loss(model: nn.Module, tokens: mx.array, is_target: mx.array) -> tuple[mx.array, mx.array]:
        total, number = losses.loss(model, tokens, is_target)
        return total * (math.inf if len(tokens) > 2 else 1), number

    trainer, (_, states) = make_trainer(loss), one_by_one
    more = (np.ones((3, 9), np.int32), np.ones((3, 9), bool))
    steps = take(trainer, iter([*batches(1), [more]]), False)
    next(steps)
    with pytest.raises(training_step.NotFiniteError):
        next(steps)
    assert_equal(saved(trainer), states[1])


@pytest.mark.parametrize("layers", [1, 4])
def test_a_whole_run_ends_in_the_same_files_with_steps_begun_ahead(
    call: CommandLine, model: Path, data: Path, tmp_path: Path, layers: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """With hidden states that are kept, and without."""
    settings = ["--model", model, "--data", data, "--lora-layers", layers, "--epochs", 3]
    settings += ["--learning-rate", "1e-2", "--steps-per-report", 5, "--steps-per-eval", 7]
    for ahead in (True, False):
        monkeypatch.setattr(training_step, "AHEAD", ahead)
        file = tmp_path / str(ahead) / "a.npz"
        file.parent.mkdir()
        ended = call("--train", *settings, "--save-every", 3, "--adapter-file", file)
        assert ended.returncode == 0
    for name in ("a.npz", "a.run/best.npz"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()
    log, expected = (
        losses_in(tmp_path / str(ahead) / "a.run/log.jsonl") for ahead in (True, False)
    )
    assert log == expected


def losses_in(log: Path) -> list[tuple]:
    """Of each report the iteration and the losses, without the times."""
    entries = map(json.loads, log.read_text().splitlines())
    return [tuple(map(entry.get, ("iter", "train_loss", "val_loss"))) for entry in entries]
