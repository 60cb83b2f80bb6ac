"""A folder that transformers 5 saved is the model that PyTorch computes from it.

reference/transformers5.json has configurations, the names and shapes of their weights, and the
losses of PyTorch; reference/make_transformers5.py makes it, and says what it holds.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import models
import tiny
from lora_finetune.base.errors import UserError
from lora_finetune.model_folder.config import in_mlx_words
from test_models import ARCHITECTURES

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy

REFERENCE = json.loads((Path(__file__).parent / "reference/transformers5.json").read_text("utf-8"))
TOKENS = np.random.RandomState(5).randint(3, 500, (1, 160))


def numbers(name: str, shape: list[int]) -> np.ndarray:
    """The numbers of an array, as reference/make_transformers5.py makes them."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if len(shape) < 2 or "A_log" in name or "dt_bias" in name:
        return np.asarray(1 + 0.2 * random.standard_normal(shape), np.float32)
    gain = 2.0 if any(part in name for part in ("q_", "k_", "qkv", "query", "c_attn")) else 1.0
    fan = min(shape[-2:]) if len(shape) > 2 and shape[-2] > 1 else shape[-1]
    scale = 1.0 if "embed" in name or "wte" in name or "wpe" in name else gain / fan**0.5
    return np.asarray(scale * random.standard_normal(shape), np.float32)


def write_folder(folder: Path, entry: dict, **settings: object) -> Path:
    """The folder of a reference model, its configuration with other settings."""
    folder.mkdir()
    arrays = {name: numbers(name, shape) for name, shape in entry["shapes"].items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(entry["config"] | settings))
    tiny.build_tokenizer(appends_eos=False).save(str(folder / "tokenizer.json"))
    return folder


def loss_and_logits(folder: Path) -> tuple[float, np.ndarray]:
    """The mean loss on TOKENS, and the logits of the last of them."""
    model, _ = models.load(folder)
    logits = np.array(model(mx.array(TOKENS))[0].astype(mx.float32), np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=-1))
    return (log_sums[:-1] - shifted[np.arange(159), TOKENS[0, 1:]]).mean(), logits[-1]


@pytest.mark.parametrize("name", REFERENCE)
def test_a_folder_of_transformers_5_is_the_model_that_pytorch_computes(name: str, tmp_path: Path):
    entry = REFERENCE[name]
    loss, last = loss_and_logits(write_folder(tmp_path / "model", entry))
    assert loss == pytest.approx(entry["loss"], abs=1e-3)
    np.testing.assert_allclose(last[:16], entry["last"], atol=1e-3 * max(1, np.abs(last).max()))


def test_the_file_of_the_folder_is_not_changed(tmp_path: Path):
    folder = write_folder(tmp_path / "model", REFERENCE["llama"])
    before = (folder / "config.json").read_bytes()
    models.load(folder)
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", [n for n, entry in ARCHITECTURES.items() if "config" in entry])
def test_configurations_in_older_words_are_left_alone(name: str):
    config = ARCHITECTURES[name]["config"] | {"model_type": name}
    if "rope_parameters" not in json.dumps(config):
        assert in_mlx_words(config) is config


def test_rope_parameters_win_over_what_stands_beside_them():
    config = REFERENCE["llama"]["config"] | {"rope_theta": 3.0}
    assert in_mlx_words(config)["rope_theta"] == 20011.0


def test_layers_whose_kinds_mlx_lm_cannot_tell_apart_are_an_error(tmp_path: Path):
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    entry = REFERENCE["gemma3_text+pattern"]
    folder = write_folder(tmp_path / "model", entry, layer_types=kinds)
    with pytest.raises(UserError, match="layer_types do not repeat"):
        models.load(folder)


@pytest.mark.parametrize("tied", [True, None])
def test_a_head_of_its_own_counts_whatever_the_configuration_says(tied: bool, tmp_path: Path):
    """As in transformers 5; mlx-lm would leave it out."""
    entry = REFERENCE["llama"]
    folder = write_folder(tmp_path / "model", entry, tie_word_embeddings=tied)
    if tied is None:
        config = {k: v for k, v in entry["config"].items() if k != "tie_word_embeddings"}
        (folder / "config.json").write_text(json.dumps(config))
    assert loss_and_logits(folder)[0] == pytest.approx(entry["loss"], abs=1e-3)


def test_a_head_that_is_the_embedding_is_no_head_of_its_own(tmp_path: Path):
    folder = write_folder(tmp_path / "model", REFERENCE["llama+tied"])
    expected = loss_and_logits(folder)[0]
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    model, _ = models.load(folder)
    assert "lm_head" not in model
    assert loss_and_logits(folder)[0] == expected


def change(folder: Path, ending: str, made_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the arrays of a folder whose names end so."""
    file = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    changed = {name: made_of(array) for name, array in arrays.items() if name.endswith(ending)}
    assert changed
    safetensors.numpy.save_file(arrays | changed, file)


def test_a_number_added_to_all_routing_biases_changes_no_choice(tmp_path: Path):
    """mlx-lm would choose out of other groups where the biases are negative."""
    entry = REFERENCE["deepseek_v3"]
    folder = write_folder(tmp_path / "model", entry)
    change(folder, "e_score_correction_bias", lambda bias: bias - 4)
    assert loss_and_logits(folder)[0] == pytest.approx(entry["loss"], abs=1e-3)


def test_minimax_m2_is_the_same_under_its_older_name(tmp_path: Path):
    entry = REFERENCE["minimax_m2"]
    folder = write_folder(tmp_path / "model", entry, model_type="minimax")
    assert loss_and_logits(folder)[0] == pytest.approx(entry["loss"], abs=1e-3)


def test_a_head_that_mlx_lm_has_no_place_for_is_named(tmp_path: Path):
    folder = write_folder(tmp_path / "model", REFERENCE["cohere2"])
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"][::-1].copy()
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    with pytest.raises(UserError, match="an lm_head that differs from the embedding"):
        models.load(folder)
