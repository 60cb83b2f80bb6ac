"""`make demo`: ask the demo model a question, fine-tune it on data/demo, and ask it again."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import suppress

import models
from lora_finetune.adapters import loading
from lora_finetune.base.command_line import ROOT
from lora_finetune.demo import demo_model
from lora_finetune.texts import dataset

import mlx.nn as nn
from mlx_lm import generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

QUESTION, MEANING = "물은 몇 도에서 끓습니까?", "At what temperature does water boil?"
ADAPTER = "lora_finetune/demo.npz"
# Eight answers, four questions for each, in 8 epochs. A fifth question for each is for validation,
# and they are what is asked: in five ways, so that wordings are learnt and not single questions.
TRAINING = f"""train_lora.py --train --data data/demo --adapter-file {ADAPTER} --batch-size 4
--iters 64 --learning-rate 4e-4 --mask-prompt --steps-per-eval 16 --steps-per-report 8""".split()


def ask(model: nn.Module, tokenizer: TokenizerWrapper) -> str:
    """The answer to the question, in one line: always the likeliest token, 64 at most."""
    answer = generate(model, tokenizer, dataset.join_question(QUESTION, ""), max_tokens=64)
    return " ".join(answer.rstrip("\ufffd").split())  # a character that the end cut through


def main() -> None:
    model, tokenizer = models.load(demo_model.fetch())
    before = ask(model, tokenizer)
    print(f"Question  {QUESTION}  ({MEANING})\nBefore    {before}\n", flush=True)

    print(f"$ {shlex.join([os.path.relpath(sys.executable), *TRAINING])}", flush=True)
    training = subprocess.Popen([sys.executable, *TRAINING], cwd=ROOT)
    with suppress(KeyboardInterrupt):  # which is for it to hear: it saves before it ends
        training.wait()
    if status := training.wait():
        sys.exit(status)

    loading.adapt(model, loading.read_adapter(ROOT / ADAPTER), ROOT / ADAPTER, None)
    print(
        f"\nQuestion  {QUESTION}  ({MEANING}; in other words than in the training texts)"
        f"\nBefore    {before}\nAfter     {ask(model, tokenizer)}"
        "\nPicture   lora_finetune/demo.run/losses.png: the losses"
        '\nNext      the commands above, or your own text: "Your own data" in README.md'
    )


if __name__ == "__main__":
    main()
