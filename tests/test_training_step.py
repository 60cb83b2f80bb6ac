"""Steps that are begun ahead are the same steps; one that fails, or nobody asks for, is undone."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import models
import tiny
from conftest import Run as CommandLine
from lora_finetune.training import losses, training_step

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

Arrays = dict[str, np.ndarray]


class Run:
    """A fresh tiny model with its optimizer and its step."""

    def __init__(self, loss: losses.Loss = losses.loss):
        mx.random.seed(0)
        self.model = tiny.build_model(tiny.LLAMA)
        models.add_lora(self.model, dict.fromkeys(models.find_targets(self.model, 2), 8))
        self.model.train()
        self.optimizer: optim.Adam = training_step.make_optimizer(self.model, 1e-2, {})
        self.step = training_step.make_step(self.model, loss, self.optimizer)

    def state(self) -> Arrays:
        """What a save would take: the parameters and the moments."""
        arrays = dict(tree_flatten(self.model.trainable_parameters()))
        arrays |= training_step.named_state(self.model, self.optimizer)
        return {name: np.array(array) for name, array in arrays.items()}


def batches(number: int) -> Iterator[list]:
    rng = np.random.default_rng(0)
    for _ in range(number):
        tokens = rng.integers(0, 50, (2, 9)).astype(np.int32)
        yield [(tokens, np.ones((2, 9), bool))]


@pytest.fixture(scope="module")
def one_by_one() -> tuple[list[tuple[float, int, float]], list[Arrays]]:
    """The numbers of five steps, each computed before the next is begun, and what each leaves."""
    run = Run()
    numbers, states = [], [run.state()]
    for batch in batches(5):
        numbers.append(run.step(batch).compute())
        states.append(run.state())
    return numbers, states


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.parametrize("ahead", [True, False])
def test_steps_begun_ahead_are_the_same_to_the_last_bit(one_by_one, ahead: bool):
    run, (numbers, states) = Run(), one_by_one
    assert list(training_step.run_steps(run.step, batches(5), ahead)) == numbers
    assert_equal(run.state(), states[5])


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("taken", [1, 3, 5])
def test_a_run_that_stops_keeps_the_steps_whose_numbers_it_has_and_no_other(
    one_by_one, taken: int, ahead: bool
):
    run, (numbers, states) = Run(), one_by_one
    with closing(training_step.run_steps(run.step, batches(5), ahead)) as results:
        assert [next(results) for _ in range(taken)] == numbers[:taken]
    assert_equal(run.state(), states[taken])


@pytest.mark.parametrize("ahead", [True, False])
def test_a_step_in_which_the_device_fails_is_undone(one_by_one, ahead: bool):
    run, (numbers, states), given = Run(), one_by_one, []
    of_none = mx.linalg.inv(mx.zeros((1, 1)), stream=mx.cpu)  # which shows when it is computed

    def failing(batch: list) -> training_step.LazyStep:
        lazy = run.step(batch)
        return lazy._replace(changed=[*lazy.changed, of_none])

    steps = iter([run.step, run.step, failing, run.step, run.step])
    with pytest.raises(RuntimeError):
        given.extend(training_step.run_steps(lambda batch: next(steps)(batch), batches(5), ahead))
    assert given == numbers[:2]
    assert_equal(run.state(), states[2])


@pytest.mark.parametrize("ahead", [True, False])
def test_where_a_step_cannot_even_be_begun_whole_steps_are_left(one_by_one, ahead: bool):
    """Of the one begun before, whose numbers nobody has yet, nothing is left either."""

    def loss(model: nn.Module, tokens: mx.array, is_target: mx.array) -> tuple[mx.array, mx.array]:
        if tokens.shape[1] > 9:
            raise RuntimeError("the device failed")
        return losses.loss(model, tokens, is_target)

    run, (numbers, states), given = Run(loss), one_by_one, []
    longer = [(np.ones((2, 12), np.int32), np.ones((2, 12), bool))]
    with pytest.raises(RuntimeError, match="the device failed"):
        given.extend(training_step.run_steps(run.step, iter([*batches(3), longer]), ahead))
    assert given == numbers[: 2 if ahead else 3]
    assert_equal(run.state(), states[len(given)])


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
    for name in ("a.npz", "a.best.npz"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()
    log, expected = (losses_in(tmp_path / str(ahead) / "a.log.jsonl") for ahead in (True, False))
    assert log == expected


def losses_in(log: Path) -> list[tuple]:
    """Of each report the iteration and the losses, without the times."""
    entries = map(json.loads, log.read_text().splitlines())
    return [
        tuple(map(entry.get, ("iter", "train_loss", "val_loss", "tokens"))) for entry in entries
    ]


def test_undone_steps_can_be_done_again(one_by_one):
    run, (numbers, states) = Run(), one_by_one
    for batch in batches(2):
        run.step(batch).undo()
    assert_equal(run.state(), states[0])
    assert [run.step(batch).compute() for batch in batches(5)] == numbers


def test_after_gradients_are_taken_the_model_has_its_parameters_again() -> None:
    """And none of what stands for them while MLX traces the step, which could not be computed."""
    run = Run()
    parameters = run.model.trainable_parameters()
    ((tokens, is_target),) = next(batches(1))
    training_step.make_gradients(run.model, losses.loss)(parameters, tokens, is_target)
    for (name, found), (_, array) in zip(
        tree_flatten(run.model.trainable_parameters()), tree_flatten(parameters), strict=True
    ):
        assert found is array, name
