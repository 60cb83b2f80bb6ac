"""A run whose processes each hold a part of the model (--shard)."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import background
import tiny
from conftest import Run, one_error
from lora_finetune.base import memory
from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches.loading import load_as_stored
from lora_finetune.model_folder import files
from lora_finetune.training import shard
from lora_finetune.training.distributed import Group
from test_distributed import (
    LONG,
    SETTINGS,
    assert_equal_to_rounding,
    assert_saved_whole,
    join,
    launch,
    printed,
    wait_for_iteration,
    write_hosts,
)

import mlx.core as mx
import numpy as np
import pytest

QWEN3_MOE = tiny.QWEN2_MOE | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
PHI3 = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": tiny.PAD}
PHI3 |= {"original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("size", "bits", "config"), [(3, None, {}), (2, None, QWEN3_MOE), (2, 4, PHI3)]
)
def test_the_result_is_that_of_one_process_which_can_go_on(
    data: Path, tmp_path: Path, size: int, bits: int | None, config: dict
) -> None:
    """Numbers of weights do not divide by three. The last batch has a single text."""
    model = tiny.make_model(tmp_path / "model", bits=bits, **config)
    args = ["--train", "--model", model, "--data", data, "--adapter-file", "a.npz", *SETTINGS]
    prompt = ["--test", "--prompt", "질문: 1?", "--max-tokens", 9]
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    process = background.start(alone, *args, *prompt, "--iters", 13)
    assert join(launch(together, size, *args, "--iters", 12, "--shard")) == [0] * size
    process.join()
    resume = ["--iters", 13, "--resume-adapter-file", "a.npz", "--shard"]
    assert join(launch(together, 2, *args, *prompt, *resume)) == [0] * 2
    assert_equal_to_rounding(together, alone)
    said = [(alone / "out").read_text(), (together / "out.0").read_text()]
    texts = [re.search("Generating\n(.*)\n=====", text, re.S)[1] for text in said]
    assert texts[0] == texts[1]
    assert said[1].count(": Answer: ") == 1  # of the last iteration
    assert not (together / "out.1").read_text()
    assert not any("settings" in line for line in printed(together, "err")[0])


# --- The parts ----------------------------------------------------------------------------------


def compute_logits(folder: Path, model: Path, rank: int) -> None:
    """Be one of two processes with a part of a model; save its logits, and the bytes it takes."""
    before = mx.get_active_memory()
    os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=str(folder / "hosts"))
    group = Group()
    group.connect()
    group.share_weights()
    whole, _, _ = load_as_stored(model)
    shard.share_out(whole, group, {})
    logits = group.compute(whole, mx.arange(20)[None])
    mx.eval(logits)
    np.savez(folder / f"{rank}.npz", logits=logits, bytes=mx.get_active_memory() - before)


@pytest.mark.parametrize("config", [{}, QWEN3_MOE])
def test_packed_weights_are_shared_out_as_they_are(tmp_path: Path, config: dict) -> None:
    model = tiny.make_model(tmp_path / "model", bits=4, **config | {"hidden_size": 256})
    write_hosts(tmp_path, 2)
    processes = [
        background.CONTEXT.Process(target=compute_logits, args=(tmp_path, model, rank))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    whole, _, _ = load_as_stored(model)
    expected = np.array(whole(mx.arange(20)[None]))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    join(processes)
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            np.testing.assert_array_equal(found["logits"], expected)
            assert found["bytes"] < 0.6 * size


# --- How they end -------------------------------------------------------------------------------


def test_where_one_is_killed_the_others_save_and_end_when_the_launcher_asks(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """MLX may wait for ever for weights of the one that is gone."""
    args = ["--train", "--model", model, "--data", data, "--adapter-file", "a.npz", *SETTINGS]
    processes = launch(tmp_path, 3, *args, *LONG, "--shard", wait_at_end=2.0)
    wait_for_iteration(tmp_path, processes, random.Random(0))
    processes[1].kill()
    time.sleep(1)
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
    assert join(processes, 10) == [2, -signal.SIGKILL, 2]
    [line] = [line for line in printed(tmp_path, "err")[0] if line.startswith("error: ")]
    assert f"iteration {assert_saved_whole(tmp_path)} is saved" in line


# --- What is said -------------------------------------------------------------------------------


def test_merging_is_refused_before_training(call: Run, tmp_path: Path) -> None:
    ended = call("--train", "--shard", "--export", "merged", tmp_path / "merged")
    one_error(ended, "--export", "merged", "without --shard")


def test_memory_is_checked_for_the_part_and_the_error_names_the_flag(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "processes", 4)
    size = 2 * memory.available()
    with pytest.raises(UserError, match="add --shard"):
        files.check_memory(model, size=size)
    monkeypatch.setattr(memory, "num_parts", 4)
    files.check_memory(model, size=size)
    with pytest.raises(UserError, match="GB in each process") as error:
        files.check_memory(model, size=8 * size)
    assert "add --shard" not in str(error.value)
