"""What is exported has the names, layouts and files that transformers and PEFT want.

reference/modules.json has what transformers calls in memory what it calls otherwise in its files;
reference/make_modules.py makes it. Each model below was exported and loaded there.
"""

import json
import re
from pathlib import Path

import models
import tiny
from conftest import Run
from lora_finetune.adapters import export, loading, merged, peft
from lora_finetune.mlx_patches.loading import as_loaded, load_as_stored
from lora_finetune.model_folder.weights import read_weights
from test_export import make_adapter, make_base, randomize
from test_model_config import REFERENCE, write_folder

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config, save_model

MODULES = json.loads((Path(__file__).parent / "reference/modules.json").read_text("utf-8"))

# As MLX has them, mlx-lm has left out what transformers needs, or nobody has found the way back.
ONE_WAY = {name for name, entry in REFERENCE.items() if "text_config" in entry["config"]}
ONE_WAY |= {"gpt_oss", "llama4_text", "longcat_flash", "olmo_hybrid"}


def adapted_in(folder: Path) -> nn.Module:
    """The model of a folder with random LoRA in its last two layers."""
    model, _ = models.load(folder)
    models.add_lora(model, dict.fromkeys(models.find_targets(model, 2, "all"), 8))
    randomize(model)
    return model


def written_by_mlx(folder: Path, base: Path) -> Path:
    """A folder as mlx-community has them, made from one of transformers."""
    model = load_as_stored(base)[0]
    save_model(folder, model)
    save_config(json.loads((base / "config.json").read_text()), folder / "config.json")
    tiny.build_tokenizer(appends_eos=False).save(str(folder / "tokenizer.json"))
    return folder


def sources(folder: Path, arrays: dict[str, mx.array], paths: list[str]) -> dict[str, set[str]]:
    """The names of the arrays that the weight of each layer is put together from.

    Each array of floats is stood for by its number in the order, and a half, throughout.
    """
    names = [name for name, array in arrays.items() if mx.issubdtype(array.dtype, mx.floating)]
    by_mark = {number + 0.5: name for number, name in enumerate(names)}
    marks = {n: mx.broadcast_to(mx.array(m), arrays[n].shape) for m, n in by_mark.items()}
    made, found = as_loaded(folder, arrays | marks), {}
    for path in paths:
        weight = made[f"{path}.weight"]
        seen = np.unique(np.array(mx.concatenate([weight[:, 0], weight[0]])))
        found[path] = {by_mark[mark] for mark in seen.tolist()}
    return found


@pytest.mark.parametrize("name", REFERENCE)
def test_peft_is_given_the_names_of_transformers_modules(name: str, tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", REFERENCE[name])
    model = adapted_in(base)
    if name == "longcat_flash":
        with pytest.raises(ValueError, match="has no effect"):
            peft.module_names(model, base)
        return
    paths, arrays = list(models.lora_modules(model)), read_weights(base)
    expected = {path: min(n) for path, n in sources(base, arrays, paths).items()}
    expected = {path: MODULES.get(name, {}).get(array, array) for path, array in expected.items()}
    for folder in (base, written_by_mlx(tmp_path / "mlx", base)):
        found = peft.module_names(model, folder)
        assert {path: f"{module}.weight" for path, module in found.items()} == expected


@pytest.mark.parametrize("name", REFERENCE)
def test_a_folder_of_mlx_goes_back_to_the_arrays_of_transformers(name: str, tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", REFERENCE[name])
    folder = written_by_mlx(tmp_path / "mlx", base)
    if name in ONE_WAY:
        with pytest.raises(ValueError, match="transformers"):
            merged.check_float(adapted_in(folder), folder)
        return
    merged.check_float(adapted_in(folder), folder)
    found = merged.in_checkpoint(folder, load_as_stored(folder)[0])
    assert {array: list(found[array].shape) for array in found} == REFERENCE[name]["shapes"]
    own = read_weights(base).items()
    other = {array for array, numbers in own if not np.allclose(found[array], numbers, atol=1e-6)}
    # Where transformers loads Youtu's embedding, it zeroes the row of the padding.
    assert other == ({"model.embed_tokens.weight"} if name == "youtu" else set())


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "mixtral", "gemma3", "qwen3_5_text", "qwen3_vl", "deepseek_v3"]
)
def test_a_merged_float_model_is_its_base_but_for_the_adapted_arrays(
    call: Run, name: str, tmp_path: Path
) -> None:
    base = write_folder(tmp_path / "base", REFERENCE[name])
    make_adapter(tmp_path / "a.npz", base)
    flags = ["--model", base, "--adapter-file", tmp_path / "a.npz"]
    ended = call(*flags, "--export", "merged-float", tmp_path / "out")
    assert (ended.returncode, ended.stderr) == (0, "")
    before, after = read_weights(base), read_weights(tmp_path / "out")
    assert {n: a.shape for n, a in after.items()} == {n: a.shape for n, a in before.items()}
    changed = {n for n, array in before.items() if not mx.array_equal(array, after[n])}
    adapter = loading.read_adapter(tmp_path / "a.npz")
    paths = {re.sub(r"\.[qkv]$", "", path) for path in adapter}
    assert changed == set().union(*sources(base, before, sorted(paths)).values())
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_all_files_of_the_base_come_along_but_weights_and_programs(
    call: Run, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "llama", bits=4)
    make_adapter(tmp_path / "a.npz", base)
    taken = ["preprocessor_config.json", "chat_template.json", "additional_chat_templates/a.jinja"]
    taken += ["processor_config.json", "generation_config.json", "LICENSE"]
    left = ["modeling.py", "pytorch_model.bin", "old.PTH", "x.gguf", ".cache/a.json", "a.npz"]
    left += ["onnx/model.onnx", "onnx/config.json", "hf_quant_config.json.bak/a.ckpt"]
    for name in (*taken, *left):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    flags = ["--model", base, "--adapter-file", tmp_path / "a.npz"]
    for form in ("merged", "merged-float"):
        assert call(*flags, "--export", form, tmp_path / form).returncode == 0
        files = {str(f.relative_to(tmp_path / form)) for f in (tmp_path / form).rglob("*.*")}
        files |= {f.name for f in (tmp_path / form).iterdir()}
        assert set(taken) <= files and not files & set(left)
    config = json.loads((tmp_path / "merged-float/config.json").read_text())
    own = json.loads((base / "config.json").read_text())
    assert config == {name: own[name] for name in own if not name.startswith("quantization")}


def test_a_model_that_transformers_does_not_know_has_the_names_of_its_files_in_peft(
    tmp_path: Path,
) -> None:
    """Its modules are of code that comes with it."""
    base = make_base(tmp_path / "base", "internlm2")
    mx.save_safetensors(str(base / "model.safetensors"), read_weights(base), {"format": "pt"})
    names = peft.module_names(adapted_in(base), base)
    assert names == {path: path for path in names} and len(names) == 2 * 5


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("minimax_m3_vl", ".mlp.gate_proj", "mlp.gate_proj in one layer with another"),
        ("laguna", "mlp.shared_expert.up_proj", "shared_expert.up_proj has no effect"),
    ],
)
def test_what_peft_cannot_adapt_as_it_is_here_is_named(
    tmp_path: Path, name: str, path: str, reason: str
) -> None:
    base = make_base(tmp_path / "base", name)
    model, _ = models.load(base)
    paths = [each for each, _ in model.named_modules() if each.endswith(path)]
    models.add_lora(model, {paths[0]: 8})
    with pytest.raises(ValueError, match=reason):
        peft.module_names(model, base)


def test_in_models_with_experts_peft_is_given_the_other_mlps_as_parameters(tmp_path: Path) -> None:
    """As modules it would take them for the experts."""
    base = make_base(tmp_path / "base", "deepseek_v3")
    export.write_all([("peft", tmp_path / "p")], adapted_in(base), base)
    config = json.loads((tmp_path / "p/adapter_config.json").read_text())
    mlps = {n for n in config["target_parameters"] if ".mlp." in n}
    assert len(mlps) == 2 * 4 and "model.layers.3.mlp.shared_experts.up_proj.weight" in mlps
    assert not any(".mlp." in name for name in config["target_modules"])


def test_where_mlx_wrote_the_base_peft_is_for_the_original(call: Run, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mixtral", bits=4)
    make_adapter(tmp_path / "a.npz", base)
    flags = ["--model", base, "--adapter-file", tmp_path / "a.npz"]
    ended = call(*flags, "--export", "peft", tmp_path / "out")
    assert ended.returncode == 0 and "in the place of" in ended.stderr
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert "model.layers.3.mlp.gate.weight" in config["target_parameters"]
    assert not any("block_sparse_moe" in name for name in config["target_modules"])


def test_an_adapter_put_into_a_model_takes_no_bias_away(tmp_path: Path) -> None:
    """Nor does any part of the weights that is loaded alone."""
    base = make_base(tmp_path / "base", "jamba")
    plain, _ = models.load(base)
    before = {n.replace(".frozen.", ".") for n, _ in tree_flatten(plain.parameters())}
    model, _ = models.load(base)
    loading.adapt(model, export.whole_pairs(adapted_in(base)), None, None)
    after = {n.replace(".frozen.", ".") for n, _ in tree_flatten(model.parameters())}
    assert {n for n in after if ".lora_" not in n} == before
