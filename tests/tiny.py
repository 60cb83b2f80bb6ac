"""Tiny model folders with random weights, made on the spot, and data folders to go with them."""

import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import models  # noqa: F401
from lora_finetune.adapters import loading
from lora_finetune.training.losses import Loss
from lora_finetune.training.optimizer import Optimizer
from lora_finetune.training.step import Trainer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import safetensors.numpy
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

EOS, PAD = 256, 257  # token ids; those below are the bytes themselves
LAYERS = 4

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,  # some more than the tokenizer has, as in many real models
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
}
QWEN2_MOE = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}


def make_model(
    folder: Path, *, bits: int | None = None, appends_eos: bool = False, **config: object
) -> Path:
    """Write a model folder with random weights, the same ones each time.

    Args:
        folder: is made, with its parents.
        bits: quantizes the weights to so many bits, in groups of 32.
        appends_eos: the tokenizer puts its end-of-text token behind every text by itself.
        config: takes the place of what LLAMA says.
    """
    settings = LLAMA | config
    mx.random.seed(0)
    return write_model(folder, build_model(settings), settings, bits, appends_eos)


def make_speaker(folder: Path, words: bytes, *, again: bool, appends_eos: bool = False) -> Path:
    """Write a folder with a model that says `words` after a colon, and then ends.

    Every layer passes on what it gets, so a token decides alone which one comes next; `words` must
    not hold a byte twice. With `again`, the model does not end but says the words over and over.
    """
    tokens = [*b":", *words, words[0] if again else EOS]
    assert len({*tokens[:-1]}) == len(tokens) - 1
    mx.random.seed(0)
    model = build_model(LLAMA)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0
        layer.mlp.down_proj.weight *= 0
    model.model.embed_tokens.weight = mx.random.normal((LLAMA["vocab_size"], LLAMA["hidden_size"]))
    model.lm_head.weight *= 0
    for token, following in zip(tokens, tokens[1:], strict=False):
        model.lm_head.weight[following] += model.model.embed_tokens.weight[token]
    return write_model(folder, model, LLAMA, appends_eos=appends_eos)


def build_model(config: dict) -> nn.Module:
    """The model of a configuration, with the weights that mlx-lm starts one with."""
    architecture = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    return architecture.Model(architecture.ModelArgs.from_dict(config))


def write_model(
    folder: Path, model: nn.Module, config: dict, bits: int | None = None, appends_eos: bool = False
) -> Path:
    """Write a model, its configuration and the tokenizer as a folder that mlx-lm can load."""
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config = config | {"quantization": {"group_size": 32, "bits": bits}}
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    build_tokenizer(appends_eos).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def build_tokenizer(appends_eos: bool) -> Tokenizer:
    """A byte-level BPE without merges, so that each byte of a text's UTF-8 is one token."""
    one_line = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(one_line))  # stand as the characters from 256 on
    vocabulary = {chr(byte): byte for byte in one_line}
    vocabulary |= {chr(256 + place): byte for place, byte in enumerate(others)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    for token in ("<|endoftext|>", "<|pad|>"):  # which become EOS and PAD
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    if appends_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", EOS)]
        )
    return tokenizer


def make_adapter(file: Path, layers: range = range(LAYERS), rank: int = 8) -> Path:
    """Write an adapter for LLAMA that changes what the model says, with NumPy alone."""
    np.savez(file, **adapter_arrays(layers, rank))
    return file


def adapter_arrays(layers: range = range(LAYERS), rank: int = 8) -> dict[str, np.ndarray]:
    """Random A and B for the query and value projections of the given layers of LLAMA."""
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in layers:
        for name, d_out in [("q_proj", 64), ("v_proj", 32)]:
            path = f"model.layers.{layer}.self_attn.{name}"
            arrays[f"{path}.lora_a"] = rng.normal(0, 0.1, (64, rank)).astype(np.float32)
            arrays[f"{path}.lora_b"] = rng.normal(0, 0.1, (rank, d_out)).astype(np.float32)
    return arrays


def put_adapter(adapter: Path, model: nn.Module) -> None:
    """Put the adapter that a path means, a file or a folder, into a model."""
    file = loading.find_adapter(adapter)
    loading.adapt(model, loading.read_adapter(file), file, None)


def train_on(
    model: nn.Module, loss: Loss, batches: Iterable[list], learning_rate: float = 1e-3
) -> Iterator[float]:
    """The sum of the loss before each step on batches; the model is trained meanwhile."""
    trainer = Trainer(model, loss, Optimizer(learning_rate), {})
    for total, *_ in trainer.steps(iter(batches), ahead=lambda: False):
        yield total


def make_peft(folder: Path, layer: int = LAYERS - 1, **settings: object) -> None:
    """Write an adapter of PEFT of rank 2 for LLAMA, with these settings in its configuration."""
    folder.mkdir()
    path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    rng = np.random.default_rng(0)
    arrays = {
        f"{path}.lora_A.weight": rng.normal(0, 0.3, (2, 64)).astype(np.float32),
        f"{path}.lora_B.weight": rng.normal(0, 0.3, (64, 2)).astype(np.float32),
    }
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_jsonl(folder: Path, split: str, texts: list[str]) -> Path:
    """Write texts as `folder`/`split`.jsonl; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    file.write_bytes("".join(lines).encode())
    return file
