#!/bin/sh
# PEFT drops the LoRA of a router, and says nothing, where transformers 5 has another name for it
# than transformers 4, under which the adapter was trained; Mixtral's alone it finds.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
cat > show.py <<'PYTHON'
import json
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

transformers.utils.logging.set_verbosity_error()
print("peft", peft.__version__, "transformers", transformers.__version__)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
sizes |= dict(num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0)
sizes |= dict(bos_token_id=1, eos_token_id=2)
lost = []
for kind, router in [
    ("Mixtral", "block_sparse_moe.gate"),
    ("Phimoe", "block_sparse_moe.gate"),
    ("GraniteMoe", "block_sparse_moe.router.layer"),
]:
    # As PEFT wrote it with transformers 4, where the router was an nn.Linear of that name.
    adapter = Path(kind)
    adapter.mkdir()
    arrays = {}
    for path, rows in [("self_attn.q_proj", 32), (router, 4)]:
        name = f"base_model.model.model.layers.0.{path}"
        arrays[f"{name}.lora_A.weight"] = torch.randn(8, 32)
        arrays[f"{name}.lora_B.weight"] = torch.randn(rows, 8)
    save_file(arrays, adapter / "adapter_model.safetensors")
    names = ["q_proj", router.rpartition(".")[2]]
    config = dict(peft_type="LORA", r=8, lora_alpha=8, target_modules=names)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    base = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter)
    said = [str(w.message) for w in caught if "target" in str(w.message) or "key" in str(w.message)]
    found = [n.split(".lora_A")[0].split("layers.0.")[1] for n, _ in model.named_parameters() if ".lora_A" in n]
    print(f"{kind}: the file adapts self_attn.q_proj and {router}; loaded: {found}; warnings: {said}")
    if len(found) == 1 and not said:
        lost.append(kind)
raise SystemExit(lost != ["Phimoe", "GraniteMoe"])
PYTHON
venv/bin/python show.py
