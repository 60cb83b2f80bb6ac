"""Make the reference values for the LoRA tests with PyTorch and PEFT.

The tests only read the files that this script writes beside itself, and need neither package. To
make the files again (the same versions on the same CPU give the same bytes):

    pip install torch transformers peft safetensors
    python make_reference.py

They were made with torch 2.13.0, transformers 5.23.0, peft 0.21.2, safetensors 0.8.0 and
numpy 2.4.6, on a CPU. Each of tiny_llama/ and tiny_qwen2_moe/ is a checkpoint as Hugging Face
models have them (config.json, float32 model.safetensors), with reference.npz, which holds:

    tokens      int32 (4, 17): token ids, each row padded on the right with zeros
    lengths     int32 (4,): how many tokens of each row are real
    num_tokens  int64 scalar: how many predictions of a real token there are
    loss        float64 scalar: the mean cross-entropy, in nats, of those predictions
    NAME        float32: the adapter that the loss and the gradients belong to
    grad/NAME   float64: d loss / d NAME

NAME is model.layers.N.P.lora_a, of shape (d_in, 8), or model.layers.N.P.lora_b, of shape
(8, d_out), for each adapted linear map P of layers 1 and 2, which takes a row vector x to
x W^T + bias + 20 (x lora_a) lora_b.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

RANK, SCALE = 8, 20.0
ADAPTED_LAYERS = (1, 2)  # The last two of three, so that layer 0 must stay as it is.
LENGTHS = torch.tensor([9, 17, 4, 13])

# rope_theta stands here as in real checkpoints. transformers 5 itself would save it inside
# rope_parameters, where not every reader looks.
SHARED_CONFIG = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 256, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "torch_dtype": "float32",
}  # fmt: skip
LLAMA_CONFIG = SHARED_CONFIG | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
QWEN2_MOE_CONFIG = SHARED_CONFIG | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1,
    "output_router_logits": False, "router_aux_loss_coef": 0.001, "use_sliding_window": False,
}  # fmt: skip


class Float64Throughout(TorchFunctionMode):
    """While active, turns every conversion to float32 into one to float64.

    transformers computes norms, softmaxes and rotary angles in float32 even in a float64 model,
    with errors as large as those of the float32 program under test.
    """

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call `func` with the dtype float64 in place of each argument that is float32."""
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def write_checkpoint(folder: Path, config: dict, generator: torch.Generator) -> None:
    """Write config.json and a random float32 model.safetensors to `folder`."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for name, weight in model.named_parameters():
        # Large enough that attention and router choose sharply and the loss is far from log(96).
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.2 * noise if name.endswith("norm.weight") else 0.3 * noise
    # This also splits the expert weights, stacked in memory, into those of a real checkpoint.
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def add_adapter(
    model: PreTrainedModel, maps: list[str], generator: torch.Generator
) -> dict[str, torch.nn.Parameter]:
    """Adapt the linear `maps` of `model` in place and return the adapter under mlx-lm's names.

    The float64 parameters, of float32 values, keep PEFT's shapes: A is (8, d_in), B (d_out, 8).
    """
    paths = [f"model.layers.{layer}.{path}" for layer in ADAPTED_LAYERS for path in maps]
    # In transformers 5 the router is no nn.Linear; PEFT adapts its bare weight instead.
    lora_config = LoraConfig(
        r=RANK,
        lora_alpha=SCALE * RANK,
        lora_dropout=0.0,
        target_modules=[path for path in paths if not path.endswith("mlp.gate")],
        target_parameters=[f"{path}.weight" for path in paths if path.endswith("mlp.gate")],
    )
    adapter = {}
    for name, weight in get_peft_model(model, lora_config).named_parameters():
        if weight.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            adapter[name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = weight
            # B, usually zero at the start, must not be zero here: the gradient of A would be.
            std = 0.1 if "lora_A" in name else 0.02
            weight.data.copy_(std * torch.randn(weight.shape, generator=generator))
    assert sorted(adapter) == sorted(f"{path}.lora_{x}" for path in paths for x in "ab")
    return adapter


def mean_loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the float64 scalar mean cross-entropy of predicting `tokens`, int64 (4, 17).

    Padding comes last in its row and attention is causal, so real tokens need no attention mask.
    """
    logits = model(tokens[:, :-1]).logits  # (4, 16, 96)
    is_real = torch.arange(1, tokens.shape[1]) < LENGTHS[:, None]  # (4, 16)
    return torch.nn.functional.cross_entropy(logits[is_real], tokens[:, 1:][is_real])


def to_numpy(tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, np.ndarray]:
    """Return float64 copies of PEFT's A and B matrices, transposed to mlx-lm's shapes."""
    return {prefix + name: tensor.detach().numpy().T.copy() for name, tensor in tensors.items()}


def make_reference(folder: Path, config: dict, maps: list[str], seed: int) -> None:
    """Write a model, and the values for adapters on its linear `maps`, to `folder`."""
    generator = torch.Generator().manual_seed(seed)
    write_checkpoint(folder, config, generator)
    tokens = torch.randint(1, 96, (len(LENGTHS), max(LENGTHS)), generator=generator)
    tokens[torch.arange(tokens.shape[1]) >= LENGTHS[:, None]] = 0
    tokens[0, 5] = 0  # A real token may equal the padding: only the lengths tell them apart.

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with Float64Throughout():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)
        adapter = add_adapter(model, maps, generator)
        start = {name: value.astype(np.float32) for name, value in to_numpy(adapter).items()}

        loss = mean_loss(model, tokens)
        loss.backward()
        grad = to_numpy({name: weight.grad for name, weight in adapter.items()}, "grad/")

    np.savez(
        folder / "reference.npz",
        tokens=tokens.numpy().astype(np.int32),
        lengths=LENGTHS.numpy().astype(np.int32),
        num_tokens=np.int64((LENGTHS - 1).sum()),
        loss=loss.detach().numpy(),
        **start,
        **grad,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # The order of sums, and so the last bits, depends on the number.
    here = Path(__file__).parent
    attention = ["self_attn.q_proj", "self_attn.v_proj"]
    make_reference(here / "tiny_llama", LLAMA_CONFIG, attention, seed=1)
    # Under this seed no real token has nearly tied experts: its second and third best differ
    # by 0.003 or more in probability, so that float32 makes the choices of float64.
    make_reference(here / "tiny_qwen2_moe", QWEN2_MOE_CONFIG, [*attention, "mlp.gate"], seed=89)
