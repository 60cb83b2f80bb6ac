"""An adapter in a GGUF file, as llama.cpp's converter makes it of PEFT's form.

llama.cpp, Ollama and LM Studio take it beside a base in any quantization. Its A is (r, d_in) and
its B (d_out, r), of experts (experts, r, d_in) and (experts, d_out, r); its scale is alpha / r,
with one alpha for the whole file.
"""

from __future__ import annotations

import re
from pathlib import Path

import models
from lora_finetune.adapters.mlx_lm import of_one_rank
from lora_finetune.adapters.npz import Adapter
from lora_finetune.model_folder.files import read_object, text_settings
from lora_finetune.model_folder.transformers_names import checkpoint_name, module_name

import gguf
import mlx.nn as nn
import numpy as np

# Transformers' types of models, and what llama.cpp calls them where that is another name: those for
# which this file is that of its convert_lora_to_gguf.py, and llama.cpp then computes what we do.
TYPES = """
    afmoe apertus cohere:command-r cohere2 dbrx dots1 ernie4_5 ernie4_5_moe:ernie4_5-moe exaone
    exaone4 exaone_moe:exaone-moe gemma gemma2 gemma3 gemma3_text:gemma3 gemma4 gemma4_text:gemma4
    gemma4_unified:gemma4 glm:chatglm glm4 glm4_moe:glm4moe gpt2 gpt_bigcode:starcoder
    gpt_neox:gptneox gpt_oss:gpt-oss granite granitemoe granitemoehybrid:granitehybrid
    hunyuan_v1_dense:hunyuan-dense internlm3:llama iquestcoder:llama jamba lfm2 lfm2_moe:lfm2moe
    llama llama4 llama4_text:llama4 mimo_v2_flash:mimo2 minimax_m2:minimax-m2 ministral3:mistral3
    mistral:llama mistral3 mixtral:llama nemotron olmo2 olmo3:olmo2 olmoe phi:phi2 phi3 qwen2
    qwen2_5_vl:qwen2vl qwen2_moe:qwen2moe qwen2_vl:qwen2vl qwen3 qwen3_5:qwen35
    qwen3_5_moe:qwen35moe qwen3_5_moe_text:qwen35moe qwen3_5_text:qwen35 qwen3_moe:qwen3moe
    qwen3_vl:qwen3vl qwen3_vl_moe:qwen3vlmoe seed_oss smollm3 solar_open:glm4moe stablelm starcoder2
""".split()  # noqa: SIM905
ARCHITECTURES = {name: other or name for name, _, other in (t.partition(":") for t in TYPES)}

# Those whose rotary embedding takes neighbours for a pair: the two halves of each head's rows of
# queries and keys are put in turns (`permute` in the converter).
IN_TURNS = ("granite", "granitehybrid", "granitemoe", "llama", "mistral3", "smollm3")

# What llama.cpp takes LoRA of. It reads that of other weights too, and leaves it out in silence.
LAYERS = re.compile(
    r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down|gate_inp)(_shexp|_exps)?)|output"
)


def architecture_of(config: dict) -> str:
    """llama.cpp's name for the kind of a configuration; raises ValueError where it is unknown."""
    model_type = config["model_type"]
    if model_type not in ARCHITECTURES:
        raise ValueError(f"no adapter of {model_type} models is known to work in llama.cpp")
    if model_type == "exaone" and config.get("architectures") == ["LlamaForCausalLM"]:
        return "llama"  # as transformers 5 saves it; the converter goes by the class
    attention = {"attention", "full_attention"}  # as transformers 4 and 5 call it
    if model_type == "granitemoehybrid" and attention.issuperset(config["layer_types"]):
        return "granitemoe" if config.get("num_experts_per_tok") else "granite"
    return ARCHITECTURES[model_type]


def tensor_names(model: nn.Module, base: Path) -> dict[str, str]:
    """llama.cpp's names for the weights of the adapted layers, by their paths.

    Raises ValueError where it knows no such model, or takes no LoRA of such a layer.
    """
    config = read_object(base / "config.json")
    architecture, model_type = architecture_of(config), config["model_type"]
    [kind] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    known, names = gguf.get_tensor_name_map(kind, len(model.layers)), {}
    for path in models.lora_modules(model):
        theirs = module_name(model_type, path), checkpoint_name(model_type, path)
        found = (known.get_name(name.replace("language_model.", "")) for name in theirs)
        names[path] = next(filter(None, found), "")
        if not LAYERS.fullmatch(names[path]):
            raise ValueError(f"llama.cpp takes no LoRA of {path} in {architecture} models")
    return names


def write(file: str, adapter: Adapter, names: dict[str, str], base: Path, title: str) -> None:
    """Write an adapter of the model in the folder `base`, by llama.cpp's names."""
    adapter, rank = of_one_rank(adapter)
    config = read_object(base / "config.json")
    settings, architecture = dict(text_settings(config)), architecture_of(config)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(title)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, models.SCALE * rank)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for path, (a, b) in adapter.items():
        a, b = (a.T, b.T) if a.ndim == 2 else (a, b)
        b = in_order(b, names[path], architecture, settings)
        writer.add_tensor(f"{names[path]}.weight.lora_a", a)
        writer.add_tensor(f"{names[path]}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_order(b: np.ndarray, name: str, architecture: str, settings: dict) -> np.ndarray:
    """B (d_out, r) with its rows in the order of llama.cpp's weight."""
    layer, heads, rank = name.rpartition(".")[2], settings.get("num_attention_heads"), b.shape[1]
    if layer == "attn_k":
        heads = settings.get("num_key_value_heads") or heads
    if layer in ("attn_q", "attn_k") and architecture in IN_TURNS:
        return b.reshape(heads, 2, -1, rank).swapaxes(1, 2).reshape(b.shape)
    if layer == "attn_qkv" and architecture == "gptneox":  # there by heads, in llama.cpp q, k, v
        return b.reshape(heads, 3, -1, rank).swapaxes(0, 1).reshape(b.shape)
    if layer == "attn_qkv" and architecture in ("qwen35", "qwen35moe"):
        # Of the heads of values for each one of keys, llama.cpp has first the first of all.
        groups, width = settings["linear_num_key_heads"], settings["linear_value_head_dim"]
        q_and_k, v = np.split(b, [2 * groups * settings["linear_key_head_dim"]])
        v = v.reshape(groups, -1, width, rank).swapaxes(0, 1).reshape(v.shape)
        return np.concatenate([q_and_k, v])
    return b
