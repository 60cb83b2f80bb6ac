"""A GGUF adapter is that of llama.cpp's converter, and says in llama.cpp what it says here.

reference/gguf.json has what the converter makes; reference/make_gguf.py makes it.
"""

import json
import re
from pathlib import Path

import models
import tiny
from conftest import Run
from lora_finetune.adapters import export, gguf, loading
from lora_finetune.base.errors import UserError
from lora_finetune.model_folder.weights import read_weights
from reference.make_gguf import FILE, NOT_CONVERTED, content, make_model
from test_export import ask, make_adapter, make_base

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import xllamacpp
from gguf import MODEL_ARCH, GGUFReader, GGUFWriter, TokenType, get_tensor_name_map
from mlx_lm.generate import generate_step

REFERENCE = json.loads(FILE.read_text("utf-8"))


def test_every_type_of_model_was_compared():
    assert REFERENCE.keys() == gguf.ARCHITECTURES.keys() - NOT_CONVERTED


@pytest.mark.parametrize("name", REFERENCE)
def test_the_file_is_that_of_the_converter(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    export.write_all([("gguf", tmp_path / "a.gguf")], model, tmp_path, name)
    assert content(tmp_path / "a.gguf") == REFERENCE[name]


def test_of_gpt_2_a_and_b_are_where_llama_cpp_has_them(tmp_path: Path) -> None:
    """A (d_in), B (d_out), though the base's own weights are stored the other way round."""
    model = make_model("gpt2", tmp_path)
    export.write_all([("gguf", tmp_path / "a.gguf")], model, tmp_path, "gpt2")
    shapes = {
        name[6:]: tensor[:2] for name, tensor in content(tmp_path / "a.gguf")["tensors"].items()
    }
    wide = {"attn_output": (64, 64), "attn_qkv": (64, 192), "ffn_down": (256, 64)}
    wide["ffn_up"] = (64, 256)
    assert shapes == {f"{layer}.weight.lora_a": [d_in, 6] for layer, (d_in, _) in wide.items()} | {
        f"{layer}.weight.lora_b": [6, d_out] for layer, (_, d_out) in wide.items()
    }


@pytest.mark.parametrize(
    ("layers", "experts", "architecture"),
    [("mamba", 2, "granitehybrid"), ("attention", 2, "granitemoe"), ("attention", 0, "granite")],
)
@pytest.mark.parametrize("transformers", [4, 5])
def test_granite_4_is_what_llama_cpp_calls_it_by_its_layers(
    layers: str, experts: int, architecture: str, transformers: int
) -> None:
    names = {"mamba": "linear_attention", "attention": "full_attention"}
    kinds = [kind if transformers == 4 else names[kind] for kind in (layers, "attention")]
    config = {"model_type": "granitemoehybrid", "num_experts_per_tok": experts}
    assert gguf.architecture_of(config | {"layer_types": kinds}) == architecture


def test_a_layer_of_which_llama_cpp_ignores_lora_is_named(tmp_path: Path) -> None:
    model = make_model("lfm2", tmp_path)
    models.add_lora(model, {"model.layers.0.conv.in_proj": 2})
    with pytest.raises(UserError, match=r"no LoRA of model.layers.0.conv.in_proj.*merged-float"):
        export.check_forms([("gguf", tmp_path / "a.gguf")], model, tmp_path)


def test_experts_are_stacked_as_llama_cpp_has_them(tmp_path: Path) -> None:
    """Tried in it: a qwen3moe with such an adapter says there what it says here."""
    base = make_base(tmp_path / "base", "qwen3_moe")
    make_adapter(tmp_path / "a.npz", base, "experts")
    model, _ = models.load(base)
    tiny.put_adapter(tmp_path / "a.npz", model)
    export.write_all([("gguf", tmp_path / "a.gguf")], model, base)
    tensors = {t.name: t.data for t in GGUFReader(tmp_path / "a.gguf").tensors}
    adapter = loading.read_adapter(tmp_path / "a.npz")
    assert len(tensors) == 2 * len(adapter)
    for which, array in zip("ab", adapter["model.layers.3.mlp.switch_mlp.up_proj"], strict=True):
        np.testing.assert_array_equal(tensors[f"blk.3.ffn_up_exps.weight.lora_{which}"], array)


# --- llama.cpp itself ---------------------------------------------------------------------------


def write_base(file: Path, folder: Path) -> None:
    """A llama with the tests' tokenizer as llama.cpp has it, with what its converter does."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens += [f"<{number}>" for number in range(len(tokens), config["vocab_size"])]

    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * tiny.EOS + [TokenType.CONTROL] * 44)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tiny.EOS)
    for name, array in read_weights(folder).items():
        array = np.array(array.astype(mx.float32))
        if which := re.search(r"\.([qk])_proj", name):
            halves = array.reshape(heads[which[1]], 2, -1, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def said_by_llama_cpp(base: Path, adapter: Path | None, prompt: list[int]) -> list[int]:
    """The 24 likeliest tokens, one after the other, or those up to the end of the text."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(base)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 512, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup, settings.fit_params, settings.verbosity = False, False, 0
    if adapter:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(settings)
    request = {"prompt": prompt, "n_predict": 24, "temperature": 0, "return_tokens": True}
    return ask(f"{server.listening_address}/completion", request)["tokens"]


def said_here(model: nn.Module, prompt: list[int]) -> list[int]:
    said = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=24)]
    return said[: said.index(tiny.EOS) + 1] if tiny.EOS in said else said


def test_llama_cpp_says_with_the_adapter_what_is_said_here(
    call: Run, model: Path, tmp_path: Path
) -> None:
    """And without it what is said without it."""
    write_base(tmp_path / "base.gguf", model)
    make_adapter(tmp_path / "a.npz", model)
    flags = ["--model", model, "--adapter-file", tmp_path / "a.npz"]
    assert call(*flags, "--export", "gguf", tmp_path / "a.gguf").returncode == 0
    ours, prompt, said = models.load(model)[0], [*"질문: 물은?".encode()], []
    for adapter in (None, tmp_path / "a.gguf"):
        if adapter:
            tiny.put_adapter(tmp_path / "a.npz", ours)
        said.append(said_here(ours, prompt))
        assert said_by_llama_cpp(tmp_path / "base.gguf", adapter, prompt) == said[-1]
    assert said[0] != said[1]
