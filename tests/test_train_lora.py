"""Training, testing and generating from the command line: what comes out, and what is in it."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import zipfile
from pathlib import Path

import models
import tiny
import train_lora
from conftest import ROOT, TEXTS, Ended, Run, one_error
from lora_finetune.base import errors
from lora_finetune.run.config import read_config
from lora_finetune.texts import dataset, tokenizing

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

# A run of some seconds in which all that a run does happens.
LEARN = ["--learning-rate", "1e-2", "--val-batches", "-1", "--test-batches", "-1"]
SHORT = ["--lora-layers", "2", "--batch-size", "4", "--iters", "25", "--steps-per-eval", "10"]
WHOLE_RUN = ["--train", *SHORT, "--save-every", "10", *LEARN, "--adapter-file", "adapter.npz"]
PROMPT = "### 질문:\n한글이 무엇입니까? 🤔\n"


def numbers(pattern: str, text: str) -> list[str]:
    """What the one group of a pattern holds, for each line that the pattern matches whole."""
    return re.findall(f"(?m)^{pattern}$", text)


def shapes(text: str) -> list[str]:
    """The lines of a text, with # for each answer and each number that has three decimals."""
    text = re.sub(r"(?m)^(Iter \d+: Answer:).*$", r"\1 #", text)
    return re.sub(r"\d+\.\d{3}(?!\d)", "#", text).removesuffix("\n").split("\n")


def read_log(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return dict(archive)


def load_adapted(folder: Path, adapter_file: Path) -> nn.Module:
    """A model with an adapter, through the functions of models.py."""
    model, _ = models.load(str(folder))
    tiny.put_adapter(adapter_file, model)
    return model


def last_layers(number: int, *targets: str, layers: int = tiny.LAYERS) -> set[str]:
    """The names that an adapter of the last layers of a model has."""
    return {
        f"model.layers.{layer}.{target}.{which}"
        for layer in range(layers - number, layers)
        for target in targets
        for which in ("lora_a", "lora_b")
    }


# --- Whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(
    run: Run, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ended]:
    """A run that trains, tests and generates, in a folder of its own; not to be changed."""
    folder = tmp_path_factory.mktemp("whole_run")
    args = ["--model", model, "--data", data, "--test", "--prompt", PROMPT, "--max-tokens", 12]
    return folder, run(*args, *WHOLE_RUN, "--seed", 7, cwd=folder)


@pytest.mark.parametrize("recipe", sorted((ROOT / "data/recipes").iterdir()), ids=lambda f: f.stem)
def test_each_recipe_is_flags_of_the_program_and_what_follows_wins(recipe: Path) -> None:
    parser = train_lora.build_parser()
    config = read_config(parser, ["--train", f"@{recipe}", "--learning-rate", "0.5"])
    assert (config.targets, config.lr_schedule) == ("all", "cosine")
    assert config.learning_rate == 0.5


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="such lines are left out there")
def test_what_a_slow_start_is_waiting_for_is_said(
    call: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here from the first moment, and not after ten seconds."""
    monkeypatch.setattr(errors, "SLOW", 0.0)
    args = ["--train", "--model", model, "--data", data, "--lora-layers", 2, "--iters", 1]
    ended = call(*args, "--adapter-file", tmp_path / "a.npz")
    assert ended.stderr.count("hint: trying out the model") == 2  # its layers, and a step


def test_a_run_trains_then_tests_then_generates_and_says_so_in_these_lines(
    whole_run: tuple[Path, Ended],
) -> None:
    _, ended = whole_run
    assert ended.returncode == 0
    report, _, generated = ended.stdout.partition(f"Generating\n{PROMPT}")
    assert shapes(report) == [
        "Loading pretrained model",
        "Total parameters #M",
        "Trainable parameters #M",
        "Training: 37 examples, 2169 tokens, longest 81, 0 cut",
        "Iter 1: Val loss #, Val took #s",
        "Iter 1: Answer: #",
        "Iter 10: Train loss #, It/sec #, Tokens/sec #, Peak mem # GB",
        "Iter 10: Val loss #, Val took #s",
        "Iter 10: Answer: #",
        "Iter 10: Saved adapter weights to adapter.npz.",
        "Iter 20: Train loss #, It/sec #, Tokens/sec #, Peak mem # GB",
        "Iter 20: Val loss #, Val took #s",
        "Iter 20: Answer: #",
        "Iter 20: Saved adapter weights to adapter.npz.",
        "Iter 25: Train loss #, It/sec #, Tokens/sec #, Peak mem # GB",
        "Iter 25: Val loss #, Val took #s",
        "Iter 25: Answer: #",
        "Iter 25: Saved adapter weights to adapter.npz. "
        "The best is of iteration 25 (validation #), in adapter.run/best.npz.",
        "Testing",
        "Test loss #, Test ppl #.",
    ]
    assert re.search(
        r"\n={10} \d+ tokens, \d+\.\d{3} tokens/sec(, cut at --max-tokens)?\n\Z", generated
    )


def test_a_run_with_nothing_to_warn_of_is_silent_on_standard_error(
    whole_run: tuple[Path, Ended],
) -> None:
    assert whole_run[1].stderr == ""


def test_the_log_has_the_printed_numbers_in_full(whole_run: tuple[Path, Ended]) -> None:
    folder, ended = whole_run
    lines = []
    for entry in read_log(folder / "adapter.run/log.jsonl"):
        if entry.keys() == {"iter", "val_loss", "answers"}:
            lines.append("Iter {iter}: Val loss {val_loss:.3f}".format(**entry))
        elif entry.keys() == {"test_loss", "test_ppl"}:
            lines.append("Test loss {test_loss:.3f}, Test ppl {test_ppl:.3f}.".format(**entry))
            assert math.isclose(entry["test_ppl"], math.exp(entry["test_loss"]))
        else:
            lines.append(
                "Iter {iter}: Train loss {train_loss:.3f}, It/sec {it_per_sec:.3f}, "
                "Tokens/sec {tokens_per_sec:.3f}, Peak mem {peak_mem_gb:.3f} GB".format(**entry)
            )
    report = ended.stdout.partition("Generating")[0].splitlines()
    assert lines == [line.partition(", Val took")[0] for line in report if " loss " in line]


def test_each_validation_shows_the_beginnings_of_the_answers_to_prompts(
    call: Run, data: Path, tmp_path: Path
) -> None:
    """The likeliest tokens, at most 40; the log has them as they are."""
    words = "\n한글".encode()
    model = tiny.make_speaker(tmp_path / "model", words, again=True)
    args = ["--train", "--model", model, "--data", data, "--iters", 2, "--steps-per-eval", 1]
    args += ["--learning-rate", 0, "--adapter-file", tmp_path / "a.npz"]
    ended = call(*args, "--prompt", "말:", "--prompt", "\n")
    # A character that the end cuts through is left out.
    answers = [(words * 6)[:40].decode(errors="ignore"), (words * 6)[1:41].decode(errors="ignore")]
    log = read_log(tmp_path / "a.run/log.jsonl")
    assert [entry["answers"] for entry in log if "val_loss" in entry] == 3 * [
        [answer.strip() for answer in answers]
    ]
    shown = [f"Answer: {' '.join(answer.split())}" for answer in answers]
    printed = [line for line in ended.stdout.splitlines() if "Answer" in line]
    assert printed == [f"Iter {n}: {line}" for n in (1, 1, 2) for line in shown]

    shorter = call(*args, "--prompt", "말:", "--max-tokens", 7)
    assert "Iter 1: Answer: 한글\n" in shorter.stdout


def test_the_folder_holds_the_adapter_and_what_belongs_to_it_and_nothing_else(
    whole_run: tuple[Path, Ended],
) -> None:
    folder = whole_run[0]
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    inside = ["best.npz", "lock", "log.jsonl", "losses.png", "state.npz"]
    assert names == ["adapter.npz", "adapter.run", *(f"adapter.run/{name}" for name in inside)]


def test_the_parameters_are_counted(whole_run: tuple[Path, Ended], model: Path) -> None:
    folder, ended = whole_run
    total = sum(array.size for array in mx.load(str(model / "model.safetensors")).values())
    trained = sum(array.size for array in read_arrays(folder / "adapter.npz").values())
    assert f"\nTotal parameters {total / 1e6:.3f}M\n" in ended.stdout
    assert f"\nTrainable parameters {trained / 1e6:.3f}M\n" in ended.stdout


def test_training_brings_the_losses_down(whole_run: tuple[Path, Ended]) -> None:
    for loss in ("val_loss", "train_loss"):
        entries = read_log(whole_run[0] / "adapter.run/log.jsonl")
        values = [entry[loss] for entry in entries if loss in entry]
        assert values[-1] < values[0] - 0.2


def test_both_command_lines_and_two_runs_give_the_same_adapter_to_the_byte(
    run: Run, model: Path, data: Path, whole_run: tuple[Path, Ended], tmp_path: Path
) -> None:
    args = ["--model", model, "--data", data, *WHOLE_RUN, "--seed", 7]
    ended = run(*args, script="lora_finetune/train_lora.py", cwd=tmp_path)
    assert ended.returncode == 0
    expected = (whole_run[0] / "adapter.npz").read_bytes()
    assert (tmp_path / "adapter.npz").read_bytes() == expected
    assert "Testing" not in ended.stdout
    assert "Generating" not in ended.stdout
    watched = shapes(whole_run[1].stdout.partition("Testing")[0])  # which changes nothing
    assert shapes(ended.stdout) == [line for line in watched if "Answer" not in line]


def test_another_seed_gives_another_adapter(
    call: Run, model: Path, data: Path, whole_run: tuple[Path, Ended], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ended = call("--model", model, "--data", data, *WHOLE_RUN, "--seed", 8, "--test")
    other, first = (read_arrays(folder / "adapter.npz") for folder in (tmp_path, whole_run[0]))
    assert all((other[name] != first[name]).any() for name in first)
    assert shapes(ended.stdout)[-2:] == ["Testing", "Test loss #, Test ppl #."]


def test_another_seed_starts_from_another_adapter(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """And not only with other batches: with no learning at all each A is as it started."""
    args = ["--model", model, "--data", data, "--train", "--iters", 1, "--learning-rate", 0]
    for seed in (1, 2):
        call(*args, "--seed", seed, "--adapter-file", tmp_path / f"{seed}.npz")
    one, two = (read_arrays(tmp_path / f"{seed}.npz") for seed in (1, 2))
    assert all((one[name] != two[name]).any() == name.endswith("lora_a") for name in one)


def test_an_adapter_is_tested_and_generates_later_as_in_the_run_that_made_it(
    call: Run, model: Path, data: Path, whole_run: tuple[Path, Ended], tmp_path: Path
) -> None:
    """Without --lora-layers, since the file says which layers it adapts."""
    folder, before = whole_run
    adapter = tmp_path / "copied.npz"
    adapter.write_bytes((folder / "adapter.npz").read_bytes())
    common = ["--model", model, "--adapter-file", adapter, "--seed", 7]
    test = [*common, "--test", "--data", data, "--test-batches", -1, "--batch-size", 4]
    generate = [*common, "--prompt", PROMPT, "--max-tokens", 12]
    _, _, expected = before.stdout.partition("Testing\n")
    expected = shapes(expected)
    loss = numbers("Test loss (.*), Test ppl .*", before.stdout)

    tested = call(*test)
    assert numbers("Test loss (.*), Test ppl .*", tested.stdout) == loss
    loaded = ["Loading pretrained model", "Total parameters #M", "Trainable parameters #M"]
    assert shapes(tested.stdout) == [*loaded, "Testing", expected[0]]
    assert "\nTrainable parameters 0.004M\n" in tested.stdout

    generated = call(*generate)
    assert shapes(generated.stdout) == [*loaded, *expected[1:]]

    both = call(*test, "--prompt", PROMPT, "--max-tokens", 12)
    assert shapes(both.stdout) == [*loaded, "Testing", *expected]
    assert tested.stderr + generated.stderr + both.stderr == ""
    assert adapter.read_bytes() == (folder / "adapter.npz").read_bytes()


def test_a_run_can_train_and_generate_without_testing(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    args = ["--model", model, "--data", data, "--adapter-file", tmp_path / "a.npz"]
    ended = call(*args, "--train", "--iters", 1, "--lora-layers", 1, "--prompt", "가", "-m", 3)
    report = ended.stdout.partition("Generating\n")[0]
    saved = f"Iter 1: Saved adapter weights to {tmp_path / 'a.npz'}."
    assert shapes(report)[-1].startswith(saved)
    assert re.search(r"Generating\n가.*\n={10} \d tokens, .* tokens/sec.*\n\Z", ended.stdout, re.S)


# --- The command line ---------------------------------------------------------------------------

FLAGS = {  # as the specification has them: name, short form, what a value becomes, default
    "--model": (None, str, None),
    "--max-tokens": ("-m", int, 100),
    "--temp": (None, float, 0.8),
    "--prompt": ("-p", str, None),
    "--train": (None, bool, False),
    "--add-eos-token": (None, int, 1),
    "--data": (None, str, "lora_finetune/data"),
    "--lora-layers": (None, int, 16),
    "--batch-size": (None, int, 10),
    "--epochs": (None, int, 1),
    "--iters": (None, int, None),
    "--start-iter": (None, int, 0),
    "--val-batches": (None, int, 25),
    "--learning-rate": (None, float, 2e-5),
    "--steps-per-report": (None, int, 10),
    "--steps-per-eval": (None, int, 200),
    "--resume-adapter-file": (None, str, None),
    "--adapter-file": (None, str, "lora_finetune/lora_adapters.npz"),
    "--save-every": (None, int, 100),
    "--test": (None, bool, False),
    "--test-batches": (None, int, 500),
    "--seed": (None, int, 0),
}


def flags_of(group: argparse._ArgumentGroup) -> set[str]:
    return {name for action in group._group_actions for name in action.option_strings}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_is_as_specified(flag: str) -> None:
    short, kind, default = FLAGS[flag]
    parser = train_lora.build_parser()
    name = flag.strip("-").replace("-", "_")
    found = getattr(parser.parse_args([]), name)
    assert (type(found), found) == (type(default), default)
    for form in filter(None, (flag, short)):
        given = [form] if kind is bool else [form, "1"]
        value = getattr(parser.parse_args(given), name)
        if flag == "--prompt":  # which may be given several times
            [value] = value
        assert (type(value), value) == (kind, kind("1"))


def test_what_goes_beyond_the_specification_stands_in_a_group_of_its_own() -> None:
    groups = train_lora.build_parser()._action_groups
    specified = {*FLAGS, *(short for short, _, _ in FLAGS.values() if short)}
    beyond = [group for group in groups if flags_of(group) - {"-h", "--help"} - specified]
    assert len(beyond) == 1
    assert not flags_of(beyond[0]) & specified
    assert set.union(*map(flags_of, groups)) >= specified


def test_help_names_every_flag(call: Run) -> None:
    ended = call("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for flag in [*FLAGS, "-m", "-p", "--max-seq-length"]:
        assert re.search(rf"(?m)(^|[ ,]){flag}\b", ended.stdout)


def test_default_paths_are_in_the_project_and_typed_ones_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = read_config(train_lora.build_parser(), ["--train"])
    assert Path(args.data).resolve() == ROOT / "lora_finetune/data"
    assert Path(args.adapter_file).resolve() == ROOT / "lora_finetune/lora_adapters.npz"
    typed = ["--train", "--data", "d", "--adapter-file", "a.npz"]
    args = read_config(train_lora.build_parser(), typed)
    assert Path(args.data).resolve() == tmp_path / "d"
    assert Path(args.adapter_file).resolve() == tmp_path / "a.npz"


# --- Epochs and iterations ----------------------------------------------------------------------


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    """A data folder with seven short texts to train on."""
    for split in ("train", "valid", "test"):
        tiny.write_jsonl(tmp_path / "seven", split, TEXTS[split][:7])
    return tmp_path / "seven"


def train_on_seven(call: Run, model: Path, seven: Path, tmp_path: Path, asked: list[str]) -> Ended:
    """Train on seven texts, by three unless something else is asked for."""
    args = ["--model", model, "--data", seven, "--adapter-file", tmp_path / "a.npz", "--train"]
    return call(*args, "--lora-layers", 1, "--batch-size", 3, *asked)


@pytest.mark.parametrize(
    ("asked", "iterations"),
    [
        ([], 3),  # one epoch of seven texts by three, the short batch included
        (["--epochs", "2"], 6),
        (["--iters", "4"], 4),
        (["--batch-size", "50"], 1),  # more than there are texts
    ],
)
def test_a_run_has_as_many_iterations_as_asked_for(
    call: Run, model: Path, seven: Path, tmp_path: Path, asked: list[str], iterations: int
) -> None:
    ended = train_on_seven(call, model, seven, tmp_path, asked)
    assert numbers(r"Iter (\d+): Saved adapter weights to .*", ended.stdout) == [str(iterations)]
    assert numbers(r"Iter (\d+): Val loss .*", ended.stdout) == ["1", str(iterations)]
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("asked", "iterations"),
    [
        (["--iters", "4", "--epochs", "2"], 6),
        (["--epochs", "2", "--iters", "4"], 6),
        (["--epochs=1", "--iters=4"], 3),  # 1 is the default, but given all the same
    ],
)
def test_epochs_go_before_iterations_and_a_line_says_so(
    call: Run, model: Path, seven: Path, tmp_path: Path, asked: list[str], iterations: int
) -> None:
    ended = train_on_seven(call, model, seven, tmp_path, asked)
    assert numbers(r"Iter (\d+): Saved adapter weights to .*", ended.stdout) == [str(iterations)]
    assert re.fullmatch(r"warning: .*--iters.*ignored.*\n", ended.stderr)


def test_only_real_target_tokens_are_counted_once_an_epoch(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """A token is a byte here, and each text has its end to predict in place of its first byte."""
    args = ["--model", model, "--data", data, "--adapter-file", tmp_path / "a.npz", "--train"]
    ended = call(*args, "--lora-layers", 1, "--steps-per-report", 1000)
    entry = read_log(tmp_path / "a.run/log.jsonl")[1]
    assert entry["iter"] == math.ceil(len(TEXTS["train"]) / 10)
    tokens = entry["tokens_per_sec"] / entry["it_per_sec"] * entry["iter"]
    assert math.isclose(tokens, sum(len(text.encode()) for text in TEXTS["train"]))
    assert ended.returncode == 0


# --- Resuming -----------------------------------------------------------------------------------


def test_a_run_started_at_an_iteration_goes_on_as_the_uninterrupted_one(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """By its numbers, and by its batches: the next loss is that of the uninterrupted run."""
    common = ["--model", model, "--data", data, "--train", "--lora-layers", 2, *LEARN, "--seed", 3]
    common += ["--batch-size", 4, "--steps-per-report", 1, "--steps-per-eval", 3]
    adapter = ["--adapter-file", tmp_path / "a.npz"]
    call(*common, *adapter, "--iters", 3)
    part = tmp_path / "part.npz"
    part.write_bytes((tmp_path / "a.npz").read_bytes())
    call(*common, *adapter, "--iters", 6)
    before = read_log(tmp_path / "a.run/log.jsonl")

    ended = call(
        *common, "--iters", 6, "--start-iter", 3, "--resume-adapter-file", part,
        "--adapter-file", tmp_path / "b.npz",
    )  # fmt: skip
    after = read_log(tmp_path / "b.run/log.jsonl")
    assert numbers(r"Iter (\d+): Val loss .*", ended.stdout) == ["4", "6"]
    assert numbers(r"Iter (\d+): Train loss .*", ended.stdout) == ["4", "5", "6"]
    assert numbers(r"Iter (\d+): Saved .*", ended.stdout) == ["6"]
    val_loss, train_loss = (
        {entry["iter"]: entry[name] for entry in before if name in entry}
        for name in ("val_loss", "train_loss")
    )
    assert after[0] == {"iter": 4, "val_loss": pytest.approx(val_loss[3], abs=1e-5)}
    assert after[1]["train_loss"] == pytest.approx(train_loss[4], abs=1e-5)
    assert abs(train_loss[4] - train_loss[3]) > 1e-3  # else the batch would not matter


def test_resuming_adapts_the_layers_of_the_file_at_its_rank(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    source = tiny.make_adapter(tmp_path / "source.npz", range(1, 3), rank=4)
    args = ["--model", model, "--data", data, "--train", "--iters", 1, "--learning-rate", 0]
    ended = call(*args, "--resume-adapter-file", source, "--adapter-file", tmp_path / "a.npz")
    assert re.fullmatch(r"warning: .*source.npz .*fresh moments\n", ended.stderr)
    expected, found = read_arrays(source), read_arrays(tmp_path / "a.npz")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_resuming_with_more_layers_starts_those_that_the_file_lacks_fresh_and_says_so(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """With the roles that the file has."""
    expected = tiny.adapter_arrays(range(2, 4), rank=4)
    expected["model.layers.3.self_attn.o_proj.lora_a"] = np.ones((64, 2), np.float32)
    expected["model.layers.3.self_attn.o_proj.lora_b"] = np.ones((2, 64), np.float32)
    np.savez(tmp_path / "from.npz", **expected)
    args = ["--model", model, "--data", data, "--train", "--iters", 1, "--learning-rate", 0]
    args += ["--resume-adapter-file", tmp_path / "from.npz", "--lora-layers", 3]
    ended = call(*args, "--adapter-file", tmp_path / "a.npz")
    assert re.fullmatch(
        r"warning: .*lacks 4 of 9 .*fresh\nwarning: .*fresh moments\n", ended.stderr
    )
    found = read_arrays(tmp_path / "a.npz")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    fresh = found.keys() - expected.keys()
    targets = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")
    assert fresh == last_layers(3, *targets) - expected.keys()
    for name in fresh:
        assert found[name].any() == name.endswith("lora_a")
        assert min(found[name].shape) == 4


def test_resuming_leaves_the_file_that_it_starts_from_as_it_is(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    source = tiny.make_adapter(tmp_path / "source.npz")
    before = source.read_bytes()
    args = ["--model", model, "--data", data, "--train", "--iters", 1, *LEARN]
    call(*args, "--resume-adapter-file", source, "--adapter-file", tmp_path / "a.npz")
    assert source.read_bytes() == before != (tmp_path / "a.npz").read_bytes()
    call(*args, "--resume-adapter-file", source, "--adapter-file", source)  # unless it is told to
    assert source.read_bytes() == (tmp_path / "a.npz").read_bytes()


# --- Where LoRA goes ----------------------------------------------------------------------------


def test_with_more_layers_asked_for_than_there_are_all_are_adapted_and_a_line_says_so(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    args = ["--model", model, "--data", data, "--adapter-file", tmp_path / "a.npz", "--train"]
    ended = call(*args, "--iters", 1)  # the default is 16
    assert re.fullmatch(r"warning: .*\b4 layers.*\n", ended.stderr)
    names = read_arrays(tmp_path / "a.npz").keys()
    assert names == last_layers(4, "self_attn.q_proj", "self_attn.v_proj")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_trains_as_its_original_does(
    call: Run, data: Path, model: Path, tmp_path: Path, bits: int
) -> None:
    quantized = tiny.make_model(tmp_path / "quantized", bits=bits)
    args = ["--data", data, "--train", "--lora-layers", 2, "--batch-size", 4, "--iters", 12, *LEARN]
    expected = call(*args, "--model", model, "--adapter-file", tmp_path / "original.npz")
    ended = call(*args, "--model", quantized, "--adapter-file", tmp_path / "quantized.npz")
    assert ended.stdout.splitlines()[:3] == expected.stdout.splitlines()[:3]  # the parameters
    original, found = (
        {name: array.shape for name, array in read_arrays(tmp_path / f"{which}.npz").items()}
        for which in ("original", "quantized")
    )
    assert found == original
    losses = [float(loss) for loss in numbers("Iter .*: Val loss (.*), .*", ended.stdout)]
    assert losses[-1] < losses[0] - 0.2


def test_in_a_mixture_of_experts_the_router_is_adapted_too(
    call: Run, data: Path, tmp_path: Path
) -> None:
    model = tiny.make_model(tmp_path / "moe", **tiny.QWEN2_MOE)
    args = ["--model", model, "--data", data, "--adapter-file", tmp_path / "a.npz", *LEARN]
    train = ["--train", "--lora-layers", 2, "--batch-size", 4, "--iters", 12]
    ended = call(*args, *train, "--test")
    arrays = read_arrays(tmp_path / "a.npz")
    expected = last_layers(2, "self_attn.q_proj", "self_attn.v_proj", "mlp.gate")
    assert arrays.keys() == expected
    assert all(array.any() for array in arrays.values())  # each B too has learnt
    losses = [float(loss) for loss in numbers("Iter .*: Val loss (.*), .*", ended.stdout)]
    assert losses[-1] < losses[0] - 0.2
    assert shapes(ended.stdout)[-1] == shapes(call(*args, "--test").stdout)[-1]


ROLES = {role: f"self_attn.{role}_proj" for role in "qkvo"}
ROLES |= {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}


def test_targets_are_roles_that_the_adapter_file_tells_from_then_on(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    args = ["--model", model, "--data", data, "--adapter-file", tmp_path / "a.npz"]
    train = [*args, "--train", "--lora-layers", 2, "--batch-size", 4, *LEARN]
    assert call(*train, "--iters", 2, "--targets", "attention").returncode == 0
    before = read_arrays(tmp_path / "a.npz")
    assert before.keys() == last_layers(2, *(ROLES[role] for role in "qkvo"))
    assert all(array.any() for array in before.values())
    number = sum(array.size for array in before.values())
    assert f"Trainable parameters {number / 1e6:.3f}M" in call(*args, "--test").stdout
    one_error(call(*args, "--test", "--targets", "all"), "--targets", "is for training")
    one_error(call(*train, "--targets", "q,w1"), "--targets: takes qv, attention, all", "not 'w1'")

    resume = ["--resume-adapter-file", tmp_path / "a.npz", "--iters"]
    ended = call(*train, *resume, 4)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert read_arrays(tmp_path / "a.npz").keys() == before.keys()
    ended = call(*args, "--train", *LEARN, *resume, 4, "--targets", "q,o,up")
    one_error(ended, "a.npz adapts model.layers.2.self_attn.k_proj", "not of --targets q,o,up")
    ended = call(*train, *resume, 6, "--targets", "all")
    assert re.match(
        r"warning: .*a.npz lacks 6 of 14 adapted layers; they start fresh\n"
        r"warning: since .*: --targets \('q,k,v,o', now q,k,v,o,gate,up,down\)\n",
        ended.stderr,
    )
    arrays = read_arrays(tmp_path / "a.npz")
    assert arrays.keys() == last_layers(2, *ROLES.values())
    assert all(array.any() for array in arrays.values())


def test_experts_are_adapted_where_they_are_named_and_a_line_says_what_they_cost(
    call: Run, data: Path, tmp_path: Path
) -> None:
    model = tiny.make_model(tmp_path / "moe", **tiny.QWEN2_MOE)
    args = ["--model", model, "--data", data, "--adapter-file", tmp_path / "a.npz", *LEARN]
    args += ["--train", "--lora-layers", 1, "--batch-size", 4]
    ended = call(*args, "--iters", 2, "--targets", "down,experts")
    number = 4 * 3 * 8 * (64 + 32)
    line = (
        f"hint: {number / 1e6:.3f}M of the trainable parameters are the experts', each has its own"
    )
    assert ended.stderr == f"{line}\n"
    paths = [f"mlp.switch_mlp.{role}_proj" for role in ("gate", "up", "down")]
    arrays = read_arrays(tmp_path / "a.npz")
    assert arrays.keys() == last_layers(1, "mlp.shared_expert.down_proj", *paths)
    assert arrays[f"model.layers.3.{paths[0]}.lora_a"].shape == (4, 8, 64)
    assert arrays[f"model.layers.3.{paths[0]}.lora_b"].shape == (4, 32, 8)
    assert all(array.any() for array in arrays.values())


def test_an_adapter_file_is_a_plain_npz_file_of_float32(whole_run: tuple[Path, Ended]) -> None:
    file = whole_run[0] / "adapter.npz"
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert all(name.endswith(".npy") for name in archive.namelist())
    assert {array.dtype for array in read_arrays(file).values()} == {np.dtype("<f4")}


def test_mlx_lm_takes_the_adapter_and_computes_the_same_with_it(
    whole_run: tuple[Path, Ended], model: Path
) -> None:
    file = whole_run[0] / "adapter.npz"
    theirs, tokenizer = mlx_lm.load(str(model))
    theirs.freeze()
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    settings = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(theirs, 2, settings)
    weights = mx.load(str(file))
    expected = {name: w.shape for name, w in tree_flatten(theirs.trainable_parameters())}
    assert {name: w.shape for name, w in weights.items()} == expected
    theirs.load_weights(list(weights.items()), strict=False)
    theirs.eval()

    tokens = mx.array([tokenizer.encode(TEXTS["test"][0])])
    base = models.load(str(model))[0]
    assert mx.abs(base(tokens) - theirs(tokens)).max().item() > 0.1  # the adapter does something
    ours = load_adapted(model, file)
    assert mx.abs(ours(tokens) - theirs(tokens)).max().item() <= 5e-6


# --- Evaluation ---------------------------------------------------------------------------------


def test_the_test_loss_is_that_of_the_texts_one_by_one_whatever_the_batches_and_the_order(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tmp_path / "a.npz")
    tiny.write_jsonl(tmp_path / "turned", "test", TEXTS["test"][::-1])
    args = ["--model", model, "--adapter-file", adapter, "--test", "--test-batches", -1]
    for batch_size in (1, 3, 10):
        call(*args, "--data", data, "--batch-size", batch_size)
    call(*args, "--data", tmp_path / "turned", "--batch-size", 3)
    losses = [entry["test_loss"] for entry in read_log(tmp_path / "a.run/log.jsonl")]
    assert len(losses) == 4

    adapted = load_adapted(model, adapter)
    each = []
    for text in TEXTS["test"]:
        ids = [*text.encode(), tiny.EOS]
        logits = np.array(adapted(mx.array([ids[:-1]]))[0]).astype(np.float64)
        each.append(np.log(np.exp(logits).sum(1)) - logits[range(len(ids) - 1), ids[1:]])
    assert losses == pytest.approx([np.concatenate(each).mean()] * 4, abs=1e-4)


def test_a_number_of_test_batches_takes_the_first_texts(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tmp_path / "a.npz")
    tiny.write_jsonl(tmp_path / "six", "test", TEXTS["test"][:6])
    args = ["--model", model, "--adapter-file", adapter, "--test", "--batch-size", 3]
    call(*args, "--data", data, "--test-batches", 2)
    call(*args, "--data", tmp_path / "six", "--test-batches", -1)
    call(*args, "--data", data, "--test-batches", -1)
    two, six, all_ = [entry["test_loss"] for entry in read_log(tmp_path / "a.run/log.jsonl")]
    assert two == pytest.approx(six, abs=1e-6) != pytest.approx(all_, abs=1e-4)


def test_an_infinite_perplexity_is_reported_like_any_other(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """e to the power of it is more than a float can hold."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights = mx.load(str(model / "model.safetensors"))
    weights["lm_head.weight"] *= 3000
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    args = ["--data", data, "--adapter-file", tiny.make_adapter(tmp_path / "a.npz"), "--test"]
    ended = call("--model", folder, *args)
    assert ended.returncode == 0
    assert re.search(r"\nTest loss \d{4,}\.\d{3}, Test ppl inf\.\n\Z", ended.stdout)


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_change_nothing(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tmp_path / "a.npz")
    plain = (data / "test.jsonl").read_bytes()
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + plain.replace(b"\n", b"\r\n\r\n"))
    args = ["--model", model, "--adapter-file", adapter, "--test"]
    losses = {call(*args, "--data", folder).stdout for folder in (data, tmp_path)}
    assert len(losses) == 1


def test_a_text_of_one_token_has_nothing_to_predict_and_does_no_harm(
    call: Run, model: Path, tmp_path: Path
) -> None:
    for split in ("train", "valid", "test"):
        tiny.write_jsonl(tmp_path, split, ["a", TEXTS[split][0], "b"])
    args = ["--model", model, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    args += ["--train", "--test", "--add-eos-token", 0, "--batch-size", 1, "--lora-layers", 2]
    ended = call(*args, "--steps-per-report", 1)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "nan" not in ended.stdout
    assert all(np.isfinite(array).all() for array in read_arrays(tmp_path / "a.npz").values())


# --- Texts --------------------------------------------------------------------------------------


def test_texts_too_long_are_cut_and_a_warning_for_each_file_counts_them(
    call: Run, model: Path, tmp_path: Path
) -> None:
    tiny.write_jsonl(tmp_path, "train", ["a" * 10, "b" * 40, "c" * 31])  # and one for the end
    tiny.write_jsonl(tmp_path, "valid", ["d" * 50])
    args = ["--model", model, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    args += ["--train", "--lora-layers", 1, "--max-seq-length", 32]
    ended = call(*args)
    assert re.fullmatch(
        r"warning: .*train.jsonl: 1 of 3 texts .*--max-seq-length.*\n"
        r"warning: .*valid.jsonl: 1 of 1 texts .*--max-seq-length.*\n",
        ended.stderr,
    )
    entry = read_log(tmp_path / "a.run/log.jsonl")[1]
    assert entry["tokens_per_sec"] / entry["it_per_sec"] == pytest.approx(10 + 31 + 31)


@pytest.mark.parametrize("appends_eos", [False, True])
def test_a_text_ends_in_exactly_one_end_or_none_as_asked(tmp_path: Path, appends_eos: bool) -> None:
    """Also where the tokenizer adds an end of its own accord, or the text has one already."""
    folder = tiny.make_model(tmp_path / "model", appends_eos=appends_eos)
    _, tokenizer = models.load(str(folder))
    texts = [dataset.Text(text) for text in ["가", "ab ", "c<|endoftext|>", "<|endoftext|>d"]]
    ended = tokenizing.tokenize(texts, tokenizer, add_eos=True, max_length=100)
    rows = np.split(ended.tokens, ended.starts[1:-1])
    eos = tiny.EOS
    expected = [[*"가".encode(), eos], [*b"ab ", eos], [*b"c", eos], [eos, *b"d", eos]]
    assert [row.tolist() for row in rows] == expected

    without = tokenizing.tokenize(texts[:2], tokenizer, add_eos=False, max_length=100)
    rows = np.split(without.tokens, without.starts[1:-1])
    assert [row.tolist() for row in rows] == [[*"가".encode()], [*b"ab "]]


def test_the_flag_decides_whether_the_end_is_trained_on(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    args = ["--model", model, "--data", data, "--train", "--lora-layers", 1, "--iters", 1]
    args += ["--batch-size", 37]
    for flag in (0, 1):
        call(*args, "--add-eos-token", flag, "--adapter-file", tmp_path / f"{flag}.npz")
    without, ended = (read_log(tmp_path / f"{flag}.run/log.jsonl")[1] for flag in (0, 1))
    tokens = [entry["tokens_per_sec"] / entry["it_per_sec"] for entry in (without, ended)]
    assert tokens[1] - tokens[0] == pytest.approx(len(TEXTS["train"]))


# --- Generation ---------------------------------------------------------------------------------


def continuation(ended: Ended, prompt: str) -> tuple[str, int]:
    """What came after the prompt, and how many tokens the last line says it was."""
    assert ended.returncode == 0
    assert ended.stderr == ""
    last_line = r"\n={10} (\d+) tokens, \d+\.\d{3} tokens/sec.*\n"
    pattern = rf"(?s).*\nGenerating\n{re.escape(prompt)}(.*){last_line}"
    text, number = re.fullmatch(pattern, ended.stdout).groups()
    return text, int(number)


def test_characters_of_several_tokens_come_out_whole_wherever_the_end_falls(
    call: Run, tmp_path: Path
) -> None:
    """Each is three or four tokens here; one that --max-tokens cuts through is left out."""
    words = "한글😊".encode()
    model = tiny.make_speaker(tmp_path / "model", words, again=True)
    args = ["--model", model, "--adapter-file", tiny.make_adapter(tmp_path / "a.npz")]
    for number in range(1, 2 * len(words) + 2):
        ended = call(*args, "--temp", 0, "--prompt", "질문:", "--max-tokens", number)
        expected = (words * 3)[:number].decode(errors="ignore")
        assert continuation(ended, "질문:") == (expected, number)


def test_bytes_that_are_no_text_are_marked_and_lose_nothing_around_them(
    call: Run, tmp_path: Path
) -> None:
    words = b"a\xed\x95b\xff" + "글".encode()
    model = tiny.make_speaker(tmp_path / "model", words, again=False)
    args = ["--model", model, "--adapter-file", tiny.make_adapter(tmp_path / "a.npz")]
    text, _ = continuation(call(*args, "--temp", 0, "--prompt", ":"), ":")
    assert text == "a\ufffdb\ufffd글"


@pytest.mark.parametrize("words", [" 한글", "\n답", "\tab c", "글 ", "글 \t", "\u00a0x", "a\r\nb"])
def test_white_space_is_printed_as_the_model_says_it(call: Run, tmp_path: Path, words: str) -> None:
    model = tiny.make_speaker(tmp_path / "model", words.encode(), again=False)
    args = ["--model", model, "--adapter-file", tiny.make_adapter(tmp_path / "a.npz")]
    assert continuation(call(*args, "--temp", 0, "--prompt", "답:"), "답:")[0] == words


@pytest.mark.parametrize("appends_eos", [False, True])
def test_generation_ends_at_the_end_of_text_and_the_prompt_gets_no_end(
    call: Run, tmp_path: Path, appends_eos: bool
) -> None:
    """With an end behind the prompt, this model would have nothing to say."""
    words = "한글"
    model = tiny.make_speaker(
        tmp_path / "model", words.encode(), again=False, appends_eos=appends_eos
    )
    args = ["--model", model, "--adapter-file", tiny.make_adapter(tmp_path / "a.npz")]
    text, number = continuation(call(*args, "--temp", 0, "--prompt", "답:"), "답:")
    assert text == words
    assert number in (6, 7)  # whether the end counts is left open
    assert continuation(call(*args, "--temp", 0, "--prompt", "글"), "글")[0] == ""


def test_generated_text_is_utf_8_in_a_process_of_its_own_too(run: Run, tmp_path: Path) -> None:
    model = tiny.make_speaker(tmp_path / "model", "한글😊".encode(), again=True)
    args = ["--model", model, "--adapter-file", tiny.make_adapter(tmp_path / "a.npz")]
    ended = run(*args, "--prompt", "질문:", "--max-tokens", 14, env={"LC_ALL": "C"})
    assert continuation(ended, "질문:") == ("한글😊한", 14)


def test_temperature_and_seed_decide_what_is_generated(
    call: Run, model: Path, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tmp_path / "a.npz")

    def say(*args: object) -> str:
        common = ["--model", model, "--adapter-file", adapter, "-p", PROMPT, "-m", 20]
        return continuation(call(*common, *args), PROMPT)[0]

    greedy = say("--temp", 0, "--seed", 1)
    assert say("--temp", 0, "--seed", 2) == greedy
    one = say("--temp", 1, "--seed", 1)
    assert say("--temp", 1, "--seed", 1) == one
    assert say("--temp", 1, "--seed", 2) != one != greedy


def test_the_adapter_speaks_and_not_the_model_alone(call: Run, model: Path, tmp_path: Path) -> None:
    said = set()
    for name, scale in [("none", 0), ("some", 1)]:
        arrays = {key: array * scale for key, array in tiny.adapter_arrays().items()}
        np.savez(tmp_path / f"{name}.npz", **arrays)
        args = ["--model", model, "--adapter-file", tmp_path / f"{name}.npz", "--temp", 0]
        said.add(continuation(call(*args, "--prompt", PROMPT), PROMPT)[0])
    assert len(said) == 2
