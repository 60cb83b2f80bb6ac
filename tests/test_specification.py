"""The specification's own example commands, other tools' adapters, every kind of quantization."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import models
import tiny
import train_lora
from conftest import ROOT, TEXTS
from lora_finetune.adapters import export, mlx_lm
from lora_finetune.model_folder.targets import layer_paths

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

PHI3 = {
    **{"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 64},
    **{"num_hidden_layers": 10, "intermediate_size": 128, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-5, "vocab_size": 320},
    **{"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    **{"rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047},
    **{"tie_word_embeddings": False, "attention_bias": False, "partial_rotary_factor": 1.0},
}

TRAINING_RUN = """
python lora_finetune/train_lora.py \
    --model "mlx-community/Phi-3-mini-4k-instruct-8bit" \
    --train \
    --data "lora_finetune/data" \
    --epochs 3 \
    --batch-size 4 \
    --learning-rate 1e-5 \
    --lora-layers 8 \
    --adapter-file "lora_finetune/my_model_adapters.npz" \
    --test
"""

GENERATION_RUN = """
python lora_finetune/train_lora.py \
    --model "mlx-community/Phi-3-mini-4k-instruct-8bit" \
    --adapter-file "lora_finetune/my_model_adapters.npz" \
    --prompt "What is the capital of France?" \
    --max-tokens 50
"""


def test_the_example_commands_run_as_they_stand(tmp_path: Path):
    """In a copy of the project, with a small 8-bit Phi-3 where the repository's name points."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("lora_finetune/**/*.py")]:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for split, texts in TEXTS.items():
        tiny.write_jsonl(tmp_path / "lora_finetune/data", split, texts[:7])
    tiny.make_model(tmp_path / "mlx-community/Phi-3-mini-4k-instruct-8bit", bits=8, **PHI3)

    trained, generated = (
        subprocess.run(
            [sys.executable, *shlex.split(command)[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        for command in (TRAINING_RUN, GENERATION_RUN)
    )

    assert trained.returncode == 0, trained.stderr
    assert "Iter 6: Val loss" in trained.stdout  # 7 texts in batches of 4, 3 times
    assert "Test loss" in trained.stdout
    assert generated.returncode == 0, generated.stderr
    assert "What is the capital of France?" in generated.stdout
    with np.load(tmp_path / "lora_finetune/my_model_adapters.npz") as adapter:
        assert set(adapter) == {
            f"model.layers.{layer}.self_attn.qkv_proj.{part}.lora_{x}"
            for layer in range(2, 10)
            for part in "qv"
            for x in "ab"
        }


MLX_LM = {
    "rank": 8,
    "scale": 20.0,
    "dropout": 0.0,
    "keys": ["self_attn.q_proj", "self_attn.v_proj"],
}
TOKENS = mx.array([[72, 101, 108, 108, 111, 10]])


def test_an_adapter_of_mlx_lm_loads_here(tmp_path: Path):
    """Made by a real run of `mlx_lm.lora`."""
    folder = tiny.make_model(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "data", "train", TEXTS["train"])
    (tmp_path / "config.yaml").write_text(json.dumps({"lora_parameters": MLX_LM}))
    subprocess.run(
        [sys.executable, "-m", "mlx_lm", "lora", "--train", "--model", folder]
        + ["--data", tmp_path / "data", "--adapter-path", tmp_path, "--num-layers", "2"]
        + ["--iters", "3", "--learning-rate", "1e-2", "--config", tmp_path / "config.yaml"],
        check=True,
        capture_output=True,
    )

    ours, _ = models.load(str(folder))
    fresh = np.array(ours(TOKENS))
    tiny.put_adapter(tmp_path, ours)
    theirs = load_adapters(models.load(str(folder))[0], str(tmp_path))
    theirs.eval()
    np.testing.assert_allclose(np.array(ours(TOKENS)), np.array(theirs(TOKENS)), atol=1e-5)
    assert not np.allclose(np.array(ours(TOKENS)), fresh, atol=1e-3)


def test_an_adapter_from_here_loads_in_mlx_lm(tmp_path: Path):
    folder = tiny.make_model(tmp_path / "model")
    ours, _ = models.load(str(folder))
    models.add_lora(ours, dict.fromkeys(models.find_targets(ours, 2), 8))
    for name, array in tree_flatten(ours.trainable_parameters()):
        ours.load_weights([(name, mx.random.normal(array.shape, scale=0.1))], strict=False)
    mlx_lm.write(tmp_path, export.whole_pairs(ours), layer_paths(ours), str(folder))

    theirs = load_adapters(models.load(str(folder))[0], str(tmp_path))
    theirs.eval()
    np.testing.assert_allclose(np.array(ours(TOKENS)), np.array(theirs(TOKENS)), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [
        *(("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
        *[("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
    ],
)
def test_every_quantized_base_is_loaded_and_adapted(
    tmp_path: Path, mode: str, bits: int, group_size: int
):
    """On the CPU it is computed with in float32; the numbers are those of the quantized layers."""
    config = tiny.LLAMA | {"hidden_size": 128, "vocab_size": 320}
    quantization = {"mode": mode, "bits": bits, "group_size": group_size}
    mx.random.seed(0)
    model = tiny.build_model(config)
    nn.quantize(model, **quantization)
    folder = tiny.write_model(tmp_path / "model", model, config | {"quantization": quantization})
    loaded, _ = models.load(str(folder))
    np.testing.assert_allclose(np.array(loaded(TOKENS)), np.array(model(TOKENS)), atol=2e-4)
    for base in (model, loaded):
        models.add_lora(base, dict.fromkeys(models.find_targets(base, 2), 8))
        assert models.count_trainable(base) == 2 * 8 * ((128 + 128) + (128 + 64))
    np.testing.assert_allclose(np.array(loaded(TOKENS)), np.array(model(TOKENS)), atol=2e-4)


def test_a_base_of_mixed_bits_is_loaded_and_adapted(tmp_path: Path):
    mx.random.seed(0)
    model = tiny.build_model(tiny.LLAMA)
    eight = {"group_size": 32, "bits": 8}
    mixed = {"model.layers.3.self_attn.q_proj": eight, "model.layers.2.self_attn.v_proj": False}
    quantization = {"group_size": 64, "bits": 4}
    nn.quantize(
        model,
        **quantization,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and mixed.get(path, True),
    )
    config = tiny.LLAMA | {"quantization": quantization | mixed}
    folder = tiny.write_model(tmp_path / "model", model, config)
    loaded, _ = models.load(str(folder))
    for base in (model, loaded):
        models.add_lora(base, dict.fromkeys(models.find_targets(base, 2), 8))
        assert models.count_trainable(base) == 2 * 8 * ((64 + 64) + (64 + 32))
    np.testing.assert_allclose(np.array(loaded(TOKENS)), np.array(model(TOKENS)), atol=2e-4)


def test_help_has_a_line_for_each_flag_in_the_order_of_a_run() -> None:
    text = train_lora.build_parser().format_help()
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"^ {6,}\S", text, re.MULTILINE), "a help that goes on in a second line"
    sections = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    order = ["what to do", "model and texts", "training", "test", "generation", "more options"]
    assert sections == ["options", *order]
