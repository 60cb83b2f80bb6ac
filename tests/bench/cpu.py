"""Whole runs on a CPU beside mlx_lm.lora and PyTorch + PEFT, in turn, in float32.

    python tests/bench/cpu.py [--epochs 1] [--rounds 2] [--vocabulary | --hybrid] [--peft PYTHON]

All adapt the query and value projections of the last 16 layers of the demo model with rank 8, on
160 questions of the shipped set in batches of 4, and validate on 20 before and after. With
--vocabulary: a random model of Gemma 3 270M's shape (262,144 tokens), 20 batches of 2 texts of 136
tokens. With --hybrid: a random model of four of Qwen3-Next's layers, three of them with the gated
delta rule, narrower and without experts, 8 texts of 512 tokens one by one. --peft: the Python of an
environment with torch, transformers and peft. mlx_lm.lora has the same BLAS. Seconds are of the
whole process, and memory is the most that it held.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

GEMMA_270M = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 262_144,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mlp_only_layers": [0, 1, 2, 3],
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 0,
    "shared_expert_intermediate_size": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "vocab_size": 320,
    "max_position_embeddings": 32_768,
}
MLX_LM_LORA = "from lora_finetune import linux_cpu; from mlx_lm.lora import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vocabulary", action="store_true")
    parser.add_argument("--hybrid", action="store_true")
    parser.add_argument("--peft", metavar="PYTHON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # In a process of its own: Linux counts what a parent holds as its child's at the start.
        make, batch_size, layers = make_questions, 4, 16
        if args.vocabulary:
            make, batch_size, layers = make_vocabulary, 2, 18
        elif args.hybrid:
            make, batch_size, layers = make_hybrid, 1, 4
        process = multiprocessing.get_context("spawn").Process(target=make, args=(work,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit("the model and the texts could not be made")
        compare(contenders(work, batch_size, layers, args.epochs, args.peft), args.rounds)


def make_questions(work: Path) -> None:
    """The demo model in float32, as all three can load it, and the questions."""
    import models
    import tiny
    from lora_finetune.demo import demo_model

    from mlx_lm import utils

    source = demo_model.fetch()
    model, tokenizer = models.load(source)
    config = utils.load_config(source)
    config.pop("quantization", None)
    utils.save(work / "model", str(source), model, tokenizer, config)
    texts = list(questions())
    tiny.write_jsonl(work / "data", "train", texts[:160])
    tiny.write_jsonl(work / "data", "valid", texts[160:180])


def make_vocabulary(work: Path) -> None:
    """The random model with the large vocabulary, and random texts."""
    import tiny

    config = tiny.LLAMA | GEMMA_270M
    model = tiny.build_model(config)
    model.pop("lm_head")  # it is tied to the embedding
    tiny.write_model(work / "model", model, config)
    texts = list(random_texts(60, 135))
    tiny.write_jsonl(work / "data", "train", texts[:40])
    tiny.write_jsonl(work / "data", "valid", texts[40:])


def make_hybrid(work: Path) -> None:
    """The random hybrid, and random texts."""
    import tiny

    tiny.write_model(work / "model", tiny.build_model(QWEN3_NEXT), QWEN3_NEXT)
    texts = list(random_texts(10, 511))
    tiny.write_jsonl(work / "data", "train", texts[:8])
    tiny.write_jsonl(work / "data", "valid", texts[8:])


def questions() -> Iterator[str]:
    for file in sorted((ROOT / "data" / "korean_textbooks_qa").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["question"]


def random_texts(number: int, letters: int) -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(number):
        yield "".join(rng.choice("abcdefg ") for _ in range(letters))


def contenders(
    work: Path, batch_size: int, layers: int, epochs: int, peft: str | None
) -> dict[str, list[str]]:
    """The command of each, by its name."""
    number = len((work / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines())
    iters = epochs * number // batch_size
    (work / "config.yaml").write_text(
        "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0, "
        "keys: [self_attn.q_proj, self_attn.v_proj, linear_attn.in_proj_qkvz]}\n"
    )
    shared = ["--train", "--model", str(work / "model"), "--data", str(work / "data")]
    shared += ["--batch-size", str(batch_size), "--iters", str(iters), "--learning-rate", "2e-5"]
    ours = [sys.executable, str(ROOT / "train_lora.py"), *shared, "--lora-layers", str(layers)]
    ours += ["--adapter-file", str(work / "ours.npz")]
    theirs = [sys.executable, "-c", MLX_LM_LORA, *shared, "--num-layers", str(layers)]
    theirs += ["-c", str(work / "config.yaml"), "--adapter-path", str(work / "theirs")]
    found = {"train_lora.py": ours, "mlx_lm.lora": theirs}
    if peft:
        script = str(Path(__file__).with_name("peft_lora.py"))
        numbers = [str(number) for number in (batch_size, layers, iters)]
        found["PEFT"] = [peft, script, str(work / "model"), str(work / "data"), *numbers]
    return found


def compare(commands: dict[str, list[str]], rounds: int) -> None:
    """Run all in turn, and print a line a run, then the medians of the ratios."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(1, rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            _, memory = measured(command)
            results[name].append((time.perf_counter() - start, memory))
            seconds = results[name][-1][0]
            print(f"round {number}: {name:13} {seconds:7.1f} s {memory:6.2f} GB", flush=True)
    ours = results.pop("train_lora.py")
    for name, runs in results.items():
        pairs = list(zip(ours, runs, strict=True))
        speed = statistics.median(other[0] / mine[0] for mine, other in pairs)
        memory = statistics.median(mine[1] / other[1] for mine, other in pairs)
        print(f"{name}: {speed:.2f} times its speed, {memory:.2f} of its memory", flush=True)


def measured(command: list[str]) -> tuple[str, float]:
    """Run a command; its standard output and its peak memory in GB."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB
    return text, usage.ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()
