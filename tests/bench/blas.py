"""Float32 matrix products inside the program beside NumPy's, in GFLOP/s, measured in turn.

python tests/bench/blas.py
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_finetune.base import linux_cpu

import mlx.core as mx
import numpy as np

SHAPES = [(2048, 2048, 2048), (512, 576, 1536), (512, 1536, 576), (512, 576, 49152)]


def seconds(product: Callable[[], object]) -> float:
    start = time.perf_counter()
    product()
    return time.perf_counter() - start


def measure(m: int, k: int, n: int) -> tuple[float, float]:
    """GFLOP/s of MLX and of NumPy for (m, k) @ (k, n), medians of ten products in turn."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((m, k), (k, n)))
    mlx_a, mlx_b = mx.array(a), mx.array(b)
    mx.eval(mlx_a, mlx_b)
    rounds = [(seconds(lambda: mx.eval(mlx_a @ mlx_b)), seconds(lambda: a @ b)) for _ in range(12)]
    mlx, numpy = np.median(rounds[2:], axis=0)
    return 2 * m * k * n / mlx / 1e9, 2 * m * k * n / numpy / 1e9


def main() -> None:
    print(f"BLAS: {linux_cpu.FAST_BLAS}")
    print(f"{'rows, inner, columns':24} {'MLX':>8} {'NumPy':>8} {'ratio':>6}")
    for shape in SHAPES:
        mlx, numpy = measure(*shape)
        print(f"{shape!s:24} {mlx:8.1f} {numpy:8.1f} {mlx / numpy:6.2f}")


if __name__ == "__main__":
    main()
