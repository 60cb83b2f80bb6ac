#!/bin/sh
# llama.cpp reads a LoRA of DeepSeek's attention (q_b_proj, kv_a_proj_with_mqa),
# which its own converter wrote, and never applies it: the answers are those of the base. Nothing is
# said. (src/models/deepseek2.cpp multiplies by these weights with ggml_mul_mat.)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 \
    sentencepiece==0.2.1 xllamacpp==2026.10.11549
cd "$folder"
venv/bin/pip download -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz
cat > show.py <<'PYTHON'
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
import xllamacpp

LLAMA_CPP = Path("llama_cpp_python-0.3.36/vendor/llama.cpp").absolute()
sys.path[:0] = [str(LLAMA_CPP), str(LLAMA_CPP / "gguf-py")]
import gguf  # noqa: E402
from conversion import ModelBase, ModelType, get_model_class  # noqa: E402

torch.manual_seed(0)
SIZE, TOKENS = 300, [5, 6, 7, 8, 9, 10]
common = dict(vocab_size=SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
common |= dict(num_attention_heads=4, initializer_range=0.2, pad_token_id=0)
latent = dict(q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16)
latent |= dict(v_head_dim=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2)
latent |= dict(moe_intermediate_size=32, first_k_dense_replace=2, num_key_value_heads=4)


def log_probabilities(base: str, adapter: str | None) -> np.ndarray:
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = base, 128, 1
    settings.verbosity, settings.warmup, settings.n_gpu_layers = 0, False, 0
    if adapter:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(settings)
    asked = {"prompt": TOKENS, "n_predict": 1, "n_probs": SIZE, "temperature": 0}
    kind = {"Content-Type": "application/json"}
    url = f"{server.listening_address}/completion"
    request = urllib.request.Request(url, json.dumps(asked).encode(), kind)
    answer = json.load(urllib.request.urlopen(request))
    found = {t["id"]: t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"]}
    return np.array([found[token] for token in range(SIZE)])


def convert(folder: str) -> str:
    """A folder as llama.cpp's converter makes it, with a vocabulary of numbers."""
    settings = ModelBase.load_hparams(Path(folder), False)

    class Converted(get_model_class(settings["architectures"][0])):
        model_arch = get_model_class(settings["architectures"][0]).model_arch

        def set_vocab(self) -> None:
            self.gguf_writer.add_tokenizer_model("gpt2")
            self.gguf_writer.add_token_list([f"<{number}>" for number in range(SIZE)])
            self.gguf_writer.add_token_types([1] * SIZE)
            self.gguf_writer.add_token_merges(["! !"])
            self.gguf_writer.add_eos_token_id(SIZE - 1)

    file = f"{folder}.gguf"
    with torch.inference_mode():
        Converted(Path(folder), gguf.LlamaFileType.ALL_F32, Path(file), hparams=settings).write()
    return file


changed = {}
for name, config in [
    ("llama", transformers.LlamaConfig(**common)),
    ("deepseek_v2", transformers.DeepseekV2Config(**common, **latent)),
]:
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(name)
    with torch.no_grad():
        before = model(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1).numpy()
    targets = ["q_proj"] if name == "llama" else ["q_b_proj", "kv_a_proj_with_mqa"]
    lora = peft.LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    adapted.save_pretrained(f"{name}-adapter")
    with torch.no_grad():
        after = adapted(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1).numpy()
    base, file = convert(name), f"{name}-adapter.gguf"
    script = str(LLAMA_CPP / "convert_lora_to_gguf.py")
    command = [sys.executable, script, "--base", name, "--outfile", file, f"{name}-adapter"]
    subprocess.run(command, check=True, capture_output=True)
    plain, with_it = log_probabilities(base, None), log_probabilities(base, file)
    changed[name] = np.abs(with_it - plain).max()
    print(
        f"{name}: LoRA of {', '.join(targets)} changes log-probabilities in PEFT by up to "
        f"{np.abs(after - before).max():.3f}, in llama.cpp by {changed[name]:.3f}"
    )
raise SystemExit(not (changed["llama"] > 0.1 and changed["deepseek_v2"] == 0))
PYTHON
echo "xllamacpp 2026.10.11549, llama-cpp-python 0.3.36's converter"
venv/bin/python show.py 2>/dev/null
