"""Make the reference values for adapters that go out and come in with PyTorch and PEFT.

As make_reference.py, whose checkpoints this reads, with one more, tiny_phi3/, whose attention is
fused. The tests need neither package. Made with torch 2.13.0, transformers 5.24.0 and peft 0.21.2:

    pip install torch transformers peft safetensors
    python make_exported.py

For each NAME/ it writes NAME/peft/, an adapter as PEFT saves it, with random A and B for scale 20,
and NAME/exported.npz, which holds:

    tokens       int32 (2, 12): token ids
    logits       float32 (2, 12, vocabulary): what transformers computes with PEFT's adapter
    merged/PATH  float32: the weight of each adapted layer after PEFT's merge_and_unload
"""

import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

PHI3_CONFIG = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 96,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "pad_token_id": 0,
    "max_position_embeddings": 256, "original_max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


def write_phi3(folder: Path) -> None:
    """Write a random checkpoint of Phi-3's architecture."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**PHI3_CONFIG))
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape)
        weight.data = 1 + 0.2 * noise if name.endswith("norm.weight") else 0.3 * noise
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(PHI3_CONFIG, indent=2) + "\n")


def save(adapted: PeftModel, folder: Path) -> None:
    """Write an adapter as PEFT does, but for the path of its base and the order of its layers."""
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = folder.parent.name
    config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(folder: Path, maps: list[str], rank: int) -> None:
    """Write the values for random adapters on the linear `maps` of layers 1 and 2."""
    torch.manual_seed(7)
    paths = [f"model.layers.{layer}.{path}" for layer in (1, 2) for path in maps]
    # Routers are no modules; and PEFT takes modules of such names for the experts.
    parameters = [p for p in paths if p.endswith("mlp.gate") or ".shared_expert." in p]
    config = LoraConfig(
        r=rank,
        lora_alpha=20 * rank,
        target_modules=[path for path in paths if path not in parameters],
        target_parameters=[f"{path}.weight" for path in parameters] or None,
        task_type="CAUSAL_LM",
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = (0.1 if "lora_A" in name else 0.02) * torch.randn(weight.shape)
        if "qkv_proj.lora_B" in name:  # (32 + 16 + 16, 16): queries by 8, keys by none, values by 8
            weight.data[:32, 8:] = 0
            weight.data[32:48] = 0
            weight.data[48:, :8] = 0
    save(adapted, folder / "peft")
    tokens = torch.randint(1, 96, (2, 12))
    with torch.no_grad():
        logits = adapted(tokens).logits
    merged = adapted.merge_and_unload().state_dict()
    np.savez(
        folder / "exported.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        **{f"merged/{path}": merged[f"{path}.weight"].numpy() for path in paths},
    )


if __name__ == "__main__":
    here = Path(__file__).parent
    attention = [f"self_attn.{role}_proj" for role in "qkvo"]
    mlp = ["down_proj", "gate_proj", "up_proj"]
    shared = [f"mlp.shared_expert.{name}" for name in mlp]
    write_phi3(here / "tiny_phi3")
    make(here / "tiny_llama", [*attention, *(f"mlp.{name}" for name in mlp)], rank=8)
    make(here / "tiny_qwen2_moe", [*attention, "mlp.gate", *shared], rank=8)
    fused = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    make(here / "tiny_phi3", fused, rank=16)
