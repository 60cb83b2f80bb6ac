"""No model is given a token or a position that it has no embedding for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import models
import tiny
from conftest import Ended, Run, one_error
from lora_finetune.mlx_patches.loading import Limits, find_limits
from lora_finetune.model_folder import files

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

POSITIONS = 40
LEARNT = {
    "gpt2": {"n_ctx": POSITIONS, "n_layer": 2},
    "gpt_bigcode": {"n_layer": 2, "n_inner": 128, "multi_query": True},
}
SIZES = {"n_embd": 64, "n_head": 4, "n_positions": POSITIONS, "layer_norm_epsilon": 1e-5}
TEXTS = ["a" * 10, "b" * 39, "c" * 40, "d" * 41, "e" * 500]


@pytest.fixture(autouse=True)
def only_rows_that_are_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every embedding looks at what it is asked for; uncompiled, so that there is something."""
    embed = nn.Embedding.__call__

    def look(table: nn.Embedding, indices: mx.array) -> mx.array:
        asked = np.array(indices)
        assert asked.min() >= 0
        assert asked.max() < table.weight.shape[0]
        return embed(table, indices)

    monkeypatch.setattr(nn.Embedding, "__call__", look)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module", params=LEARNT)
def learnt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose positions have embeddings."""
    folder = tmp_path_factory.mktemp("models") / request.param
    return tiny.make_model(folder, model_type=request.param, **LEARNT[request.param], **SIZES)


def write_texts(folder: Path, texts: list[str]) -> Path:
    for split in ("train", "valid", "test"):
        tiny.write_jsonl(folder, split, texts)
    return folder


def train(call: Run, model: Path, data: Path, *args: object) -> Ended:
    common = ["--train", "--batch-size", 2, "--lora-layers", 1, "--adapter-file", data / "a.npz"]
    return call("--model", model, "--data", data, *common, *args)


def losses(ended: Ended) -> list[str]:
    """The validation and test losses that a run reported."""
    assert ended.returncode == 0, ended.stderr
    words = [line.split(",")[0] for line in ended.stdout.splitlines()]
    return [line for line in words if "Val loss" in line or "Test loss" in line]


# --- Positions ----------------------------------------------------------------------------------


def test_texts_are_cut_to_the_positions_of_the_model_and_counted(
    call: Run, learnt: Path, tmp_path: Path
) -> None:
    args = ["--test", "--add-eos-token", 0, "--learning-rate", 0]
    ended = train(call, learnt, write_texts(tmp_path / "long", TEXTS), *args)
    for line, split in zip(ended.stderr.splitlines(), ("train", "valid", "test"), strict=True):
        assert f"{split}.jsonl: 2 of 5 texts were cut to 40 tokens" in line
    assert "longest 40, 2 cut" in ended.stdout
    cut = write_texts(tmp_path / "cut", [text[:POSITIONS] for text in TEXTS])
    as_cut = train(call, learnt, cut, *args)
    assert as_cut.stderr == ""
    assert losses(ended) == losses(as_cut)
    assert len(losses(ended)) == 3


def test_a_max_seq_length_beyond_the_positions_cuts_to_them(
    call: Run, learnt: Path, tmp_path: Path
) -> None:
    data = write_texts(tmp_path, TEXTS)
    ended = train(call, learnt, data, "--max-seq-length", POSITIONS + 1, "--iters", 1)
    assert (ended.returncode, "texts were cut to 40 tokens" in ended.stderr) == (0, True)


@pytest.fixture
def trained(call: Run, learnt: Path, tmp_path: Path) -> list[object]:
    """The arguments for an adapter of a model with learnt positions."""
    assert train(call, learnt, write_texts(tmp_path, TEXTS), "--iters", 1).returncode == 0
    return ["--model", learnt, "--adapter-file", tmp_path / "a.npz", "--temp", 0]


@pytest.mark.parametrize(("prompt", "generated"), [(30, 10), (39, 1)])
def test_a_generation_ends_at_the_last_position(
    call: Run, trained: list[object], prompt: int, generated: int
) -> None:
    ended = call(*trained, "--prompt", "a" * prompt, "--max-tokens", 11)
    assert ended.returncode == 0, ended.stderr
    [line] = ended.stderr.splitlines()
    assert f"the prompt has {prompt} tokens" in line
    assert f"at most {generated} tokens are generated and not 11 (--max-tokens)" in line
    assert f"========== {generated} tokens" in ended.stdout


def test_a_generation_that_just_fits_is_not_shortened(call: Run, trained: list[object]) -> None:
    ended = call(*trained, "--prompt", "a" * 29, "--max-tokens", 11)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "========== 11 tokens" in ended.stdout


def test_a_prompt_that_leaves_no_position_is_an_error_before_training(
    call: Run, learnt: Path, tmp_path: Path
) -> None:
    data = write_texts(tmp_path, TEXTS)
    error = one_error(train(call, learnt, data, "--prompt", "a" * 40))
    assert "the prompt has 40 tokens, and the model 40 positions" in error
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 64}, None),
        ({"max_position_embeddings": 499}, 500),
        ({"max_position_embeddings": 500}, None),
        ({"max_position_embeddings": 250, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"max_position_embeddings": 249, "rope_scaling": {"type": "linear", "factor": 2.0}}, 500),
    ],
)
def test_texts_longer_than_a_model_was_made_for_are_warned_of_once(
    call: Run, tmp_path: Path, config: dict, longest: int | None
) -> None:
    model = tiny.make_model(tmp_path / "model", num_hidden_layers=1, **config)
    args = ["--iters", 1, "--add-eos-token", 0, "--test"]
    args += ["--max-seq-length", 64] if config == {"max_position_embeddings": 64} else []
    ended = train(call, model, write_texts(tmp_path, TEXTS), *args)
    assert ended.returncode == 0, ended.stderr
    warnings = [line for line in ended.stderr.splitlines() if "context length" in line]
    assert len(warnings) == (longest is not None)
    assert all(f"has {longest} tokens" in line for line in warnings)


def test_a_prompt_and_its_generation_beyond_what_a_model_was_made_for_are_warned_of(
    call: Run, tmp_path: Path
) -> None:
    model = tiny.make_model(tmp_path / "model", max_position_embeddings=20)
    tiny.make_adapter(tmp_path / "a.npz")
    args = ["--model", model, "--adapter-file", tmp_path / "a.npz", "--prompt", "a" * 15]
    assert call(*args, "--max-tokens", 5).stderr == ""
    [line] = call(*args, "--max-tokens", 6).stderr.splitlines()
    assert "has 21 tokens, and the model's context length is 20; " in line


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, np.inf),
        ({"max_position_embeddings": None}, np.inf),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": YARN}, 131072),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "su", "factor": None}}, 2048),
        ({"n_positions": 2048}, 2048),
        ({"max_position_embeddings": 9, "text_config": {"max_position_embeddings": 4096}}, 4096),
    ],
)
def test_the_length_a_model_was_made_for_is_that_of_its_configuration(
    tmp_path: Path, config: dict, length: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert files.context_length(tmp_path) == length


# --- Tokens -------------------------------------------------------------------------------------


def test_an_end_of_text_token_that_the_model_lacks_is_an_error(call: Run, tmp_path: Path) -> None:
    small = tiny.make_model(tmp_path / "model", vocab_size=256, num_hidden_layers=1)
    data = write_texts(tmp_path, TEXTS)
    error = one_error(train(call, small, data, "--iters", 1))
    assert "token 256" in error
    assert "is outside the model's vocabulary of 256" in error
    assert train(call, small, data, "--iters", 1, "--add-eos-token", 0).returncode == 0


def test_a_token_of_a_chat_template_that_the_model_lacks_is_an_error(
    call: Run, tmp_path: Path
) -> None:
    small = tiny.make_model(tmp_path / "model", vocab_size=257, num_hidden_layers=1)
    file = small / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {
        "chat_template": "<|pad|>{{ messages[0].content }}{{ messages[1].content }}"
    }
    file.write_text(json.dumps(settings))
    for split in ("train", "valid"):
        entry = {"prompt": "a", "completion": "b"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(entry) + "\n")
    error = one_error(train(call, small, tmp_path))
    assert f"token 257 of {tmp_path / 'train.jsonl'}" in error


def test_a_token_of_a_prompt_that_the_model_lacks_is_an_error_before_training(
    call: Run, tmp_path: Path
) -> None:
    small = tiny.make_model(tmp_path / "model", vocab_size=200, num_hidden_layers=1)
    data = write_texts(tmp_path, TEXTS)
    error = one_error(train(call, small, data, "--add-eos-token", 0, "--prompt", "가"))
    assert "of the prompt is outside the model's vocabulary of 200" in error
    assert not (tmp_path / "a.npz").exists()


# One of its two embeddings of tokens has fewer rows than the head.
GEMMA4 = json.loads((Path(__file__).parent / "architectures.json").read_text("utf-8"))
GEMMA4 = GEMMA4["gemma4_text"]["config"] | {"vocab_size": 300, "vocab_size_per_layer_input": 99}


def test_of_several_tables_the_shortest_counts_for_texts_prompts_and_what_is_generated(
    call: Run, tmp_path: Path
) -> None:
    model = tiny.make_model(tmp_path / "model", **GEMMA4)
    assert find_limits(models.load(model)[0]).vocab_size == 99
    args = ["--iters", 1, "--add-eos-token", 0, "--prompt"]
    data = write_texts(tmp_path, [text.upper() for text in TEXTS])
    assert "token 122" in one_error(train(call, model, data, *args, "z"))
    ended = train(call, model, data, *args, "A", "--temp", 9, "--max-tokens", 50)
    assert ended.returncode == 0, ended.stderr
    assert "========== 50 tokens" in ended.stdout
    write_texts(tmp_path, ["a" * 5, "c" * 5])
    assert "token 99 of" in one_error(train(call, model, data, *args, "A"))


def test_an_embedding_with_fewer_rows_than_the_head_or_more_limits_the_tokens(model: Path) -> None:
    loaded = models.load(model)[0]
    for rows, tokens in [(99, 99), (999, tiny.LLAMA["vocab_size"])]:
        loaded.model.embed_tokens = nn.Embedding(rows, tiny.LLAMA["hidden_size"])
        assert find_limits(loaded) == Limits(tokens, np.inf)


def test_a_generated_token_that_a_sentencepiece_tokenizer_lacks_is_an_error(
    call: Run, tmp_path: Path
) -> None:
    """The head of many models has more rows than their tokenizer has tokens."""
    folder = tiny.make_speaker(tmp_path / "model", b"a", again=True)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["lm_head.weight"][299] = 2 * weights["lm_head.weight"][ord("a")]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tiny.make_adapter(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        np.savez(tmp_path / "b.npz", **{name: 0 * array for name, array in arrays.items()})
    args = ["--model", folder, "--adapter-file", tmp_path / "b.npz", "--prompt", ":"]
    error = one_error(call(*args, "--temp", 0))
    assert "generated a token that its tokenizer does not have" in error

    tiny.write_jsonl(tmp_path / "data", "train", ["aaaa"] * 8)
    args += ["--data", tmp_path / "data", "--train", "--iters", 2, "--steps-per-eval", 1]
    error = call(*args).stderr
    assert error.count("warning: the answer is not shown: the model generated a token") == 1
    assert (tmp_path / "b.run/state.npz").exists()  # training goes on
