"""Training speed and memory beside `mlx_lm.lora`, on the same model and texts, measured in turn.

    python tests/bench/compare_mlx_lm.py [--model FOLDER] [--rounds 2] [--float32]

Both adapt the query and value projections of the last 16 layers with rank 8, in batches of 4
texts (the questions of the shipped set). Tokens per second are those that each program reports
for the second half of its iterations; peak memory is the operating system's for the whole process.
With --float32 both train on a float32 copy of the model: mlx_lm.lora computes quantized products
very slowly on a CPU, where this program dequantizes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZE, LAYERS = 4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="an MLX model folder (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iters", type=int, default=4, help="iterations a run, an even number")
    parser.add_argument("--float32", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        compare(Path(work), args.model, args.rounds, args.iters, args.float32)


def compare(work: Path, model: Path | None, rounds: int, iters: int, float32: bool) -> None:
    """Run the two in turn and print a line a run, then the table of medians and the ratio."""
    model = model or demo_model()
    if float32:
        model = dequantized(model, work / "float32")
    write_data(work / "data")
    results: dict[str, list[tuple[float, float]]] = {"train_lora.py": [], "mlx_lm.lora": []}
    for number in range(1, rounds + 1):
        for name, run in [("train_lora.py", run_ours), ("mlx_lm.lora", run_mlx_lm)]:
            speed, memory = run(work, model, iters)
            results[name].append((speed, memory))
            print(f"round {number}: {name:13} {speed:8.1f} tokens/s {memory:6.2f} GB", flush=True)
    print(f"\n{model.name}, median of {rounds}, {os.cpu_count()} CPU cores")
    print(f"{'':13} {'tokens/s':>10} {'peak memory':>12}")
    for name, runs in results.items():
        speed, memory = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:13} {speed:10.1f} {memory:9.2f} GB")
    pairs = zip(*results.values(), strict=True)
    ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
    print(f"tokens/s, ratio in pairs: {ratio:.1f}")


def demo_model() -> Path:
    command = [sys.executable, "-m", "lora_finetune.demo_model"]
    return Path(subprocess.check_output(command, cwd=ROOT, text=True).strip())


def dequantized(model: Path, copy: Path) -> Path:
    """A float32 copy of a model folder."""
    program = (
        "import sys, models, mlx_lm.utils as u; model, tokenizer = models.load(sys.argv[1]);"
        "c = u.load_config(u.Path(sys.argv[1])); c.pop('quantization', None);"
        "u.save(u.Path(sys.argv[2]), sys.argv[1], model, tokenizer, c)"
    )
    subprocess.run([sys.executable, "-c", program, str(model), str(copy)], cwd=ROOT, check=True)
    return copy


def write_data(folder: Path) -> None:
    """Training texts for both; mlx_lm.lora validates only where there is a valid.jsonl."""
    folder.mkdir()
    texts = [
        json.loads(line)["question"]
        for file in sorted((ROOT / "data" / "korean_textbooks_qa").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def run_ours(work: Path, model: Path, iters: int) -> tuple[float, float]:
    """Tokens per second and peak memory in GB of train_lora.py."""
    data = work / "ours"
    data.mkdir(exist_ok=True)
    texts = (work / "data" / "train.jsonl").read_text(encoding="utf-8")
    (data / "train.jsonl").write_text(texts, encoding="utf-8")
    (data / "valid.jsonl").write_text('{"text": "?"}\n', encoding="utf-8")
    adapter = work / "ours.npz"
    _, memory = measured(
        [str(ROOT / "train_lora.py"), "--train", "--model", str(model), "--data", str(data)]
        + ["--batch-size", str(BATCH_SIZE), "--lora-layers", str(LAYERS), "--iters", str(iters)]
        + ["--steps-per-report", str(iters // 2), "--adapter-file", str(adapter)]
    )
    log = adapter.with_suffix(".log.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [json.loads(line).get("tokens_per_sec") for line in log]
    return [speed for speed in speeds if speed][-1], memory


def run_mlx_lm(work: Path, model: Path, iters: int) -> tuple[float, float]:
    """The same of mlx_lm.lora, as it comes; only the adapted layers and the rank are set."""
    config = work / "config.yaml"
    config.write_text(
        "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0, "
        "keys: [self_attn.q_proj, self_attn.v_proj]}\n"
    )
    output, memory = measured(
        ["-m", "mlx_lm", "lora", "--train", "--model", str(model), "--data", str(work / "data")]
        + ["--batch-size", str(BATCH_SIZE), "--num-layers", str(LAYERS), "--iters", str(iters)]
        + ["--steps-per-report", str(iters // 2), "--adapter-path", str(work / "mlx_lm")]
        + ["-c", str(config)]
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    reports = re.findall(r"^ +\d+ +[\d.]+ [▼▲] +([\d,]+)", plain, re.MULTILINE)
    return float(reports[-1].replace(",", "")), memory


def measured(arguments: list[str]) -> tuple[str, float]:
    """Run Python with these arguments; its standard output and its peak memory in GB."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{text}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB
    return text, usage.ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()
