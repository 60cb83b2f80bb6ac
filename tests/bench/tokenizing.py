"""Time and peak memory of reading and tokenizing 100,000 texts of 250 tokens.

    python tests/bench/tokenizing.py [--texts N] [--mask-prompt]

With the demo model's tokenizer, on pieces of the Korean set that comes with the program.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402, F401
from lora_finetune.demo import demo_model  # noqa: E402
from lora_finetune.texts import dataset, tokenizing  # noqa: E402
from lora_finetune.texts.chat import template_of  # noqa: E402

from mlx_lm import tokenizer_utils  # noqa: E402


def write_texts(file: Path, number: int) -> None:
    """Texts of a question and an answer, cut to some 140 characters, which are 250 tokens."""
    rng = random.Random(0)
    lines = (ROOT / "lora_finetune" / "data" / "train.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line)["text"].split("### 답변:\n")[1] for line in lines.splitlines()]
    with file.open("w", encoding="utf-8") as stream:
        for i in range(number):
            answer = rng.choice(answers)[:105]
            text = f"### 질문:\n{i}번의 답은 무엇입니까?\n\n### 답변:\n{answer}"
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--mask-prompt", action="store_true")
    args = parser.parse_args()
    tokenizer = tokenizer_utils.load(demo_model.fetch())
    before = peak_megabytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        write_texts(file, args.texts)
        start = time.perf_counter()
        read = dataset.read(file, args.mask_prompt)
        number = len(read.rows)
        texts = dataset.render_rows(read, template_of(tokenizer), args.mask_prompt)
        examples = tokenizing.tokenize(texts, tokenizer, add_eos=True, max_length=2048)
        seconds = time.perf_counter() - start
    print(
        f"{number} texts of {examples.lengths.mean():.0f} tokens: {seconds:.1f} s, "
        f"peak memory {peak_megabytes():.0f} MB, of which {before:.0f} before"
    )


if __name__ == "__main__":
    main()
