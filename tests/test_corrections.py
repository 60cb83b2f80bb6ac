"""A model is what PyTorch computes from its folder, or the difference is told."""

import json
from pathlib import Path

import models
import tiny
from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches import patches
from lora_finetune.training import losses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

ARCHITECTURES = json.loads((Path(__file__).parent / "architectures.json").read_text("utf-8"))
TOKENS = mx.array(np.random.default_rng(0).integers(3, 120, (1, 40)))


def load(folder: Path, model_type: str, **settings: object) -> nn.Module:
    """A model of an architecture with these settings, written to a folder and loaded from it."""
    config = ARCHITECTURES[model_type]["config"] | settings
    mx.random.seed(0)
    model = tiny.build_model(config | {"model_type": model_type})
    return models.load(tiny.write_model(folder / "model", model, config | LENGTH))[0]


LENGTH = {"max_position_embeddings": 512}


def last_logits(model: nn.Module, tokens: mx.array) -> np.ndarray:
    return np.array(model(tokens)[0, -1])


# --- Windows ------------------------------------------------------------------------------------

WINDOWED = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
    "gemma2": {"layer_types": ["sliding_attention"] * 4},
    "starcoder2": {},
    "phi3": {},
}


@pytest.mark.parametrize("model_type", WINDOWED)
def test_a_window_of_the_configuration_is_computed(tmp_path: Path, model_type: str) -> None:
    """Through four layers with a window of 6, a token reaches 4 · 5 tokens far and no further."""
    model = load(tmp_path, model_type, sliding_window=6, **WINDOWED[model_type])
    far, near = TOKENS + 0, TOKENS + 0
    far[0, 18], near[0, 19] = 1, 1
    expected = last_logits(model, TOKENS)
    assert np.array_equal(last_logits(model, far), expected)
    assert not np.array_equal(last_logits(model, near), expected)


def test_a_window_is_in_its_layers_alone(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    settings = {"use_sliding_window": True, "sliding_window": 6, "layer_types": kinds}
    model, far = load(tmp_path, "qwen3", **settings), TOKENS + 0
    far[0, 3] = 1
    assert not np.array_equal(last_logits(model, far), last_logits(model, TOKENS))
    attentions = [layer.self_attn for layer in model.layers]
    x, other = mx.random.normal((1, 40, 64)), mx.random.normal((1, 40, 64))
    other[:, 34:] = x[:, 34:]
    same = [mx.array_equal(a(x, "causal")[:, -1], a(other, "causal")[:, -1]) for a in attentions]
    assert [bool(each) for each in same] == ["sliding" in kind for kind in kinds]


@pytest.mark.parametrize("model_type", WINDOWED)
def test_generation_and_training_have_the_same_window(tmp_path: Path, model_type: str) -> None:
    model = load(tmp_path, model_type, sliding_window=6, **WINDOWED[model_type])
    cache, expected = make_prompt_cache(model), last_logits(model, TOKENS)
    model(TOKENS[:, :30], cache=cache)
    for i in range(30, 40):
        logits = model(TOKENS[:, i : i + 1], cache=cache)
    assert np.allclose(np.array(logits[0, -1]), expected, atol=1e-4)
    with patches.applied():
        compiled = mx.compile(lambda tokens: model(tokens))
        assert np.allclose(np.array(compiled(TOKENS)[0, -1]), expected, atol=1e-4)


# --- What the configuration names ---------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "starcoder2", "mixtral"])
def test_the_activation_is_the_one_that_is_named(tmp_path: Path, model_type: str, capfd) -> None:
    """Of GELU and its form with tanh the difference is small, and of SiLU it is not."""
    found = {}
    for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        model = load(tmp_path / name, model_type, hidden_act=name)
        layer, x = model.layers[0], mx.random.normal((1, 5, 64), key=mx.random.key(0))
        mlp = layer.mlp if "mlp" in layer else layer.block_sparse_moe
        found[name] = np.array(mlp(x))
        if model_type == "llama":
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
            by_hand = {
                "silu": gate / (1 + mx.exp(-gate)),
                "gelu": gate * (1 + mx.erf(gate / 2**0.5)) / 2,
                "gelu_pytorch_tanh": gate
                * (1 + mx.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
                / 2,
                "relu": mx.maximum(gate, 0),
            }
            expected = np.array(mlp.down_proj(by_hand[name] * up))
            assert np.allclose(found[name], expected, atol=1e-6)
    size = np.abs(found["gelu"]).max()
    assert 0 < np.abs(found["gelu"] - found["gelu_pytorch_tanh"]).max() < 2e-3 * size
    assert np.abs(found["gelu"] - found["silu"]).max() > 2e-2 * size
    assert "does not know" not in capfd.readouterr().err


def test_a_bias_in_the_folder_is_one_in_the_model(tmp_path: Path) -> None:
    """transformers' attention_bias, which mlx-lm's qwen3 does not know."""
    config = ARCHITECTURES["qwen3"]["config"] | LENGTH | {"attention_bias": True}
    mx.random.seed(0)
    model = tiny.build_model(config)
    for layer in model.layers:
        layer.self_attn.q_proj.bias = mx.random.normal((64,))
    loaded = models.load(tiny.write_model(tmp_path / "model", model, config))[0]
    assert np.allclose(last_logits(loaded, TOKENS), last_logits(model, TOKENS), atol=1e-5)


def test_an_output_layer_that_is_tied_is_the_embedding(tmp_path: Path) -> None:
    """mlx-lm's glm4 has one of its own."""
    config = ARCHITECTURES["glm4"]["config"] | LENGTH | {"tie_word_embeddings": True}
    mx.random.seed(0)
    model = tiny.build_model(config)
    model.lm_head.weight = model.model.embed_tokens.weight
    expected = last_logits(model, TOKENS)
    del model["lm_head"]
    loaded = models.load(tiny.write_model(tmp_path / "model", model, config))[0]
    assert np.allclose(last_logits(loaded, TOKENS), expected, atol=1e-5)


# --- By family ----------------------------------------------------------------------------------


def test_gemma_3n_is_trained_as_it_generates(tmp_path: Path) -> None:
    """Layers that share keys and values share them without a cache, with gradients through them."""
    model = load(tmp_path, "gemma3n")
    targets = mx.ones(TOKENS.shape, mx.bool_)
    without, number = losses.loss(model, TOKENS, targets)
    logits = model(TOKENS[:, :-1], cache=make_prompt_cache(model))
    expected = nn.losses.cross_entropy(logits, TOKENS[:, 1:]).mean()
    assert abs((without / number - expected).item()) < 1e-5

    def loss_of(scale: mx.array) -> mx.array:
        keys = model.layers[3].self_attn.k_norm  # the last layer of its own kind that has keys
        weight = keys.weight
        keys.weight = weight * scale
        try:
            return losses.loss(model, TOKENS, targets)[0]
        finally:
            keys.weight = weight

    step = 1e-2
    slope = (loss_of(mx.array(1 + step)) - loss_of(mx.array(1 - step))).item() / (2 * step)
    assert np.isclose(mx.grad(loss_of)(mx.array(1.0)).item(), slope, rtol=2e-2)


def test_the_routing_bias_of_ernie_chooses_experts(tmp_path: Path) -> None:
    """It is in the folder under its own name, and adds nothing to the scores."""
    config = ARCHITECTURES["ernie4_5_moe"]["config"] | LENGTH
    mx.random.seed(0)
    model = tiny.build_model(config)
    for layer in model.layers[2:]:
        layer.mlp.moe_statics = nn.Module()
        layer.mlp.moe_statics.e_score_correction_bias = mx.array([[0.0, 9.0, 0.0, 9.0]])
    loaded = models.load(tiny.write_model(tmp_path / "model", model, config))[0]
    x = mx.random.normal((1, 3, 64))
    routed = loaded.layers[2].mlp
    scores = mx.softmax(routed.gate(x), axis=-1)[..., 1::2]
    chosen = mx.broadcast_to(mx.array([1, 3]), (1, 3, 2))
    y = routed.switch_mlp(x, chosen) * (scores / scores.sum(-1, keepdims=True))[..., None]
    expected = y.sum(-2) + routed.shared_experts(x)
    assert np.allclose(np.array(routed(x)), np.array(expected), atol=1e-6)


def test_a_folder_of_ernie_without_the_routing_bias_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lack the biases of its routers"):
        load(tmp_path, "ernie4_5_moe")


def test_jamba_scores_its_experts_among_all(tmp_path: Path) -> None:
    model = load(tmp_path, "jamba")
    routed = next(layer.feed_forward for layer in model.layers if "router" in layer.feed_forward)
    routed.router.weight = mx.zeros_like(routed.router.weight)
    routed.router.weight[:2] = 1
    x = mx.full((1, 1, 64), 1 / 64)  # scores e, e, 1, 1
    y = routed.switch_mlp(x, mx.array([[[0, 1]]])).sum(-2) * (np.e / (2 * np.e + 2))
    assert np.allclose(np.array(routed(x)), np.array(y), atol=1e-7)


@pytest.mark.parametrize(
    ("model_type", "groups", "settings"),
    [("mamba2", "n_groups", {}), ("falcon_h1", "mamba_n_groups", {"mamba_rms_norm": True})],
)
def test_channels_are_normed_by_groups(
    tmp_path: Path, model_type: str, groups: str, settings: dict
) -> None:
    model = load(tmp_path, model_type, **settings | {groups: 2})
    norm = next(m for m in model.modules() if type(m).__name__.endswith("NormGated"))
    half = norm.weight.size // 2
    x, gate = mx.random.normal((1, 3, 2 * half)), mx.random.normal((1, 3, 2 * half))
    larger = mx.concatenate([x[..., :half], 100 * x[..., half:]], axis=-1)
    found, other = np.array(norm(x, gate)), np.array(norm(larger, gate))
    assert np.allclose(found[..., :half], other[..., :half], atol=1e-6)


def test_keys_of_falcon_h1_are_multiplied(tmp_path: Path) -> None:
    """A multiplier of the keys is as good as one in the weights that make them."""
    for name, factor in (("multiplied", 0.5), ("not", 1.0)):
        model = load(tmp_path / name, "falcon_h1", key_multiplier=factor)
        if name == "multiplied":
            expected = last_logits(model, TOKENS)
    for layer in model.layers:
        layer.self_attn.k_proj.weight *= 0.5
    assert np.allclose(last_logits(model, TOKENS), expected, atol=1e-5)


def test_tied_logits_of_minicpm3_are_scaled_as_others(tmp_path: Path) -> None:
    """By dim_model_base / hidden_size, which is a half."""
    model = load(tmp_path, "minicpm3", tie_word_embeddings=True)
    hidden = model.model(TOKENS)
    expected = model.model.embed_tokens.as_linear(hidden)[0, -1] / 2
    assert np.allclose(last_logits(model, TOKENS), np.array(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "settings", "what"),
    [
        ("dbrx", {"moe_normalize_expert_weights": 2}, "moe_normalize_expert_weights = 2"),
        ("exaone_moe", {"layer_types": ["full_attention"] * 4}, "no window"),
        ("falcon_h1", {"mlp_bias": True}, "mlp_bias = True"),
        ("gpt_bigcode", {"multi_query": False}, "multi_query = False"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok = 3"),
    ],
)
def test_what_mlx_lm_computes_otherwise_is_refused(
    tmp_path: Path, model_type: str, settings: dict, what: str
) -> None:
    if model_type == "dbrx":
        settings = {"ffn_config": ARCHITECTURES["dbrx"]["config"]["ffn_config"] | settings}
    with pytest.raises(UserError, match=f"this model has {what}, which"):
        load(tmp_path, model_type, **settings)


# --- What nobody read ---------------------------------------------------------------------------

# As on the hub, but for their sizes.
ORDINARY = {
    "llama": {
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "initializer_range": 0.02, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True,
    },
    "mistral": {"hidden_act": "silu", "sliding_window": 4096, "rope_theta": 10000.0},
    "qwen2": {
        "attention_dropout": 0.0, "hidden_act": "silu", "max_window_layers": 21,
        "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False,
    },
    "qwen3": {
        "attention_bias": False, "hidden_act": "silu", "max_window_layers": 28,
        "sliding_window": None, "use_sliding_window": False, "rope_scaling": None,
    },
    "gemma2": {
        "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    },
    "phi3": {
        "attention_bias": False, "embd_pdrop": 0.0, "hidden_act": "silu", "resid_pdrop": 0.0,
        "rope_scaling": None, "sliding_window": 2047, "auto_map": {"AutoConfig": "x.Phi3Config"},
    },
    "mixtral": {
        "hidden_act": "silu", "output_router_logits": False, "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", ORDINARY)
def test_nothing_is_said_of_an_ordinary_model(tmp_path: Path, model_type: str, capfd) -> None:
    architecture = "llama" if model_type == "mistral" else model_type
    config = ARCHITECTURES[architecture]["config"] | LENGTH | ORDINARY[model_type]
    mx.random.seed(0)
    model = tiny.build_model(config)
    models.load(tiny.write_model(tmp_path / "model", model, config | {"model_type": model_type}))
    assert "warning" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("olmoe", {"clip_qkv": 0.5}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("cohere", {"layer_norm_eps": 1e-3, "hidden_act": "gelu_10"}),
    ],
)
def test_settings_that_nobody_read_are_told(
    tmp_path: Path, model_type: str, settings: dict, capfd
) -> None:
    load(tmp_path, model_type, **settings)
    error = capfd.readouterr().err
    unread = {name: value for name, value in settings.items() if name != "layer_norm_eps"}
    named = ", ".join(f"{name} = {value!r}" for name, value in unread.items())
    assert f"warning: settings that mlx-lm does not know: {named};" in error
