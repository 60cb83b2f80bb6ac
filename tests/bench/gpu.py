"""Training on a GPU beside mlx-lm: single steps, and whole runs, with random weights.

    python tests/bench/gpu.py [--steps] [--shapes] [--runs] [--quantized] [--processes]
        [--memory] [--small]

--steps: a compiled step of this program and the plain one of mlx_lm.lora in turn, each in a process
of its own, on Gumini-1B's shape in bfloat16, against the arithmetic at the matrix rate measured
beside them. --shapes: the same for Llama-3.1-8B's shape with 16 of 32 layers adapted, PEFT with and
without torch.compile too, two at a time; only if asked for. --runs: 2,000 texts of log-normal
length, 1 epoch, whole processes in turn, first with an empty cache of compiled kernels.
--quantized: the specification's example, Phi-3's shape in 8 bits, batch 4, 8 of 32 layers, 3
epochs. --processes: two processes on two GPUs with batches of 20 texts of 256 tokens, against one
with batches of 10, Gumini-1B's shape, in turn; only if asked for. --memory: peaks of steps of real
shapes, packed as on a Mac, and what they come to for each 1,000 tokens in a batch; only if asked
for. --small: all at a tiny shape.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ENVIRONMENT = dict(os.environ)  # as it is before this program sets anything of MLX in it

import models  # noqa: E402, F401
import tiny  # noqa: E402
from lora_finetune.adapters import loading  # noqa: E402
from lora_finetune.mlx_patches import patches  # noqa: E402
from lora_finetune.texts import batching  # noqa: E402
from lora_finetune.training import frozen_prefix, losses  # noqa: E402
from lora_finetune.training.optimizer import Optimizer  # noqa: E402
from lora_finetune.training.step import Trainer  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402

KEYS = ["self_attn.q_proj", "self_attn.v_proj"]
GUMINI = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "num_hidden_layers": 10,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
PHI_3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_064,
    "tie_word_embeddings": False,
}
SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 320,
}


def build(config: dict) -> nn.Module:
    sys.modules.pop(f"mlx_lm.models.{config['model_type']}", None)  # for the SwiGLU of then
    mx.random.seed(0)
    model = tiny.build_model(tiny.LLAMA | config)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


# --- Steps --------------------------------------------------------------------------------------


def matrix_rate(size: int) -> float:
    """Floating-point operations a second in products of bfloat16 matrices."""
    a, b = (mx.random.normal((size, size)).astype(mx.bfloat16) for _ in range(2))
    mx.eval(a @ b)
    start = time.perf_counter()
    for _ in range(10):
        mx.eval(a @ b)
    return 10 * 2 * size**3 / (time.perf_counter() - start)


@contextmanager
def contender(
    name: str, folder: Path, layers: int, number: int
) -> Iterator[Callable[[int, int], tuple[float, float]]]:
    """A process that tells the seconds of a step on a batch, and its peak of memory in GB."""
    command = [sys.executable, str(Path(__file__).with_name("step.py")), name, str(folder)]
    command.append(str(layers))
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def measure(rows: int, width: int) -> tuple[float, float]:
            print(rows, width, number, file=process.stdin, flush=True)
            seconds, peak = map(float, process.stdout.readline().split())
            return seconds, peak

        yield measure
        process.stdin.close()


def compare_steps(config: dict, small: bool) -> None:
    """Each contender in a process of its own, with the settings that it makes or leaves as is."""
    model = build(config)
    weights = sum(a.size for _, a in nn.utils.tree_flatten(model.parameters()) if a.ndim == 2)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        tiny.write_model(folder, model, tiny.LLAMA | config)
        names, layers = ("mlx-lm", "train_lora.py"), config["num_hidden_layers"]
        contenders = {n: stack.enter_context(contender(n, folder, layers, 40)) for n in names}
        for rows, width in [(2, 32)] if small else [(10, 256), (10, 1024)]:
            found = {name: [] for name in names}
            for _ in range(7):
                for name, measure in contenders.items():
                    found[name].append(measure(rows, width))
            rate = matrix_rate(64 if small else 8192)
            arithmetic = 4 * weights * rows * width / rate
            print(f"{rows} x {width}: {rate / 1e12:.0f} TFLOP/s, {arithmetic * 1e3:.1f} ms")
            for name, measured in found.items():
                seconds, peaks = zip(*measured, strict=True)
                median, peak = statistics.median(seconds), max(peaks)
                share = arithmetic / median
                print(f"  {name:14} {median * 1e3:7.1f} ms {share:5.0%} {peak:7.2f} GB")
            ratios = [theirs[0] / ours[0] for theirs, ours in zip(*found.values(), strict=True)]
            print(f"  faster by {statistics.median(ratios):.2f}", flush=True)


def compare_shapes(config: dict, small: bool) -> None:
    """Steps of each of the others beside those of this program, the last half of the layers."""
    config = config | {"tie_word_embeddings": False}
    layers = config["num_hidden_layers"] // 2
    with tempfile.TemporaryDirectory() as work:
        tiny.write_model(folder := Path(work, "model"), build(config), tiny.LLAMA | config)
        for other in ("mlx-lm",) if small else ("mlx-lm", "peft", "peft-compiled"):
            with (
                contender(other, folder, layers, 8) as theirs,
                contender("train_lora.py", folder, layers, 8) as ours,
            ):
                for shape in [(2, 32)] if small else [(4, 512), (4, 2048), (1, 8192)]:
                    pairs = [(theirs(*shape), ours(*shape)) for _ in range(3)]
                    ratio = statistics.median(a[0] / b[0] for a, b in pairs)
                    memory = max(b[1] for _, b in pairs) / max(a[1] for a, _ in pairs)
                    last = ", ".join(f"{s * 1e3:.1f} ms {gb:.1f} GB" for s, gb in pairs[-1])
                    print(f"{shape[0]} x {shape[1]} beside {other}: faster by {ratio:.2f}, "
                          f"memory {memory:.2f} (last: {last})", flush=True)  # fmt: skip


# --- Whole runs ---------------------------------------------------------------------------------


# mlx_lm.lora, which does not print its peak of memory.
MLX_LM_LORA = """
import mlx.core as mx
from mlx_lm.lora import main
main()
print(f"Peak mem {mx.get_peak_memory() / 1e9:.3f} GB")
"""


def write_texts(folder: Path, number: int, small: bool) -> None:
    """Texts whose tokens are their letters, of log-normal length."""
    rng = random.Random(0)
    for split, size in [("train", number), ("valid", 20)]:
        lengths = [int(rng.lognormvariate(3 if small else 5.3, 0.6)) + 2 for _ in range(size)]
        texts = ["".join(rng.choice("abcdefg ") for _ in range(min(1500, n))) for n in lengths]
        tiny.write_jsonl(folder, split, texts)


def run(arguments: list[str], work: Path, kernels: Path) -> tuple[float, float]:
    """Seconds and peak memory in GB, as the program reports it, of a process.

    Args:
        kernels: the folder for the kernels that it compiles.
    """
    kernels.mkdir(exist_ok=True)
    caches = {"MLX_PTX_CACHE_DIR": str(kernels), "CUDA_CACHE_PATH": str(kernels)}
    start = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=work, env=ENVIRONMENT | caches, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if ended.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{ended.stdout}{ended.stderr}")
    return seconds, float(re.findall(r"Peak mem ([\d.]+)", ended.stdout)[-1])


def compare_runs(name: str, config: dict, options: dict, bits: int | None, small: bool) -> None:
    """Whole runs in turn: of each one with an empty cache of kernels, then one that finds them."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiny.write_model(work / "model", build(config), tiny.LLAMA | config, bits)
        number, (batch_size, layers, epochs) = 20 if small else options["texts"], options["run"]
        layers = min(layers, config["num_hidden_layers"])
        write_texts(work / "data", number, small)
        iters = epochs * -(-number // batch_size)
        mlx_epoch = epochs * (number // batch_size)
        (work / "config.yaml").write_text(
            "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0, "
            f"keys: {json.dumps(options['keys'])}}}\n"
        )
        shared = ["--train", "--model", "model", "--data", "data", "--batch-size", str(batch_size)]
        ours = [str(ROOT / "train_lora.py"), *shared, "--lora-layers", str(layers)]
        ours += ["--iters", str(iters), "--adapter-file", "a.npz"]
        theirs = ["-c", MLX_LM_LORA, *shared, "--num-layers", str(layers), "-c", "config.yaml"]
        theirs += ["--iters", str(mlx_epoch), "--adapter-path", "theirs"]
        results = {"mlx_lm.lora": [], "train_lora.py": []}
        for turn in range(2):
            for program, arguments in (("mlx_lm.lora", theirs), ("train_lora.py", ours)):
                results[program].append(run(arguments, work, work / f"kernels of {program}"))
                print(f"  {name}, turn {turn}: {program:14} {results[program][-1]}", flush=True)
        last = [found[-1] for found in results.values()]
        ratios = [theirs[0] / ours[0] for theirs, ours in zip(*results.values(), strict=True)]
        memory = last[1][1] / last[0][1]
        print(
            f"{name}: faster by {ratios[0]:.2f} without kernels, {ratios[1]:.2f} with them, "
            f"memory {memory:.2f}",
            flush=True,
        )


# --- Memory -------------------------------------------------------------------------------------

QWEN = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151_936}
SHAPES = {
    "Qwen2.5-0.5B": QWEN | {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
                            "num_attention_heads": 14, "tie_word_embeddings": True},
    "Gumini-1B": GUMINI,
    "Qwen2.5-1.5B": QWEN | {"hidden_size": 1536, "num_hidden_layers": 28,
                            "intermediate_size": 8960, "num_attention_heads": 12,
                            "tie_word_embeddings": True},
    "Phi-3-mini 3.8B": PHI_3,
    "Llama-3.1-8B": {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
                     "intermediate_size": 14336, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "vocab_size": 128_256},
    "Qwen2.5-14B": QWEN | {"hidden_size": 5120, "num_hidden_layers": 48,
                           "intermediate_size": 13824, "num_attention_heads": 40,
                           "num_key_value_heads": 8},
}  # fmt: skip


def step_peak(model: nn.Module, rows: int, width: int) -> float:
    """The peak of memory in GB of a step on so many texts of so many tokens."""
    tokens = np.random.default_rng(0).integers(0, 300, rows * width).astype(np.int32)
    examples = batching.Examples(tokens, np.arange(rows + 1) * width, np.arange(len(tokens)) > 0)
    loss = losses.make_loss(model)
    if prefix := frozen_prefix.find(model):
        loss, examples = prefix.loss(loss), prefix.examples(examples)
    model.train()
    trainer = Trainer(model, loss, Optimizer(2e-5), {})
    for _ in range(2):
        mx.clear_cache()
        mx.reset_peak_memory()
        next(trainer.steps(iter([[examples.batch(np.arange(rows))]]), ahead=lambda: False))
    return mx.get_peak_memory() / 1e9


def measure_memory(small: dict) -> None:
    """Peaks of steps on texts of 512 tokens, 16 layers adapted."""
    width = 17 if small else 513
    for name, config in SHAPES.items():
        for bits in (4, 8, 16):
            if bits == 16 and config["hidden_size"] > 3072:
                continue
            model = build(config | small)
            if bits < 16:
                nn.quantize(model, group_size=64, bits=bits)
                mx.eval(model.parameters())
            mx.clear_cache()
            weights = mx.get_active_memory() / 1e9
            loading.adapt(model, {}, None, min(16, len(model.layers)))
            with patches.applied():
                peaks = {rows: step_peak(model, rows, width) for rows in (1, 8)}
            each = (peaks[8] - peaks[1]) / 7 / (width - 1) * 1000
            shown = ", ".join(f"{rows} texts {peak:.2f}" for rows, peak in peaks.items())
            print(f"{name}, {bits} bits: weights {weights:.2f} GB; {shown} GB; "
                  f"{each:.2f} GB for 1,000 tokens", flush=True)  # fmt: skip
            del model


# --- Processes ----------------------------------------------------------------------------------

LAUNCH = ["-c", "from mlx._distributed_utils.launch import main; main()", "-n", "2", "--"]


def compare_processes(config: dict, small: bool) -> None:
    """Tokens a second of two processes against one, after what their first reports need to warm up.

    Where there is one GPU or none, both share what there is.
    """
    with tempfile.TemporaryDirectory() as folder:
        work, rng = Path(folder), random.Random(0)
        tiny.write_model(work / "model", build(config), tiny.LLAMA | config)
        for split, size in [("train", 400), ("valid", 20)]:
            letters = 15 if small else 256
            texts = ["".join(rng.choice("abcdefg ") for _ in range(letters)) for _ in range(size)]
            tiny.write_jsonl(work / "data", split, texts)
        ours = [str(ROOT / "train_lora.py"), "--train", "--model", "model", "--data", "data"]
        ours += ["--val-batches", "1", "--steps-per-report", "20", "--iters", "100"]
        found: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(3):
            for processes, launch in ((1, []), (2, [*LAUNCH, sys.executable])):
                own = ["--batch-size", str(10 * processes), "--adapter-file", f"{processes}.npz"]
                arguments = [sys.executable, *launch, *ours, *own]
                # The launcher spins on a standard input that has ended.
                with subprocess.Popen(
                    arguments, cwd=work, env=ENVIRONMENT, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                ) as process:  # fmt: skip
                    printed = process.stdout.read()
                speeds = [float(n) for n in re.findall(r"Tokens/sec ([\d.]+)", printed)]
                if len(speeds) != 5:
                    raise SystemExit(f"{' '.join(arguments)} failed:\n{printed}")
                found[processes].append(statistics.median(speeds[1:]))
                print(f"  turn {turn}, {processes}: {speeds} tokens/s", flush=True)
        ratios = [two / one for one, two in zip(*found.values(), strict=True)]
        print(f"two processes: faster by {statistics.median(ratios):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in ("steps", "shapes", "runs", "quantized", "processes", "memory", "small"):
        parser.add_argument(f"--{part}", action="store_true")
    args = parser.parse_args()
    asked = args.steps, args.shapes, args.runs, args.quantized, args.processes, args.memory
    every = not any(asked)
    small = SMALL if args.small else {}
    print(mx.device_info().get("device_name"), "mlx", mx.__version__, flush=True)
    if args.runs or every:
        options = {"texts": 2000, "run": (10, 16, 1), "keys": KEYS}
        compare_runs("2,000 texts", GUMINI | small, options, None, args.small)
    if args.quantized or every:
        options = {"texts": 360, "run": (4, 8, 3), "keys": ["self_attn.qkv_proj"]}
        compare_runs("Phi-3 in 8 bits", PHI_3 | small, options, 8, args.small)
    if args.steps or every:
        compare_steps(GUMINI | small, args.small)
    if args.shapes:
        compare_shapes(SHAPES["Llama-3.1-8B"] | small, args.small)
    if args.memory:
        measure_memory(small)
    if args.processes:
        compare_processes(GUMINI | small, args.small)


if __name__ == "__main__":
    main()
