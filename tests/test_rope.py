"""Positions are computed as PyTorch computes them, whatever scaling a model's config.json asks for.

The frequencies and factors are those of transformers' own functions (ROPE_INIT_FUNCTIONS, 5.24).
"""

import itertools
import json
from pathlib import Path

import models
import tiny
from lora_finetune.mlx_patches import rope
from lora_finetune.mlx_patches.loading import load_as_stored
from lora_finetune.mlx_patches.modules import checkpoint_layers
from lora_finetune.training import losses
from lora_finetune.training import step as training_step

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

ORIGINAL = {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0} | ORIGINAL
LLAMA3 = {"rope_type": "llama3", "factor": 8.0} | ORIGINAL
LLAMA3 |= {"high_freq_factor": 4.0, "low_freq_factor": 1.0}
LONGROPE = {"rope_type": "longrope", "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8]} | ORIGINAL
LONGROPE["short_factor"] = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
LINEAR, DYNAMIC = ({"rope_type": name, "factor": 4.0} for name in ("linear", "dynamic"))
PLAIN = [1, 0.316228, 0.1, 0.0316228, 0.01, 0.00316228, 0.001, 0.000316228]
SLOW = [0.00790569, 0.0025, 0.000790569, 0.00025, 7.90569e-05]
SHORT = [1, 0.28748, 0.0833333, 0.0243252, 0.00714286, 0.00210819, 0.000625, 0.000186016]
LONG = [1, 0.158114, 0.0333333, 0.00790569, 0.002, 0.000527046, 0.000142857, 3.95285e-05]
# Settings, the length of the text, frequencies and the factor, for 16 dimensions and 256 positions.
REFERENCE = {
    "none": ({"rope_type": "default"}, 160, PLAIN, 1),
    "linear": (LINEAR, 160, [0.25, 0.0790569, 0.025, *SLOW], 1),
    "dynamic": (DYNAMIC, 160, PLAIN, 1),
    "dynamic, long": (
        DYNAMIC, 400,
        [1, 0.267223, 0.0714081, 0.0190819, 0.00509912, 0.0013626, 0.000364119, 9.73009e-05], 1,
    ),
    "yarn": (YARN, 160, [1, 0.237171, 0.05, *SLOW], 1.138629),
    "yarn, factor": (YARN | {"attention_factor": 0.8}, 160, [1, 0.237171, 0.05, *SLOW], 0.8),
    "yarn, not truncated": (
        YARN | {"truncate": False, "beta_fast": 8.0}, 160,
        [1, 0.212469, 0.0256644, *SLOW], 1.138629,
    ),
    "yarn, mscale": (
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}, 160, [1, 0.237171, 0.05, *SLOW], 0.951885,
    ),
    "longrope": (LONGROPE, 65, LONG, 1.154701),
    "longrope, short": (LONGROPE | {"attention_factor": 1.2}, 64, SHORT, 1.2),
    "llama3": (
        LLAMA3, 160,
        [1, 0.244385, 0.0130423, 0.00395285, 0.00125, 0.000395285, 0.000125, 3.95285e-05], 1,
    ),
    "proportional": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.25}, 160,
        [1, 0.316228, 0, 0, 0, 0, 0, 0], 1,
    ),
    "half of the head": (
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, 160,
        [0.5, 0.05, 0.005, 0.0005], 1,
    ),
    "a share that Llama's model does not read": (
        {"rope_type": "default", "partial_rotary_factor": 0.5}, 160,
        [1, 0.316228, 0.1, 0.0316228, 0.01, 0.00316228, 0.001, 0.000316228], 1,
    ),
}  # fmt: skip


def load(folder: Path, parameters: dict | None = None, **changes: object) -> nn.Module:
    """A tiny model whose config.json asks for a rope in the words of transformers 5."""
    tiny.make_model(folder, **{"max_position_embeddings": 256, "num_hidden_layers": 2} | changes)
    if parameters:
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_theta": 10000.0} | parameters
        (folder / "config.json").write_text(json.dumps(config))
    model = load_as_stored(folder)[0]
    model.set_dtype(mx.float32)
    return model


def turn(x: np.ndarray, frequencies: list[float], factor: float, traditional: bool) -> np.ndarray:
    """What a rotation by hand makes of vectors (length, size)."""
    result, dims = x.copy(), 2 * len(frequencies)
    for pair, frequency in enumerate(frequencies):
        i, j = (2 * pair, 2 * pair + 1) if traditional else (pair, pair + dims // 2)
        turned = (x[:, i] + 1j * x[:, j]) * np.exp(1j * frequency * np.arange(len(x)))
        result[:, i], result[:, j] = turned.real, turned.imag
    result[:, :dims] *= factor
    return result


# A model of mlx-lm that looks at no scaling, one that refuses all but linear ones, and neighbours
# as pairs.
KINDS = {
    "looks at none": {"model_type": "mixtral", "num_local_experts": 2, "head_dim": 16},
    "refuses": tiny.QWEN2_MOE,
    "pairs of neighbours": {"model_type": "cohere", "layer_norm_eps": 1e-5, "head_dim": 16},
}


@pytest.mark.parametrize(
    ("case", "kind"), list(zip(REFERENCE, itertools.cycle(KINDS), strict=False)), ids=REFERENCE
)
def test_a_scaling_is_the_one_that_transformers_computes(tmp_path: Path, case: str, kind: str):
    parameters, length, frequencies, factor = REFERENCE[case]
    attention = (
        load(tmp_path / "model", parameters, **KINDS[kind], num_hidden_layers=1).layers[0].self_attn
    )
    x = np.random.RandomState(0).randn(length, 16)
    found = np.array(attention.rope(mx.array(x, mx.float32)[None, None]))[0, 0]
    expected = turn(x, frequencies, factor, traditional=kind == "pairs of neighbours")
    assert np.abs(found - expected).max() < 1e-3


def test_without_a_scaling_the_rope_is_mlx_s_own(tmp_path: Path):
    for number, parameters in enumerate([None, {"rope_type": "default"}]):
        model = load(tmp_path / str(number), parameters)
        assert [type(layer.self_attn.rope) for layer in model.layers] == [nn.RoPE] * 2


def test_a_scaling_in_older_words_is_the_same(tmp_path: Path):
    found = []
    for number, (old, new) in enumerate([(None, YARN), ({"type": "yarn", "factor": 4.0}, None)]):
        scaling = old and old | ORIGINAL
        rotary = load(tmp_path / str(number), new, rope_scaling=scaling).layers[0].self_attn.rope
        found.append(rotary(mx.ones((1, 1, 9, 16))))
    assert mx.array_equal(*found)


def test_layers_without_positions_stay_so_and_each_kind_has_its_own(tmp_path: Path):
    smollm3 = load(
        tmp_path / "a", YARN | {"attention_factor": 0.5}, model_type="smollm3", num_hidden_layers=4
    )
    x = mx.random.normal((1, 1, 9, 16))
    unchanged = [mx.allclose(x, layer.self_attn.rope(x)).item() for layer in smollm3.layers]
    assert unchanged == [False, False, False, True]
    kinds = {"full_attention": YARN | {"attention_factor": 0.5}, "sliding_attention": LINEAR}
    kinds = {kind: {"rope_theta": 10000.0} | each for kind, each in kinds.items()}
    olmo3 = load(
        tmp_path / "b", kinds, model_type="olmo3", sliding_window=32, head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    for layer, (frequencies, factor) in zip(
        olmo3.layers, [(REFERENCE["linear"][2], 1), (REFERENCE["yarn"][2], 0.5)], strict=True
    ):
        found = layer.self_attn.rope(x)[0, 0]
        expected = turn(np.array(x[0, 0], np.float64), frequencies, factor, False)
        assert np.abs(np.array(found) - expected).max() < 1e-4


def sharp(model: nn.Module) -> nn.Module:
    """With queries and keys so large that attention looks at single tokens."""
    for layer in model.layers:
        layer.self_attn.q_proj.weight *= 8
        layer.self_attn.k_proj.weight *= 8
    return model


@pytest.mark.parametrize("parameters", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_a_text_is_computed_as_alone_beside_longer_ones(tmp_path: Path, parameters: dict):
    """Its own length counts, not the padding: in the loss and in the gradients."""
    model = sharp(load(tmp_path / "model", parameters, max_position_embeddings=64))
    models.add_lora(model, {"model.layers.0.self_attn.q_proj": 4})
    checkpoint_layers(model)  # which compute the layers once more, when the loss is done
    model.layers[0].self_attn.q_proj.lora_b = mx.random.normal((4, 64))
    long, short = mx.random.randint(3, 250, (1, 100)), mx.random.randint(3, 250, (1, 50))
    padded = mx.pad(short, [(0, 0), (0, 50)])
    is_text = mx.arange(100) < mx.array([[100], [50]])
    trainable = model.trainable_parameters()
    alone = []
    for text in (long, short):
        with rope.text_lengths(text.shape[1]):
            total_of = nn.value_and_grad(model, lambda text: losses.loss(model, text, text >= 0)[0])
            alone.append(total_of(text))
    batch = np.array(mx.concatenate([long, padded])), np.array(is_text)
    gradients_of = training_step.make_gradients(model, losses.loss)
    total, gradient = gradients_of(training_step.joined(trainable), *batch)
    gradients = training_step.parted(gradient, trainable)
    model.update(trainable)
    assert total.item() == pytest.approx(sum(each.item() for each, _ in alone), abs=1e-3)
    found, *expected = (g["model"]["layers"][0] for g in (gradients, *(g for _, g in alone)))
    found, *expected = (g["self_attn"]["q_proj"]["lora_a"] for g in (found, *expected))
    assert mx.allclose(found, sum(expected), rtol=1e-3, atol=1e-2)
    assert mx.abs(found).max().item() > 10
    as_long = losses.loss(model, padded, is_text[1:])[0]  # what the width of a batch would make
    assert abs(as_long.item() - alone[1][0].item()) > 0.01


@pytest.mark.parametrize("case", ["yarn, factor", "longrope", "longrope, short", "dynamic, long"])
def test_generation_computes_what_one_pass_does(tmp_path: Path, case: str):
    """Also where a long prompt goes in piece by piece, the first of which is short by itself."""
    model = sharp(load(tmp_path / "model", REFERENCE[case][0], max_position_embeddings=64))
    length = 60 if "short" in case else 100
    tokens = mx.random.randint(3, 250, (length,))
    whole = nn.log_softmax(model(tokens[None])[0, -1])
    with rope.text_lengths(length):
        _, found = next(generate_step(tokens, model, prefill_step_size=32, max_tokens=1))
    assert mx.allclose(found, whole, atol=1e-4)
    batch, cache = mx.stack([tokens, tokens[::-1]]), make_prompt_cache(model)
    with rope.text_lengths(length):
        model(batch[:, : length // 2], cache=cache)
        rest = model(batch[:, length // 2 :], cache=cache)
    assert mx.allclose(rest, model(batch)[:, length // 2 :], atol=1e-3)


def test_offsets_of_each_text_are_taken_as_well(tmp_path: Path):
    """As the caches of batches give them, and under mx.compile."""
    settings = YARN | {"rope_theta": 1e4, "attention_factor": 1.5}
    module = rope.Rope(rope.Rotary(settings, 16, 256), traditional=False)
    x = mx.random.normal((2, 3, 4, 24))  # the last eight of a head do not turn
    found = mx.compile(module)(x, mx.array([70, 5]))
    expected = [module(x[i : i + 1], offset) for i, offset in enumerate((70, 5))]
    assert mx.allclose(found, mx.concatenate(expected), atol=1e-5)
    assert mx.array_equal(found[..., 16:], x[..., 16:])
    assert not module.parameters()
    assert module(x.astype(mx.bfloat16), 70).dtype == mx.bfloat16


def test_attention_with_latent_keys_is_scaled_too(tmp_path: Path):
    """DeepSeek's: mscale_all_dim is in the scores; its pairs are neighbours in longrope too."""
    settings = {
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "kv_lora_rank": 16,
        "v_head_dim": 16,
    }
    settings |= {"q_lora_rank": None, "first_k_dense_replace": 4, "n_routed_experts": 2}
    parameters = LONGROPE | {"factor": 4.0, "mscale_all_dim": 1.1}
    model = load(tmp_path / "model", parameters, model_type="deepseek_v3", **settings)
    attention = model.layers[0].self_attn
    assert attention.scale == pytest.approx(32**-0.5 * (0.11 * np.log(4) + 1) ** 2)
    x = mx.random.normal((1, 1, 100, 16))
    expected = turn(np.array(x[0, 0], np.float64), LONG, 1.154701, traditional=True)
    assert np.abs(np.array(attention.rope(x))[0, 0] - expected).max() < 1e-3


def test_a_scaling_that_cannot_be_put_into_a_model_is_told(tmp_path: Path, capfd):
    """nanochat rotates by a function, and not by a module of its own."""
    for parameters in ({"rope_type": "default"}, LINEAR):
        load(tmp_path / parameters["rope_type"], parameters, model_type="nanochat")
        told = "rope_type of its config.json (linear)" in capfd.readouterr().err
        assert told == (parameters is LINEAR)


def test_a_scaling_that_is_not_known_is_an_error_that_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="spiral"):
        load(tmp_path / "model", {"rope_type": "spiral"})(mx.array([[1, 2]]))
