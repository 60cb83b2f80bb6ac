#!/bin/sh
# PEFT puts LoRA around LongCat-Flash's router, a plain nn.Linear, whose weight transformers reads
# without calling it: the adapter changes nothing and learns nothing, in silence.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
cat > show.py <<'PYTHON'
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

print("peft", peft.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = LongcatFlashConfig(
    vocab_size=64, hidden_size=32, ffn_hidden_size=32, expert_ffn_hidden_size=16, num_layers=2,
    num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, head_dim=8, n_routed_experts=4, zero_expert_num=0, moe_topk=2,
)
model = LongcatFlashForCausalLM(config).eval()
tokens = torch.arange(3, 20)[None]
with torch.no_grad():
    plain = model(input_ids=tokens).logits
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    # Its B is not zero at first, so that it ought to change what the model says.
    lora = LoraConfig(target_modules=["classifier"], r=8, lora_alpha=512, init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    loss = adapted(input_ids=tokens, labels=tokens).loss
    changed = (adapted(input_ids=tokens).logits - plain).abs().max().item()
arrays = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
print("LoRA of:", sorted({name.partition(".lora_")[0] for name in arrays}))
print("largest change of logits:", changed)
print("the loss depends on any of it:", loss.requires_grad)
print("warnings:", [str(w.message) for w in caught if "router" in str(w.message)])
raise SystemExit(int(changed > 0 or loss.requires_grad))
PYTHON
venv/bin/python show.py
