"""Kernels of a step that CUDA has to compile, compiled side by side where a first run needs them.

MLX compiles one at a time, when a step comes to it, and each takes some three seconds. The largest
of this program's own are known before, so processes of their own can compile them meanwhile. MLX
keeps what is compiled in a folder, where it finds them then.

    python -m lora_finetune.kernels KERNEL DTYPE
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_finetune import activations, memory

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# What a kernel is compiled for: functions of three arrays, of the model's type, and a center.
FUNCTIONS: dict[str, Callable[..., object]] = {
    "swiglu": lambda x, y, z, _: activations.swiglu(x, y),
    "swiglu_gradients": lambda x, y, z, _: mx.vjp(activations.swiglu, [x, y], [z])[1],
    "weighted_sum": lambda x, y, _, center: activations.weighted_sum(x, y, center),
    "softmax_gradient": lambda x, y, _, center: activations.softmax_gradient(x, y, center),
}
LONGEST_WAIT_S = 120
ROOM = 4e9  # bytes of the device that the processes take together, and some more


def compile_kernel(name: str, dtype: mx.Dtype) -> None:
    x, y, z = (mx.ones((2, 8), dtype) for _ in range(3))
    mx.eval(mx.compile(FUNCTIONS[name])(x, y, z, mx.ones((2, 1))))


def is_first_run() -> bool:
    """Whether nothing has been compiled on this machine, with CUDA and this version of MLX."""
    default = Path(tempfile.gettempdir(), "mlx", mx.__version__, "ptx")
    folder = Path(os.environ.get("MLX_PTX_CACHE_DIR", default))
    return mx.cuda.is_available() and not any(folder.glob("*.ptx"))


@contextmanager
def compiled_side_by_side(model: nn.Module) -> Iterator[None]:
    """While it lasts, a first run's kernels for a model are compiled; at its end they are there.

    Where a process fails, MLX compiles that kernel later.
    """
    floats = [a for _, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)]
    has_room = memory.available() - mx.get_active_memory() > ROOM
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "lora_finetune.kernels"]
    processes = []
    try:
        for name in FUNCTIONS if is_first_run() and has_room else ():
            processes.append(
                subprocess.Popen(
                    [*command, name, str(floats[0].dtype).removeprefix("mlx.core.")],
                    env=os.environ | {"PYTHONPATH": str(root)},
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip
        yield
        with suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(LONGEST_WAIT_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    compile_kernel(sys.argv[1], getattr(mx, sys.argv[2]))
