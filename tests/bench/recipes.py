"""Validation losses of training by several recipes, each with several seeds.

    python tests/bench/recipes.py [--seeds 3] [--jobs 1] [--flags "…"] -- RECIPE…

A RECIPE is flags of train_lora.py in one argument, such as "--learning-rate 1e-4 --epochs 3" or
@data/recipes/hundreds.txt; "" is the default. --flags go before each: the model, the data. Printed
are the losses at the end of each seed's run, their mean, the mean of the best, and the seconds of a
run, which say little where several --jobs run at a time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]


def losses_of(work: Path, flags: str, recipe: str, seed: int) -> tuple[float, float, float]:
    """The validation loss at the end of a run, the best one, and the seconds that the run took."""
    adapter = Path(tempfile.mkdtemp(dir=work)) / "a.npz"
    own = ["--train", "--val-batches", "-1", "--steps-per-eval", "20", "--seed", str(seed)]
    words = [*own, "--adapter-file", str(adapter), *shlex.split(flags), *shlex.split(recipe)]
    start = time.perf_counter()
    command = [sys.executable, "train_lora.py", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if ended.returncode:
        sys.exit(f"{shlex.join(words)}\n{ended.stderr}")
    entries = map(json.loads, (adapter.parent / "a.run/log.jsonl").read_text().splitlines())
    found = [entry["val_loss"] for entry in entries if "val_loss" in entry]
    return found[-1], min(found), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--flags", default="")
    parser.add_argument("recipes", nargs="+")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        run = partial(losses_of, Path(work), args.flags)
        runs = {
            recipe: [pool.submit(run, recipe, seed) for seed in range(args.seeds)]
            for recipe in args.recipes
        }
        for recipe, submitted in runs.items():
            last, best, seconds = zip(*(each.result() for each in submitted), strict=True)
            of_each = ", ".join(f"{loss:.3f}" for loss in last)
            print(
                f"{mean(last):.3f} ({of_each}), best {mean(best):.3f}, {mean(seconds):.0f} s: "
                f"{recipe or 'the defaults'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
