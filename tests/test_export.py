"""What was trained here is used elsewhere, and what was trained elsewhere is used here."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import models
import tiny
from conftest import Ended, Run
from lora_finetune.adapters import export, loading, npz
from lora_finetune.adapters import mlx_lm as mlx_lm_form
from lora_finetune.base.errors import Interrupted
from lora_finetune.base.files import whole_folder
from lora_finetune.base.signals import raising_signals
from lora_finetune.model_folder.targets import layer_paths
from lora_finetune.model_folder.weights import read_weights
from test_errors import one_error
from test_models import ADAPTED, ARCHITECTURES, adapt, build, logits

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import safetensors.numpy
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

REFERENCE = Path(__file__).parent / "reference"


def make_base(
    folder: Path, name: str, bits: int | None = None, dtype: mx.Dtype = mx.float32
) -> Path:
    """The folder of a tiny random model of an architecture, its layers quantized if they can be."""
    config = tiny.LLAMA | copy.deepcopy(ARCHITECTURES[name]["config"])
    mx.random.seed(0)
    model = tiny.build_model(copy.deepcopy(config))
    model.set_dtype(dtype)
    if bits:

        def fits(_: str, module: nn.Module) -> bool:
            return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

        nn.quantize(model, 32, bits, class_predicate=fits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    return tiny.write_model(folder, model, config)


def randomize(model: nn.Module) -> None:
    """Give an adapted model B's that change what it says."""
    for module in model.modules():
        if isinstance(module, models.LowRank):
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.02


def adapted(base: Path, adapter: Path) -> nn.Module:
    """A model with the adapter that a path means."""
    model, _ = models.load(base)
    tiny.put_adapter(adapter, model)
    return model


def make_adapter(file: Path, base: Path, roles: str = "all") -> np.ndarray:
    """Write a random adapter for a model; the logits of the model with it."""
    model, _ = models.load(base)
    plain = logits(model)
    adapt(model, roles)
    randomize(model)
    npz.write_arrays(file, npz.file_arrays(model))
    changed = logits(model)
    assert relative(changed, plain) > 0.02
    return changed


def relative(found: object, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest number."""
    return np.abs(np.array(found, np.float32) - expected).max() / np.abs(expected).max()


# --- Out in every form, and in again ------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3_moe", "phi3", "mixtral", "gemma3_text", "gpt_neox"]
)
def test_every_form_says_what_the_adapter_says(
    call: Run, tmp_path: Path, name: str, bits: int | None
) -> None:
    base = make_base(tmp_path / "base", name, bits)
    expected = make_adapter(tmp_path / "a.npz", base)
    forms = ("mlx-lm", "peft", "merged", "merged-float")
    exports = [word for form in forms for word in ("--export", form, tmp_path / form)]
    ended = call("--model", base, "--adapter-file", tmp_path / "a.npz", *exports)
    assert ended.returncode == 0, ended.stderr
    for form in ("mlx-lm", "peft"):
        assert relative(logits(adapted(base, tmp_path / form)), expected) < 1e-5
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "mlx-lm"))
    assert relative(logits(theirs), expected) < 1e-3  # GPT-NeoX's GELU is the other form there
    for form in ("merged", "merged-float"):
        merged, _ = mlx_lm.load(str(tmp_path / form))
        assert relative(logits(merged), expected) < 1e-3
    quantized = {form: quantized_layers(tmp_path / form) for form in ("merged", "merged-float")}
    changed = {f"{path}.weight" for path in models.lora_modules(adapted(base, tmp_path / "peft"))}
    assert quantized["merged"] == quantized_layers(base) - changed
    assert not quantized["merged-float"]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
def test_experts_say_the_same_in_every_form_that_has_them(
    call: Run, tmp_path: Path, name: str, bits: int | None
) -> None:
    base = make_base(tmp_path / "base", name, bits)
    expected = make_adapter(tmp_path / "a.npz", base, "all,experts")
    exports = [
        word for form in ("mlx-lm", "merged") for word in ("--export", form, tmp_path / form)
    ]
    ended = call("--model", base, "--adapter-file", tmp_path / "a.npz", *exports)
    assert ended.returncode == 0, ended.stderr
    assert relative(logits(adapted(base, tmp_path / "mlx-lm")), expected) < 1e-5
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "mlx-lm"))
    assert relative(logits(theirs), expected) < 1e-3
    assert relative(logits(mlx_lm.load(str(tmp_path / "merged"))[0]), expected) < 1e-3


def test_what_mlx_lm_multiplies_the_weights_by_is_taken_out_again(
    call: Run, tmp_path: Path
) -> None:
    """As it does where transformers wrote the base, which it sees by the convolutions."""
    base = make_base(tmp_path / "base", "falcon_h1")
    arrays = read_weights(base)
    arrays |= {n: a.moveaxis(2, 1) for n, a in arrays.items() if n.endswith("conv1d.weight")}
    mx.save_safetensors(str(base / "model.safetensors"), arrays, {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"attention_out_multiplier": 0.5}
    config |= {"attention_in_multiplier": 1.25, "mlp_multipliers": [0.75, 1.5]}
    (base / "config.json").write_text(json.dumps(config))
    expected = make_adapter(tmp_path / "a.npz", base)
    exports = [word for form in ("peft", "merged") for word in ("--export", form, tmp_path / form)]
    ended = call("--model", base, "--adapter-file", tmp_path / "a.npz", *exports)
    assert ended.returncode == 0, ended.stderr
    assert relative(logits(models.load(tmp_path / "merged")[0]), expected) < 1e-3
    theirs = safetensors.numpy.load_file(tmp_path / "peft/adapter_model.safetensors")
    for path, (_, b) in loading.read_adapter(tmp_path / "a.npz").items():
        ends = {"q": 1.25, "k": 1.25, "o": 0.5, "gate": 0.75, "down": 1.5}
        factor = ends.get(path.rpartition(".")[2].removesuffix("_proj"), 1)
        found = theirs[f"base_model.model.{path}.lora_B.weight"]
        np.testing.assert_allclose(found * factor, b.T, rtol=1e-5)


def quantized_layers(folder: Path) -> set[str]:
    """The weights that are quantized in a model's folder."""
    names = set(read_weights(folder))
    return {n.replace(".scales", ".weight") for n in names if n.endswith(".scales")}


@pytest.mark.parametrize("source", ["a.npz", "mlx-lm", "peft"])
def test_each_form_that_is_read_is_written_in_each_form(
    call: Run, model: Path, data: Path, tmp_path: Path, source: str
) -> None:
    """What is read may be transposed in memory, and is to be written in its own order."""
    expected = make_adapter(tmp_path / "a.npz", model)
    forms = ("mlx-lm", "peft", "merged")
    exports = [word for form in forms[:2] for word in ("--export", form, tmp_path / form)]
    ended = call("--model", model, "--adapter-file", tmp_path / "a.npz", *exports)
    assert ended.returncode == 0, ended.stderr
    exports = [word for form in forms for word in ("--export", form, tmp_path / "again" / form)]
    (tmp_path / "again").mkdir()
    ended = call("--model", model, "--adapter-file", tmp_path / source, *exports)
    assert ended.returncode == 0, ended.stderr
    for form in forms[:2]:
        assert relative(logits(adapted(model, tmp_path / "again" / form)), expected) < 1e-5
    assert relative(logits(models.load(tmp_path / "again" / "merged")[0]), expected) < 1e-5

    training = ("--train", "--iters", 1, "--learning-rate", 0, "--val-batches", 1)
    start = ("--resume-adapter-file", tmp_path / source, "--adapter-file", tmp_path / "b.npz")
    ended = call("--model", model, "--data", data, *training, *start)
    assert ended.returncode == 0, ended.stderr
    best = adapted(model, tmp_path / "b.run" / "best.npz")
    assert relative(logits(best), expected) < 1e-5


@pytest.mark.parametrize("name", ADAPTED)
def test_every_architecture_is_merged_and_given_to_mlx_lm(tmp_path: Path, name: str) -> None:
    mx.disable_compile()
    model = build(name)
    adapt(model, "all,experts")
    randomize(model)
    expected = logits(model)
    if np.isfinite(expected).all():  # phi3small has logits of −∞
        with models.merged(model):
            assert relative(logits(model), expected) < 3e-5
        assert relative(logits(model), expected) == 0
    try:
        mlx_lm_form.check(model, tmp_path)
    except ValueError:  # as for most routers
        adapter = {}
    else:
        adapter = export.whole_pairs(model)
    if adapter:
        mlx_lm_form.write(tmp_path, adapter, layer_paths(model), name)
        theirs = load_adapters(build(name), str(tmp_path))
        ours = build(name)
        tiny.put_adapter(tmp_path, ours)
        assert set(models.lora_modules(ours)) == set(models.lora_modules(model))
        for other in (theirs, ours):
            np.testing.assert_allclose(logits(other), expected, rtol=1e-3, atol=1e-4)
    mx.enable_compile()


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_bases_quantized_in_other_ways_are_merged(call: Run, tmp_path: Path, mode: str) -> None:
    group_size, bits = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    quantization = {"mode": mode, "bits": bits, "group_size": group_size}
    mx.random.seed(0)
    model = tiny.build_model(tiny.LLAMA | {"vocab_size": 320})
    nn.quantize(model, **quantization)
    config = tiny.LLAMA | {"vocab_size": 320, "quantization": quantization}
    base = tiny.write_model(tmp_path / "base", model, config)
    expected = make_adapter(tmp_path / "a.npz", base)
    flags = ["--model", base, "--adapter-file", tmp_path / "a.npz"]
    assert call(*flags, "--export", "merged", tmp_path / "out").returncode == 0
    assert relative(logits(mlx_lm.load(str(tmp_path / "out"))[0]), expected) < 0.02  # bfloat16


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_merged_weights_have_the_type_of_the_base(
    call: Run, tmp_path: Path, dtype: mx.Dtype
) -> None:
    base = make_base(tmp_path / "base", "llama", dtype=dtype)
    make_adapter(tmp_path / "a.npz", base)
    flags = ["--model", base, "--adapter-file", tmp_path / "a.npz"]
    assert call(*flags, "--export", "merged", tmp_path / "out").returncode == 0
    assert {array.dtype for array in read_weights(tmp_path / "out").values()} == {dtype}


def test_after_training_the_exported_adapter_is_that_of_the_last_iteration(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    flags = ["--model", model, "--data", data, "--train", "--iters", 3, "--lora-layers", 2]
    flags += ["--adapter-file", tmp_path / "a.npz", "--learning-rate", "1e-2", "--prompt", "a"]
    ended = call(*flags, "--export", "peft", tmp_path / "p", "--export", "mlx-lm", tmp_path / "m")
    assert f"Exported as peft to {tmp_path / 'p'}." in ended.stdout
    with np.load(tmp_path / "a.npz") as file:
        saved = dict(file)
    exported = safetensors.numpy.load_file(tmp_path / "m" / "adapters.safetensors")
    assert saved.keys() == exported.keys()
    assert all((saved[name] == exported[name]).all() for name in saved)


# --- PyTorch and PEFT ---------------------------------------------------------------------------

EXPORTED = pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2_moe", "tiny_phi3"])


@EXPORTED
def test_an_adapter_of_peft_says_here_what_it_says_there(name: str) -> None:
    folder = REFERENCE / name
    with np.load(folder / "exported.npz") as file:
        expected = dict(file)
    model, _ = load_model(folder)
    tiny.put_adapter(folder / "peft", model)
    found = np.array(model(mx.array(expected["tokens"])))
    np.testing.assert_allclose(found, expected["logits"], atol=1e-3)


@EXPORTED
def test_an_adapter_exported_to_peft_is_the_one_that_peft_writes(tmp_path: Path, name: str) -> None:
    folder = REFERENCE / name
    model, _ = load_model(folder)
    tiny.put_adapter(folder / "peft", model)
    export.write_all([("peft", tmp_path / "p")], model, folder, name)
    arrays, configs = [], []
    for where in (folder / "peft", tmp_path / "p"):
        arrays.append(safetensors.numpy.load_file(where / "adapter_model.safetensors"))
        configs.append(json.loads((where / "adapter_config.json").read_text()))
    assert arrays[0].keys() == arrays[1].keys()
    for array in arrays[0]:
        np.testing.assert_array_equal(arrays[1][array], arrays[0][array])
    assert {n: configs[0][n] for n in configs[1]} == configs[1]


@EXPORTED
def test_merged_weights_are_those_that_peft_merges(name: str) -> None:
    folder = REFERENCE / name
    model, _ = load_model(folder)
    tiny.put_adapter(folder / "peft", model)
    merged = {path: m.merged() for path, m in models.lora_modules(model).items()}
    with np.load(folder / "exported.npz") as file:
        expected = {n.removeprefix("merged/"): file[n] for n in file if n.startswith("merged/")}
    assert merged.keys() == expected.keys()
    for path, weight in expected.items():
        np.testing.assert_allclose(np.array(merged[path].weight), weight, atol=1e-6)


@EXPORTED
def test_a_merged_checkpoint_has_the_names_that_transformers_knows(
    call: Run, model: Path, tmp_path: Path, name: str
) -> None:
    """All else in it is as it was, the experts one by one too, which MLX puts together."""
    base = shutil.copytree(REFERENCE / name, tmp_path / "base")
    for file in model.glob("tokenizer*"):
        shutil.copyfile(file, base / file.name)
    ended = call(
        "--model", base, "--adapter-file", base / "peft", "--export", "merged", tmp_path / "m"
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    before, after = (
        safetensors.numpy.load_file(where / "model.safetensors") for where in (base, tmp_path / "m")
    )
    assert before.keys() == after.keys()
    with np.load(base / "exported.npz") as file:
        merged = {f"{n.removeprefix('merged/')}.weight": file[n] for n in file if "merged/" in n}
    for array in before:
        np.testing.assert_allclose(after[array], merged.get(array, before[array]), atol=1e-6)
    assert (tmp_path / "m" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"lora_alpha": None}, "does not tell the scale"),
        ({"lora_alpha": "8"}, "does not tell the scale"),
        ({"alpha_pattern": 3}, "does not tell the scale"),
        ({"alpha_pattern": {"(": 3}}, "does not tell the scale"),
    ],
)
def test_a_configuration_of_peft_that_gives_no_scale_is_an_error_that_names_it(
    call: Run, model: Path, tmp_path: Path, settings: dict, reason: str
) -> None:
    folder = tmp_path / "p"
    tiny.make_peft(folder, **settings)
    one_error(call("--model", model, "--adapter-file", folder, "--prompt", "a"), reason)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.q_proj.lora_magnitude_vector",  # DoRA
        "model.layers.3.self_attn.q_proj.lora_B.bias",
        "model.layers.3.self_attn.q_proj.bias",
        "lm_head.weight",  # modules_to_save
        "model.layers.3.self_attn.q_proj.hada_w1_a",  # LoHa
    ],
)
def test_what_is_not_plain_lora_of_peft_is_an_error_that_names_it(
    call: Run, model: Path, tmp_path: Path, name: str
) -> None:
    tiny.make_peft(tmp_path / "p")
    file = tmp_path / "p" / "adapter_model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    arrays[f"base_model.model.{name}"] = np.ones(64, np.float32)
    safetensors.numpy.save_file(arrays, file)
    ended = call("--model", model, "--adapter-file", tmp_path / "p", "--prompt", "a")
    one_error(ended, name, "which is not of plain LoRA")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 4),
        ({"use_rslora": True}, 8 / 2**0.5),
        ({"r": 16, "rank_pattern": {"q_proj": 2}}, 4),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, 1.5),
        ({"alpha_pattern": {r"layers\.3\.self_attn\.q_proj": 5, "v_proj": 7}}, 2.5),
    ],
)
def test_the_scale_of_peft_is_that_of_its_configuration(
    tmp_path: Path, settings: dict, scale: float
) -> None:
    tiny.make_peft(tmp_path / "p", **settings)
    file = tmp_path / "p" / "adapter_model.safetensors"
    [(a, b)] = loading.read_adapter(file).values()
    arrays = safetensors.numpy.load_file(file)
    theirs = [next(x for n, x in arrays.items() if f"lora_{which}" in n) for which in "BA"]
    np.testing.assert_allclose(20 * (a @ b).T, scale * theirs[0] @ theirs[1], rtol=1e-4)


def test_training_goes_on_from_an_adapter_of_peft(
    call: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    tiny.make_peft(tmp_path / "p")
    flags = ["--model", model, "--data", data, "--train", "--iters", 2]
    ended = call(
        *flags, "--resume-adapter-file", tmp_path / "p", "--adapter-file", tmp_path / "a.npz"
    )
    assert ended.returncode == 0
    with np.load(tmp_path / "a.npz") as file:
        assert {name.rpartition(".")[0] for name in file} == {"model.layers.3.self_attn.q_proj"}


# --- mlx-lm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.q_proj.m", "lm_head.weight"])
def test_other_fine_tunings_of_mlx_lm_are_an_error_that_names_their_arrays(
    call: Run, model: Path, tmp_path: Path, name: str
) -> None:
    """DoRA, and full fine-tuning."""
    arrays = tiny.adapter_arrays() | {name: np.ones(64, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "adapters.safetensors")
    config = {"lora_parameters": {"rank": 8, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ended = call("--model", model, "--adapter-file", tmp_path, "--prompt", "a")
    one_error(ended, name.rpartition(".")[0], "not a lora_a and its lora_b")


@pytest.mark.parametrize("config", [None, {}, {"lora_parameters": {"rank": 8}}])
def test_without_the_scale_of_an_adapter_it_is_not_read(
    call: Run, model: Path, tmp_path: Path, config: dict | None
) -> None:
    file = tmp_path / "adapters.safetensors"
    safetensors.numpy.save_file(tiny.adapter_arrays(), file)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ended = call("--model", model, "--adapter-file", file, "--prompt", "a")
    one_error(ended, "adapter_config.json", "No such file" if config is None else "scale")


def words(ended: Ended) -> str:
    """What was generated."""
    return ended.stdout.partition("Generating\n")[2].partition("==========")[0].rstrip("\n")


def test_an_adapter_in_bfloat16_is_read(tmp_path: Path) -> None:
    arrays = {n: mx.array(a).astype(mx.bfloat16) for n, a in tiny.adapter_arrays().items()}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    config = {"lora_parameters": {"rank": 8, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path, pair in loading.read_adapter(tmp_path / "adapters.safetensors").items():
        for name, found in zip(("lora_a", "lora_b"), pair, strict=True):
            expected = arrays[f"{path}.{name}"].astype(mx.float32)
            np.testing.assert_array_equal(found, np.array(expected))


def test_a_link_as_the_hub_has_them_is_followed(call: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    safetensors.numpy.save_file(tiny.adapter_arrays(), tmp_path / "blobs" / "0a1b")
    config = {"lora_parameters": {"rank": 8, "scale": 2.0}}
    (tmp_path / "snapshot" / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "snapshot" / "adapters.safetensors"
    file.symlink_to(tmp_path / "blobs" / "0a1b")
    flags = ["--model", model, "--prompt", "a", "--temp", 0]
    ended = call(*flags, "--adapter-file", file)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert words(ended) == words(call(*flags, "--adapter-file", file.parent))


def test_mlx_lm_generates_the_same_from_what_is_exported(
    run: Run, call: Run, model: Path, tmp_path: Path
) -> None:
    """The adapter in `mlx_lm.generate` itself, the merged model in `mlx_lm.server`."""
    tiny.make_adapter(tmp_path / "a.npz")
    flags = ["--model", model, "--adapter-file", tmp_path / "a.npz", "--prompt", "ab", "--temp", 0]
    exports = ["--export", "mlx-lm", tmp_path / "m", "--export", "merged", tmp_path / "merged"]
    said = words(call(*flags, "--max-tokens", 12, *exports)).removeprefix("ab")
    ended = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", "--model", model, "--prompt", "ab"]
        + ["--adapter-path", tmp_path / "m", "--ignore-chat-template", "--verbose", "False"]
        + ["--max-tokens", "12", "--temp", "0"],
        capture_output=True, check=True,
    )  # fmt: skip
    assert ended.stdout.decode().strip("\n ") == said.strip("\n ")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--port", str(port)]
    server = subprocess.Popen([*command, "--model", str(tmp_path / "merged")])
    request = {"prompt": "ab", "max_tokens": 12, "temperature": 0}
    try:
        answer = ask(f"http://127.0.0.1:{port}/v1/completions", request)
        assert answer["choices"][0]["text"].strip("\n ") == said.strip("\n ")
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()


def ask(url: str, request: dict) -> dict:
    """The answer of a server, which may still be starting."""
    body = json.dumps(request).encode()
    for _ in range(300):
        try:
            headers = {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


# --- What cannot be exported --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exports", "reason"),
    [
        ([("gguf", "out")], "gguf takes a file, such as"),
        ([("gguf", "full/a.gguf")], "a.Modelfile cannot be made: File exists; name a new one"),
        ([("gguf", "full")], "gguf takes a file, such as"),
        ([("ggml", "out")], "takes a form (mlx-lm, peft, gguf, merged, merged-float) and a folder"),
        ([("merged", "full")], "full cannot be made: File exists; name a new one"),
        ([("merged", "file")], "file cannot be made: File exists"),
        ([("peft", ".")], "cannot be made: File exists"),
        ([("peft", "가" * 90)], "cannot be made: File name too long"),
        ([("peft", "loop")], "cannot be made"),
        ([("peft", "file/out")], "cannot be made: Not a directory"),
        ([("peft", "out"), ("merged", "out/")], "out is taken by other output"),
        ([("peft", "out/peft"), ("merged", "out")], "out is taken by other output"),
        ([("peft", "new")], "new is taken by other output"),  # the adapter's folder
    ],
)
def test_a_wrong_export_is_reported_before_anything_is_loaded(
    call: Run,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exports: list,
    reason: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "full" / "a.Modelfile").touch()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    flags = [w for form, folder in exports for w in ("--export", form, place(tmp_path, folder))]
    flags += ["--adapter-file", tmp_path / "new" / "a.npz"]
    ended = call("--train", "--model", "not/there", "--data", data, *flags)
    one_error(ended, reason)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    assert not (tmp_path / "out").exists() and not (tmp_path / "full" / "a.gguf").exists()


def place(folder: Path, name: str) -> Path:
    return Path(name) if name == "." else folder / name


@pytest.mark.parametrize(
    ("form", "name", "bits", "reason"),
    [
        ("mlx-lm", "deepseek_v3", None, "mlx-lm has no LoRA for model.layers.2.mlp.gate"),
        ("peft", "internlm2", None, "it is not known what transformers calls model.layers.2"),
        ("gguf", "deepseek_v3", None, "no adapter of deepseek_v3 models is known to work"),
        ("merged-float", "internlm2", 4, "weights of internlm2 models is not known"),
        ("merged-float", "deepseek_v3", 4, "mlx-lm cannot dequantize"),
        ("peft", "qwen3_moe", None, "PEFT has no LoRA of model.layers.3.mlp.switch_mlp.down_proj"),
        ("gguf", "granitemoe", None, "takes no LoRA of model.layers.2.block_sparse_moe.switch_mlp"),
    ],
)
def test_what_a_form_cannot_hold_is_reported_before_training(
    call: Run, data: Path, tmp_path: Path, form: str, name: str, bits: int | None, reason: str
) -> None:
    base = make_base(tmp_path / "base", name, bits)
    flags = ["--model", base, "--data", data, "--train", "--adapter-file", tmp_path / "a.npz"]
    flags += ["--lora-layers", 2, "--targets", "all,experts"]
    ended = call(*flags, "--export", form, tmp_path / "out.gguf")
    one_error(ended, f"--export {form}: ", reason)
    assert "Iter" not in ended.stdout
    assert not (tmp_path / "out.gguf").exists() and not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_merged_model_that_says_something_else_is_not_kept(
    call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
) -> None:
    """As if nothing were merged."""
    base = make_base(tmp_path / "base", "llama", dtype=dtype)
    make_adapter(tmp_path / "a.npz", base)
    flags = ["--model", base, "--adapter-file", tmp_path / "a.npz"]
    export_merged = ["--export", "merged", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(models.Adapted, "merged", lambda module: module.frozen)
        one_error(call(*flags, *export_merged), "so it was not kept")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz", "base"]
    assert call(*flags, *export_merged).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_something_is_exported_leaves_nothing(tmp_path: Path, number: int) -> None:
    def stopped() -> None:
        with raising_signals("out is not made"), whole_folder(tmp_path / "out") as part:
            (part / "half").touch()
            os.kill(os.getpid(), number)
            time.sleep(1)

    with pytest.raises(Interrupted, match="out is not made"):
        stopped()
    assert not list(tmp_path.iterdir())


def test_a_merged_folder_is_a_whole_model(call: Run, model: Path, tmp_path: Path) -> None:
    tiny.make_adapter(tmp_path / "a.npz")
    flags = ["--model", model, "--adapter-file", tmp_path / "a.npz"]
    assert call(*flags, "--export", "merged", tmp_path / "new/out").returncode == 0
    (tmp_path / "new/out").rename(tmp_path / "out")
    (tmp_path / "new").rmdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert not list((tmp_path / "out").glob("*.py"))
    assert len(list(tmp_path.iterdir())) == 2
