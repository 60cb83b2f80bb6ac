"""The same training as tests/bench/cpu.py has train_lora.py do, with PyTorch and PEFT.

python peft_lora.py MODEL DATA BATCH_SIZE LAYERS ITERS
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(file: Path, tokenizer) -> list[list[int]]:
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]


def batch_of(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Padded on the right; what is padding has no loss."""
    width = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    is_text = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    labels = tokens.where(is_text == 1, -100)
    return {"input_ids": tokens, "attention_mask": is_text, "labels": labels}


def main() -> None:
    folder, data, batch_size, layers, iters = (
        sys.argv[1],
        Path(sys.argv[2]),
        *map(int, sys.argv[3:]),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    last = range(model.config.num_hidden_layers - layers, model.config.num_hidden_layers)
    config = LoraConfig(
        r=8, lora_alpha=160, target_modules=["q_proj", "v_proj"], layers_to_transform=list(last)
    )
    model = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    training, validation = (
        read(data / f"{split}.jsonl", tokenizer) for split in ("train", "valid")
    )

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            for start in range(0, len(validation), batch_size):
                model(**batch_of(validation[start : start + batch_size]))
        model.train()

    validate()
    order = []
    for number in range(iters):
        if len(order) < batch_size:  # batches of texts of similar length, as the others have them
            by_length = sorted(range(len(training)), key=lambda i: len(training[i]))
            starts = torch.randperm(len(training) // batch_size) * batch_size
            order = [i for start in starts for i in by_length[start : start + batch_size]]
        rows, order = order[:batch_size], order[batch_size:]
        loss = model(**batch_of([training[i] for i in rows])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 10 == 9:
            print(number + 1, loss.item(), flush=True)
    validate()


if __name__ == "__main__":
    main()
