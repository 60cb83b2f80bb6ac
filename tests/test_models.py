"""LoRA is in the right place in every architecture that mlx-lm ships, and trains there.

architectures.json has a tiny configuration of each module of mlx_lm.models, with the paths that are
adapted by default in its last three layers, or the reason why it cannot be built on a CPU.
"""

import copy
import importlib
import json
import pkgutil
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import models
import tiny
from lora_finetune.adapters import loading, npz
from lora_finetune.base import memory
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


def adapt(model: nn.Module, roles: str = "all") -> None:
    mx.random.seed(1)
    loading.adapt(model, {}, None, LAYERS, targets=roles)


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
    for roles in ("qv", "all"):
        with pytest.raises(UserError, match=rf"\({name}\) have no attention"):
            models.find_targets(build(name), LAYERS, roles)


# The linear layers that have no role, by the ends of their paths, and why.
NO_ROLE = {
    r"(indexer|compressor)\.\w+|index_[kq]_proj": "sparse attention chooses tokens with them",
    r"q_a_proj": "what comes out of the queries' latent vector is adapted",
    r"kv_b_proj|embed_q|unembed_out": "the latent vector of keys and values is adapted",
    r"o_a_proj": "the second half of the output is adapted",
    r"\w*(attn|attention)\.((gate|g|g_a|g_b)_proj|in_proj_z)": "gates of what attention puts out",
    r"[ab]_proj|in_proj_(a|b|ba)|f_(a_|b_)?proj": "decay and writing strength of linear attention",
    r"(mamba|mixer|conv)\.(in|out|x|dt|bcdt)_proj|linear_(x|y|out)": "recurrences, convolutions",
    r"self_attn\.linear": "stands in the place of an attention",
    r"shared_expert_gate|coefficient": "weighs shared experts",
    r"routed_expert_(up|down)_proj": "around all experts",
    r"(laurel|altup)\.\w+|per_layer_\w+|\w+_res_proj": "beside the residual stream",
}


@pytest.mark.parametrize("name", ADAPTED)
def test_every_linear_layer_has_a_role_or_a_reason_to_have_none(name: str):
    model = build(name)
    found = targets.projections(model)
    whole = {path.rpartition(".")[0] for path in found}  # of which rows have roles
    for path, module in model.named_modules():
        is_linear = "Linear" in type(module).__name__ and "weight" in module
        if is_linear and path.startswith(targets.last_layers(model, LAYERS)):
            reasons = [ends for ends in NO_ROLE if re.search(rf"\.({ends})$", path)]
            assert path in found or path in whole or reasons, path


# Whose MLP is linear in nothing, or whose weights are packed.
OTHER_MLPS = {"kimi_k3", "prism_hadamard_qwen35"}


@pytest.mark.parametrize("name", [name for name in ADAPTED if name not in OTHER_MLPS])
def test_an_mlp_is_linear_in_what_goes_up_and_down_but_not_in_its_gate(name: str):
    """Without a gate only in what goes down. So none of them, nor of their rows, is another."""
    model = build(name)
    modules, mlps = dict(model.named_modules()), {}
    for path, (role, shape) in targets.projections(model).items():
        if role in ("gate", "up", "down"):
            layer = path if path in modules else path.rpartition(".")[0]
            mlps.setdefault(layer.rpartition(".")[0], {})[role] = layer, shape[1]
    for parent, layers in mlps.items():
        x = mx.random.normal((1, 3, layers["up"][1]))
        for role, (path, _) in layers.items():
            linear, child = modules[path], path.rpartition(".")[2]
            layout = targets.Layout(1, {role: len(linear.weight)})
            if list(layers.values()).count(layers[role]) > 1:
                layout = targets.fused_layout(model, modules[parent], child)
            original, results = np.array(linear.weight), []
            for factor in (0, 1, 2):
                weight = original.copy().reshape(layout.groups, -1, original.shape[1])
                weight[:, rows(layout, role)] *= factor
                linear.weight = mx.array(weight.reshape(original.shape))
                results.append(np.array(modules[parent](x)))
            linear.weight = mx.array(original)
            steps = np.diff(results, axis=0)
            is_linear = np.allclose(steps[0], steps[1], rtol=1e-3, atol=1e-4 * np.abs(steps).max())
            assert is_linear == (role == "down" or (role == "up" and "gate" in layers)), path


# What an architecture does not let through, and why.
NO_GRADIENT = {"deepseek_v41"}  # MLX has no gradient of its float8 conversion and its sorting
NO_KEY_GRADIENT = {"afm7"}  # it rounds keys and values to 8 bits, which has no gradient
NOT_COMPILED = {"dbrx"}  # it looks at which experts its router chose
NOT_QUANTIZED = {"afm7"}  # its fused layer does not take the arguments of nn.quantize

TRAINED = [name for name in ADAPTED if name not in NO_GRADIENT]


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_is_in_its_place_and_changes_nothing_at_first(name: str):
    model = build(name)
    before = logits(model)
    adapt(model, "qv")
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
    if name in NO_KEY_GRADIENT:
        assert unmoved == {n for n in fresh if re.search(r"\.[kv]\.lora_", n)}
    else:
        assert not unmoved

    npz.write_arrays(tmp_path / "a.npz", npz.trainable_arrays(model))
    again = build(name)
    tiny.put_adapter(tmp_path / "a.npz", again)
    np.testing.assert_array_equal(logits(again), logits(model))


def test_to_generate_lora_is_put_into_the_weights_where_there_is_room_for_a_copy(
    monkeypatch: pytest.MonkeyPatch,
):
    model = build("llama")
    adapt(model)
    size = sum(m.frozen.weight.nbytes for m in models.lora_modules(model).values())
    for free, left in [(2.1 * size, 0), (1.9 * size, LAYERS * 7)]:
        monkeypatch.setattr(memory, "available", lambda free=free: free + mx.get_active_memory())
        with models.merged(model):
            assert len(models.lora_modules(model)) == left
        assert len(models.lora_modules(model)) == LAYERS * 7


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
    adapt(model, "all,experts")
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
    adapt(model, "all,experts")
    assert {array.dtype for array in trainable(model).values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(logits(model), before)
    losses = train(model, 1)
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
    """The output rows of one part, such as "k" or "up", of a fused projection, in each group."""
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


@pytest.mark.parametrize("left", [None, "k", "gate"])
@pytest.mark.parametrize(
    "path",
    [
        *(
            "phi3 self_attn.qkv_proj",
            "gpt_neox attention.query_key_value",
            "qwen3_next in_proj_qkvz",
        ),
        *("internlm2 attention.wqkv", "gpt_bigcode attn.c_attn", "phi3 mlp.gate_up_proj"),
        *("phi3small mlp.up_proj", "openelm ffn.proj_1", "granitemoehybrid input_linear"),
    ],
)
def test_the_slices_are_those_of_projections_split_apart(path: str, left: str | None):
    """What is left is to the last bit that of the base, the others have updates of their own."""
    name, end = path.split()
    model = build(name)
    modules = dict(model.named_modules())
    path = next(path for path in modules if path.endswith(end))
    parent, _, child = path.rpartition(".")
    layout, base = models.fused_layout(model, modules[parent], child), modules[path]
    rng = np.random.default_rng(0)
    parts = [part for part in layout.rows if part != left]
    adapted = models.LoRAFused(base, layout, dict.fromkeys(parts, 8))
    for part in parts:
        adapted[part].lora_b = mx.array(rng.normal(size=(8, layout.num_rows(part))), mx.float32)
    x = mx.array(rng.normal(size=(2, 5, models.linear_shape(base)[1])), mx.float32)

    def part_of(y: mx.array, part: str) -> np.ndarray:
        grouped = np.array(y).reshape(2, 5, layout.groups, -1)
        return grouped[..., rows(layout, part)].reshape(2, 5, -1)

    if left in layout.rows:
        np.testing.assert_array_equal(part_of(adapted(x), left), part_of(base(x), left))
    for part in parts:
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
    ("config", "roles", "a_layer", "layers"),
    [
        (PHI3_MINI, "qv", 8 * (3072 + 3072) + 8 * (3072 + 3072), 16),
        (PHI3_MINI, "all", 4 * 8 * (3072 + 3072) + 3 * 8 * (3072 + 8192), 16),
        (GUMINI_1B, "qv", 8 * (2048 + 2048) + 8 * (2048 + 2 * 128), 10),
        (GUMINI_1B, "attention", 2 * 8 * (2048 + 2048) + 2 * 8 * (2048 + 2 * 128), 10),
        (MIXTRAL_8X7B, "qv", 8 * (4096 + 4096) + 8 * (4096 + 8 * 128) + 8 * (4096 + 8), 16),
        (MIXTRAL_8X7B, "experts", 8 * 3 * 8 * (4096 + 14336), 16),
        (DEEPSEEK_V2_LITE, "qv", 8 * (2048 + 16 * 192 + 2048 + 512 + 64 + 2048 + 64), 16),
        (DEEPSEEK_V2_LITE, "down", 8 * (2 * 1408 + 2048), 16),
    ],
)
def test_real_models_get_as_many_parameters_as_calculated_by_hand(
    config: dict, roles: str, a_layer: int, layers: int
):
    """The weights are never computed: MLX makes arrays when they are needed."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    models.add_lora(model, dict.fromkeys(models.find_targets(model, 16, roles), 8))
    assert models.count_trainable(model) == a_layer * layers
