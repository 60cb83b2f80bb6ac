"""What lies below the first adapted layer is computed once for each text, with the same result."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import background
import models
import tiny
from conftest import Run
from lora_finetune.adapters import loading
from lora_finetune.base import memory
from lora_finetune.mlx_patches.modules import intercepted
from lora_finetune.run import checkpoint
from lora_finetune.texts import batching
from lora_finetune.training import frozen_prefix, losses
from test_checkpoint import wait_for

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

ARCHITECTURES = json.loads((Path(__file__).parent / "architectures.json").read_text("utf-8"))
BATCH_SIZE, EPOCHS = 3, 3


def build(name: str, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """A tiny model with its last two layers adapted, the same random weights each time."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    config = copy.deepcopy(ARCHITECTURES[name]["config"])
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    loading.adapt(model, {}, None, 2)
    return model


def make_examples(number: int, seed: int) -> batching.Examples:
    """Random texts of 1 to 45 tokens."""
    rng = np.random.default_rng(seed)
    starts = np.append(0, np.cumsum([1, *rng.integers(2, 46, number - 1)]))
    is_target = np.ones(starts[-1], bool)
    is_target[starts[:-1]] = False
    return batching.Examples(rng.integers(1, 128, starts[-1], np.int32), starts, is_target)


@pytest.fixture
def examples() -> dict[str, batching.Examples]:
    return {"train": make_examples(8, 0), "valid": make_examples(7, 1)}


def with_kept_states(
    prefix: frozen_prefix.Prefix,
    examples: dict[str, batching.Examples],
    folder: Path,
    parts: int = 1,
) -> dict[str, frozen_prefix.WithStates]:
    groups = {
        "train": batching.epoch_batches(examples["train"].lengths, BATCH_SIZE, 0, 0),
        "valid": batching.evaluation_batches(examples["valid"], BATCH_SIZE, -1),
    }
    kept = {split: frozen_prefix.WithStates(prefix, examples[split]) for split in groups}
    for split, batches in groups.items():
        micro_batches = [part for rows in batches for part in batching.split_batch(rows, parts)]
        assert kept[split].keep(micro_batches, folder)
    return kept


def train(
    model: nn.Module, loss: losses.Loss, examples: dict[str, batching.Examples], parts: int = 1
) -> Iterator[float]:
    """The loss of each step of a few epochs, and of a validation after each epoch."""
    model.train()
    steps = tiny.train_on(
        model, loss, batching.training_batches(examples["train"], BATCH_SIZE, 0, 0, parts)
    )
    for _ in range(EPOCHS):
        yield from itertools.islice(steps, math.ceil(len(examples["train"]) / BATCH_SIZE))
        yield losses.evaluate(model, loss, examples["valid"], BATCH_SIZE, -1, micro_batches=parts)
        model.train()


def assert_trains_the_same(
    name: str, examples: dict[str, batching.Examples], folder: Path, parts: int = 1
) -> None:
    plain, model = build(name), build(name)
    expected = list(train(plain, losses.make_loss(plain), examples, parts))
    prefix = frozen_prefix.find(model)
    assert prefix.num_layers == len(model.layers) - 2
    loss = prefix.loss(losses.make_loss(model))
    found = list(train(model, loss, with_kept_states(prefix, examples, folder, parts), parts))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    arrays = dict(tree_flatten(model.trainable_parameters()))
    for path, array in tree_flatten(plain.trainable_parameters()):
        # Adam divides by gradients, so that a few of the smallest may turn.
        assert np.abs(np.array(arrays[path] - array)).mean() < 1e-2 * 1e-3, path
    batch = list(map(mx.array, examples["valid"].batch(np.arange(7))))
    test_losses = [losses.loss(each, *batch)[0].item() for each in (model, plain)]
    assert test_losses[0] == pytest.approx(test_losses[1], 1e-4)


NAMES = ("llama", "qwen2", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_next")


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_adapter_are_those_of_the_whole_model(
    name: str, examples: dict[str, batching.Examples], tmp_path: Path
) -> None:
    mx.disable_compile()  # which takes most of the time
    try:
        assert_trains_the_same(name, examples, tmp_path)
    finally:
        mx.enable_compile()


def test_the_same_compiled_and_in_parts(
    examples: dict[str, batching.Examples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_prefix, "COMPILED", True)  # as on a GPU
    assert_trains_the_same("gemma2", examples, tmp_path, parts=2)


def test_each_text_is_computed_once_for_all_epochs_and_validations(
    examples: dict[str, batching.Examples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_prefix, "COMPILED", False)  # so that each call can be counted
    model = build("llama")
    prefix = frozen_prefix.find(model)
    loss, kept = prefix.loss(losses.make_loss(model)), with_kept_states(prefix, examples, tmp_path)
    layer, rows = model.layers[0], []
    kind = type(layer)

    def count(hidden: mx.array, *args: object, **options: object) -> mx.array:
        rows.append(len(hidden))
        return kind.__call__(layer, hidden, *args, **options)

    with intercepted(layer, count):
        list(train(model, loss, kept))
    assert sum(rows) == len(examples["train"]) + len(examples["valid"])


def test_compiled_the_layers_are_called_once_for_each_shape(
    examples: dict[str, batching.Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_prefix, "COMPILED", True)  # as on a GPU
    model = build("llama")
    prefix = frozen_prefix.find(model)
    layer, shapes = model.layers[0], []
    kind = type(layer)

    def note_shape(hidden: mx.array, *args: object, **options: object) -> mx.array:
        shapes.append(hidden.shape)
        return kind.__call__(layer, hidden, *args, **options)

    with intercepted(layer, note_shape):
        for rows in np.array([[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]):
            frozen_prefix.WithStates(prefix, examples["train"]).batch(rows)
    assert len(shapes) == len(set(shapes)) > 0


def test_what_is_kept_takes_the_memory_that_was_reckoned_with_and_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Just enough of it is memory, and a little less is the file."""
    examples, rows = make_examples(300, 0), np.arange(300)
    prefix = frozen_prefix.find(build("llama"))
    groups = [rows[start : start + 3] for start in range(0, 300, 3)]
    widths = [batching.padded_width(examples.lengths[group]) - 1 for group in groups]
    size = sum(3 * width * prefix.model.args.hidden_size * 4 for width in widths)
    monkeypatch.setattr(memory, "available", lambda: size * 16 + mx.get_active_memory())
    for factor, in_memory in ((1 + 1e-6, True), (1 - 1e-6, False)):
        monkeypatch.setattr(frozen_prefix, "MEMORY_SHARE", factor / 16)
        kept = frozen_prefix.WithStates(prefix, examples)
        kept.keep(groups, tmp_path)
        gc.collect()
        gc.disable()  # what waits for it is not free
        before = mx.get_active_memory()
        for group in groups:
            *_, states = kept.batch(group)
            mx.eval(states)
            del states
        taken = mx.get_active_memory() - before
        gc.enable()
        assert abs(taken - size * in_memory) < 0.2 * size  # each text's array is rounded up


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_what_is_kept_has_the_type_of_the_model_and_every_bit_whoever_asks_first(
    dtype: mx.Dtype, examples: dict[str, batching.Examples], tmp_path: Path
) -> None:
    prefix = frozen_prefix.find(build("llama", dtype))
    kept = with_kept_states(prefix, examples, tmp_path)["train"]
    other = with_kept_states(prefix, examples, tmp_path)["train"]
    for row in range(len(kept))[::-1]:
        *_, states = other.batch(np.array([row]))
        assert states.dtype == dtype
    for rows in batching.epoch_batches(kept.lengths, BATCH_SIZE, 0, 0):
        *_, expected = frozen_prefix.WithStates(prefix, examples["train"]).batch(rows)
        for each in (kept, other):
            assert mx.array_equal(each.batch(rows)[-1], expected).item()


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_text", "hunyuan", "kimi_k3"])
def test_layers_that_hand_on_more_than_states_are_left_to_the_model_and_a_line_says_so(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frozen_prefix.find(build(name)) is None
    line = capsys.readouterr().err
    assert line.startswith(f"warning: in models of this kind ({name}) the layers below the first ")
    assert line.count("\n") == 1


def test_nothing_is_looked_for_where_all_layers_are_adapted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = build("llama")
    models.add_lora(model, dict.fromkeys(models.find_targets(build("llama"), 4), 8))
    assert frozen_prefix.find(model) is None
    assert capsys.readouterr().err == ""


# --- Runs ---------------------------------------------------------------------------------------

SETTINGS = ["--train", "--lora-layers", 2, "--batch-size", 4, "--learning-rate", "1e-2"]
SETTINGS += ["--steps-per-eval", 7, "--save-every", 3, "--adapter-file", "a.npz"]


@pytest.fixture
def args(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.chdir(tmp_path)
    return ["--model", model, "--data", data, *SETTINGS]


@pytest.mark.parametrize("first", [1, 2])
def test_a_run_of_some_epochs_resumed_for_more_ends_in_the_adapter_of_a_run_at_once(
    call: Run, args: list[object], first: int
) -> None:
    """Also where the first part was a single epoch, of which nothing is kept."""
    for more in ([first], [3, "--resume-adapter-file", "a.npz"], [3, "--adapter-file", "b.npz"]):
        ended = call(*args, "--epochs", *more)
        assert (ended.returncode, ended.stderr) == (0, "")
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()


def test_a_model_of_such_layers_is_trained_the_plain_way(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    config = {"vocab_size": 300, "max_position_embeddings": 512}
    model = tiny.make_model(tmp_path / "model", **ARCHITECTURES["hunyuan"]["config"] | config)
    ended = call(*args, "--model", model, "--epochs", 2)
    assert ended.returncode == 0
    assert ended.stderr.startswith("warning: in models of this kind (hunyuan)")


def run_without_memory(folder: Path, args: list[str]) -> None:
    frozen_prefix.MEMORY_SHARE = 0
    background.run(folder, args)


def test_beyond_the_memory_a_file_serves_which_nobody_sees_and_a_kill_takes_along(
    call: Run, args: list[object], tmp_path: Path
) -> None:
    assert call(*args, "--epochs", 3).returncode == 0
    expected = Path("a.npz").read_bytes()
    folder = tmp_path / "folder"
    folder.mkdir()
    more = map(str, [*args, "--epochs", 1000])
    process = background.CONTEXT.Process(target=run_without_memory, args=(folder, [*more]))
    process.start()
    wait_for(folder / "out", "Iter 30: Saved", process)
    held = Path(f"/proc/{process.pid}/map_files")
    mapped = [str(file.readlink()) for file in held.iterdir()]
    assert sum(str(folder) in file and file.endswith(" (deleted)") for file in mapped) == 2
    process.kill()
    process.join()
    names = {file.name for file in folder.iterdir()}
    whole = {"a.npz", "a.run", "out", "err"}
    assert {name for name in names if not name.endswith(".part")} == whole  # of a save that it hit
    lines = (folder / "err").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("warning: the hidden states of layers that do not change take 0.0")
        assert "are kept in a temporary file in" in line
    again = map(str, [*args, "--epochs", 3])
    process = background.CONTEXT.Process(target=run_without_memory, args=(folder, [*again]))
    process.start()
    process.join()
    assert (folder / "a.npz").read_bytes() == expected


def test_without_room_on_the_disk_either_each_epoch_computes_them_and_so_it_goes_on(
    call: Run, args: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run has room, and ends in the same adapter all the same.

    At a rate at which differences of rounding do not grow.
    """
    args = [*args, "--learning-rate", "1e-3"]
    assert call(*args, "--epochs", 3, "--adapter-file", "kept.npz").returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(frozen_prefix, "MEMORY_SHARE", 0)
        patch.setattr(frozen_prefix, "FREE_SHARE", 1)
        for name, epochs in [("a.npz", 2), ("b.npz", 3)]:
            ended = call(*args, "--epochs", epochs, "--adapter-file", name)
            assert ended.returncode == 0
            assert ended.stderr.count("has no room, so each epoch computes them again") == 2
    ended = call(*args, "--epochs", 3, "--resume-adapter-file", "a.npz")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not checkpoint.read_state(Path("a.npz")).progress.has_room
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()
    with np.load("a.npz") as found, np.load("kept.npz") as expected:
        for path in expected:
            assert np.abs(found[path] - expected[path]).mean() < 1e-3 * 1e-2
