"""Time and peak memory of prepare_lora_data.py on 500,000 questions and answers, in each format.

    python tests/bench/prepare.py [--rows N]

Writes the source to a temporary folder first (1 GB for 500,000 rows; another for what is made).
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cpu import ROOT, measured

WORDS = ["물은", "산소와", "수소로", "이루어져", "있으며", "그", "비율은", "언제나", "같습니다"]


def rows(number: int) -> Iterator[dict[str, str]]:
    """Pairs of some 1,300 bytes in UTF-8 together, as long as those of korean_textbooks."""
    rng = random.Random(0)
    for i in range(number):
        words = rng.choices(WORDS, k=110)
        yield {"question": f"{i} {' '.join(words[:20])}?", "answer": " ".join(words[20:])}


def make_sources(folder: Path, number: int) -> None:
    """Write the same rows in each format."""
    import datasets

    made = datasets.Dataset.from_generator(
        rows, gen_kwargs={"number": number}, cache_dir=str(folder / "cache")
    )
    made.save_to_disk(folder / "saved")
    made.to_parquet(folder / "a.parquet")
    made.to_json(folder / "a.jsonl", force_ascii=False)
    made.to_csv(folder / "a.csv")
    with (folder / "a.json").open("w", encoding="utf-8") as stream:
        stream.write('{"version": "1.0", "data": [')
        for i, row in enumerate(rows(number)):
            stream.write(", " * (i > 0) + json.dumps(row))
        stream.write("]}")
    with (folder / "cp949.csv").open("w", encoding="cp949", newline="") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"], delimiter=";")
        writer.writeheader()
        writer.writerows(rows(number))


def measure(source: Path, output: Path) -> tuple[float, float]:
    """Seconds and peak memory in MB of one run."""
    start = time.perf_counter()
    script = str(ROOT / "prepare_lora_data.py")
    _, gigabytes = measured(
        [sys.executable, script, "--source", str(source), "--output", str(output)]
    )
    return time.perf_counter() - start, 1e3 * gigabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000)
    number = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: Linux counts a parent's memory at its start as the child's.
        make = multiprocessing.get_context("spawn").Process(
            target=make_sources, args=(folder, number)
        )
        make.start()
        make.join()
        for source in ("saved", "a.parquet", "a.jsonl", "a.json", "a.csv", "cp949.csv"):
            seconds, megabytes = measure(folder / source, folder / "out")
            print(f"{source}: {seconds:.1f} s, {megabytes:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
