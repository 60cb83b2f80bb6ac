"""LoRA is in the right place in every architecture that mlx-lm ships, and trains there.

architectures.json has a tiny configuration of each module of mlx_lm.models, with the paths that are
adapted in its last three layers, or the reason why it cannot be built on a CPU.
"""

import copy
import importlib
import json
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path

import models
import tiny
from lora_finetune.adapters import loading, npz
from lora_finetune.base.errors import UserError
from lora_finetune.mlx_patches.loading import Limits, find_limits
from lora_finetune.model_folder import targets
from lora_finetune.training import losses
from lora_finetune.training import step as training_step

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

ARCHITECTURES = json.loads((Path(__file__).parent / "architectures.json").read_text("utf-8"))
BUILT = {name: entry for name, entry in ARCHITECTURES.items() if "config" in entry}
ADAPTED = {name: entry for name, entry in BUILT.items() if entry["adapted"]}

LAYERS = 3
TOKENS = mx.array([[1, 17, 33, 49, 65, 81, 97, 113, 2], [5, 3, 8, 13, 21, 34, 55, 0, 0]])
IS_TARGET = mx.array([[False] + [True] * 8, [False] + [True] * 6 + [False] * 2])

# Parts that other modules are made of; they are no architectures.
PARTS = {
    *("activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline"),
    *("rope_utils", "ssm", "switch_layers"),
}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Compiling the kernels of a hundred models would take most of the time."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def build(name: str) -> nn.Module:
    """The model of an architecture, float32, the same random weights each time."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    config = copy.deepcopy(ARCHITECTURES[name]["config"])  # which some architectures change
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)
    if name not in WEIGHTS:
        WEIGHTS[name] = make_weights(model)
    model.update(tree_map(mx.array, WEIGHTS[name]))  # copies, which may be changed
    return model


WEIGHTS: dict[str, dict] = {}  # of the models built so far


def make_weights(model: nn.Module) -> dict:
    """The weights a model starts with; some are zeros, and would keep gradients from passing."""
    weights = model.parameters()
    filled = tree_map(lambda x: x.any(), weights)
    mx.eval(weights, filled)
    weights = tree_map(lambda x, full: x if full or x.size <= 1 else noise(x), weights, filled)
    mx.eval(weights)
    return weights


def noise(array: mx.array) -> mx.array:
    if mx.issubdtype(array.dtype, mx.integer):
        return mx.random.randint(0, 2**31 - 1, array.shape).astype(array.dtype)
    return mx.random.normal(array.shape, scale=0.1).astype(array.dtype)


def adapt(model: nn.Module) -> None:
    mx.random.seed(1)
    loading.adapt(model, {}, None, LAYERS)


def trainable(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def train(model: nn.Module, steps: int = 2) -> list[float]:
    """Train on one batch with the program's step; the loss before each step, and after the last.

    A has no gradient before B has moved: it takes two steps to move both.
    """
    loss = losses.make_loss(model)
    model.train()
    totals = list(tiny.train_on(model, loss, [[(TOKENS, IS_TARGET)]] * steps))
    return [*totals, loss(model, TOKENS, IS_TARGET)[0].item()]


def logits(model: nn.Module) -> np.ndarray:
    model.eval()
    return np.array(model(TOKENS).astype(mx.float32))


def test_every_architecture_of_mlx_lm_is_looked_at():
    shipped = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    assert set(ARCHITECTURES) == shipped - PARTS
    assert len(ADAPTED) >= 85


def test_those_that_cannot_be_built_on_a_cpu_are_these():
    assert set(ARCHITECTURES) - set(BUILT) == {"bitnet", "muse_spark", "olmo"}


@pytest.mark.parametrize("name", BUILT)
def test_the_limits_of_every_architecture_are_the_rows_of_its_embeddings(name: str):
    config = ARCHITECTURES[name]["config"]
    inner = config.get("text_config", config)
    size = inner.get("vocab_size", inner.get("num_vocab", 128))
    is_learnt = name in ("gpt2", "gpt_bigcode")
    expected = Limits(size, config["n_positions"] if is_learnt else np.inf)
    model = build(name)
    for _ in range(2):  # the first call leaves the model as it was
        assert find_limits(model) == expected
    if name in ADAPTED and name not in NOT_QUANTIZED:
        quantize(model)
        assert find_limits(model) == expected


@pytest.mark.parametrize("name", sorted(set(BUILT) - set(ADAPTED)))
def test_a_model_without_attention_is_reported(name: str):
    with pytest.raises(UserError, match=rf"\({name}\) have no attention"):
        models.find_targets(build(name), LAYERS)


# What an architecture does not let through, and why.
NO_GRADIENT = {"deepseek_v41"}  # MLX has no gradient of its float8 conversion and its sorting
NO_VALUE_GRADIENT = {"afm7"}  # it rounds keys and values to 8 bits, which has no gradient
NOT_COMPILED = {"dbrx"}  # it looks at which experts its router chose
NOT_QUANTIZED = {"afm7"}  # its fused layer does not take the arguments of nn.quantize

TRAINED = [name for name in ADAPTED if name not in NO_GRADIENT]


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_is_in_its_place_and_changes_nothing_at_first(name: str):
    model = build(name)
    before = logits(model)
    adapt(model)
    expected = {f"{path}.lora_{x}" for path in ADAPTED[name]["adapted"] for x in "ab"}
    assert set(trainable(model)) == expected
    np.testing.assert_array_equal(logits(model), before)


@pytest.mark.parametrize("name", TRAINED)
def test_lora_learns_everywhere_and_is_the_same_in_another_model(name: str, tmp_path: Path):
    model = build(name)
    adapt(model)
    fresh = trainable(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    unmoved = {n for n, array in trainable(model).items() if np.array_equal(array, fresh[n])}
    if name in NO_VALUE_GRADIENT:
        assert unmoved == {n for n in fresh if ".v.lora_" in n}
    else:
        assert not unmoved

    npz.write_arrays(tmp_path / "a.npz", npz.trainable_arrays(model))
    again = build(name)
    tiny.put_adapter(tmp_path / "a.npz", again)
    np.testing.assert_array_equal(logits(again), logits(model))


def test_a_fresh_router_of_16_bits_keeps_its_scores_and_their_type():
    model = build("deepseek_v3")
    model.set_dtype(mx.bfloat16)
    router = model.layers[-1].mlp.gate
    x = mx.random.normal((1, 3, router.weight.shape[1])).astype(mx.bfloat16)
    for found, expected in zip(models.LoRARouter.from_base(router)(x), router(x), strict=True):
        assert found.dtype == expected.dtype
        assert mx.array_equal(found, expected).item()


@pytest.mark.parametrize("name", sorted(NO_GRADIENT))
def test_what_mlx_cannot_train_is_reported(name: str):
    model = build(name)
    adapt(model)
    mx.enable_compile()
    gradients_of = training_step.make_gradients(model, losses.loss)
    with pytest.raises(UserError, match="cannot be trained"):
        gradients_of(training_step.joined(model.trainable_parameters()), TOKENS, IS_TARGET)


@pytest.mark.skipif(
    mx.default_device() == mx.cpu and not shutil.which("g++"),
    reason="without a compiler MLX does not compile for the CPU",
)
@pytest.mark.parametrize("name", TRAINED)
def test_the_step_compiles(name: str):
    """Up to the kernels, which nothing evaluates: on a CPU those of all models take minutes."""
    model = build(name)
    adapt(model)
    model.train()
    calls = []

    class Counting(type(model)):
        def __call__(self, *args, **options):
            calls.append(args)
            return super().__call__(*args, **options)

    model.__class__ = Counting
    mx.enable_compile()
    gradients_of = training_step.make_gradients(model, losses.loss)
    for _ in range(2):
        gradients_of(training_step.joined(model.trainable_parameters()), TOKENS, IS_TARGET)
    assert (len(calls) == 1) == (name not in NOT_COMPILED)


@pytest.mark.parametrize("name", sorted(NOT_COMPILED))
def test_a_model_that_does_not_compile_trains_all_the_same(name: str):
    expected, model = build(name), build(name)
    for each in (expected, model):
        adapt(each)
    losses = train(expected, 5)
    mx.enable_compile()
    np.testing.assert_allclose(train(model, 5), losses, rtol=1e-5)
    arrays = trainable(model)
    for path, array in trainable(expected).items():
        np.testing.assert_allclose(arrays[path], array, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in NOT_QUANTIZED])
def test_lora_trains_on_a_quantized_base(name: str):
    """Of 4 bits; test_specification.py has the others."""
    model = build(name)
    quantize(model)
    before = logits(model)
    adapt(model)
    assert {array.dtype for array in trainable(model).values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(logits(model), before)
    losses = train(model)
    assert losses[-1] < losses[0]


def quantize(model: nn.Module) -> None:
    """Quantize what mlx-lm would to 4 bits, as far as the widths allow."""
    wanted = getattr(model, "quant_predicate", None) or (lambda *_: True)

    def predicate(path: str, module: nn.Module) -> bool | dict:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return fits and wanted(path, module)

    nn.quantize(model, group_size=32, bits=4, class_predicate=predicate)


# --- Fused projections --------------------------------------------------------------------------

# The one fused layer here whose rows cannot be set one by one; the layer before it is the same.
PACKED = ("prism_hadamard_qwen35", "language_model.model.layers.2.linear_attn.in_proj_qkv.q")

FUSED = [
    (name, path.removesuffix(".q"))
    for name in TRAINED
    for path in ADAPTED[name]["adapted"]
    if path.endswith(".q") and (name, path) != PACKED
]


def rows(layout: models.Layout, part: str) -> np.ndarray:
    """The output rows of one part, "q", "k" or "v", of a fused projection."""
    before = list(layout.rows.values())[: list(layout.rows).index(part)]
    return np.arange(layout.rows[part]) + sum(before)


@pytest.mark.parametrize(("name", "path"), FUSED)
def test_a_fused_projection_is_cut_where_the_model_cuts_it(name: str, path: str):
    """Without values, attention is nothing; without queries, it does not look at the keys."""
    model = build(name)
    parent, _, child = path.rpartition(".")
    attention = dict(model.named_modules())[parent]
    layout = models.fused_layout(model, attention, child)
    linear = attention[child]
    d_out, d_in = models.linear_shape(linear)
    per_group = d_out // layout.groups
    original = np.array(linear.weight)

    def without(*parts: str, changed: str = "") -> np.ndarray:
        """What the attention puts out with the rows of some parts zero, or other ones."""
        weight = original.copy().reshape(layout.groups, per_group, d_in)
        for part in parts:
            weight[:, rows(layout, part)] = 0
        if changed:
            weight[:, rows(layout, changed)] *= -0.5
        linear.weight = mx.array(weight.reshape(d_out, d_in))
        return attended(model, attention)

    if "bias" in linear:
        linear.bias = mx.zeros_like(linear.bias)
    assert np.abs(without()).max() > 0
    assert not np.abs(without("v")).any()
    np.testing.assert_allclose(without("q", changed="k"), without("q"), atol=1e-5)
    assert not np.allclose(without(changed="k"), without(), atol=1e-6)


def attended(model: nn.Module, attention: nn.Module) -> np.ndarray:
    """What reaches the output projection of an attention module in a run of the model."""
    name = targets.named(targets.ATTENTION, attention)["o"]
    output, seen = attention[name], []

    class Spy(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            seen.append(x)
            return output(x)

    attention[name] = Spy()
    model.eval()
    mx.eval(model(TOKENS))
    attention[name] = output
    return np.array(seen[0])


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "internlm2", "gpt_bigcode", "qwen3_next"])
def test_the_slices_are_those_of_projections_split_apart(name: str):
    """Keys to the last bit those of the base, queries and values with an update of their own."""
    model = build(name)
    path = next(path for n, path in FUSED if n == name)
    parent, _, child = path.rpartition(".")
    modules = dict(model.named_modules())
    layout, base = models.fused_layout(model, modules[parent], child), modules[path]
    rng = np.random.default_rng(0)
    adapted = models.LoRAFused(base, layout, {"q": 8, "v": 8})
    for part in ("q", "v"):
        adapted[part].lora_b = mx.array(rng.normal(size=(8, layout.num_rows(part))), mx.float32)
    x = mx.array(rng.normal(size=(2, 5, models.linear_shape(base)[1])), mx.float32)

    def part_of(y: mx.array, part: str) -> np.ndarray:
        grouped = np.array(y).reshape(2, 5, layout.groups, -1)
        return grouped[..., rows(layout, part)].reshape(2, 5, -1)

    np.testing.assert_array_equal(part_of(adapted(x), "k"), part_of(base(x), "k"))
    for part in ("q", "v"):
        a, b = (np.array(adapted[part][f"lora_{i}"]) for i in "ab")
        expected = part_of(base(x), part) + 20 * np.array(x) @ a @ b
        np.testing.assert_allclose(part_of(adapted(x), part), expected, atol=2e-3)


# --- Real sizes ---------------------------------------------------------------------------------

PHI3_MINI = {
    **{"model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32},
    **{"intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32},
    **{"rms_norm_eps": 1e-5, "vocab_size": 32064, "max_position_embeddings": 4096},
    **{"original_max_position_embeddings": 4096, "rope_theta": 10000.0},
}
GUMINI_1B = {
    **{"model_type": "qwen2", "hidden_size": 2048, "num_hidden_layers": 10},
    **{"intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2},
    **{"rms_norm_eps": 1e-6, "vocab_size": 151936, "tie_word_embeddings": True},
}
MIXTRAL_8X7B = {
    **{"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32},
    **{"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
}
DEEPSEEK_V2_LITE = {
    **{"model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27},
    **{"intermediate_size": 10944, "moe_intermediate_size": 1408, "num_attention_heads": 16},
    **{"num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
    **{"first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    **{"vocab_size": 102400, "norm_topk_prob": False, "scoring_func": "softmax"},
    "rope_scaling": {
        **{"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707},
        **{"mscale_all_dim": 0.707, "original_max_position_embeddings": 4096},
    },
}


@pytest.mark.parametrize(
    ("config", "a_layer", "layers"),
    [
        (PHI3_MINI, 8 * (3072 + 3072) + 8 * (3072 + 3072), 16),
        (GUMINI_1B, 8 * (2048 + 2048) + 8 * (2048 + 2 * 128), 10),
        (MIXTRAL_8X7B, 8 * (4096 + 4096) + 8 * (4096 + 8 * 128) + 8 * (4096 + 8), 16),
        (DEEPSEEK_V2_LITE, 8 * (2048 + 16 * 192) + 8 * (2048 + 512 + 64) + 8 * (2048 + 64), 16),
    ],
    ids=["Phi-3-mini", "Gumini-1B", "Mixtral-8x7B", "DeepSeek-V2-Lite"],
)
def test_real_models_get_as_many_parameters_as_calculated_by_hand(
    config: dict, a_layer: int, layers: int
):
    """The weights are never computed: MLX makes arrays when they are needed."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    models.add_lora(model, dict.fromkeys(models.find_targets(model, 16), 8))
    assert models.count_trainable(model) == a_layer * layers
