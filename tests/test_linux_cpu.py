"""On a Linux CPU, MLX multiplies matrices with a fast BLAS in place of its own slow one."""

import ctypes
import platform
from pathlib import Path

from lora_finetune.base import linux_cpu

import mlx.core as mx
import numpy as np
import pytest

on_linux_cpu = platform.system() == "Linux" and mx.default_device() == mx.cpu


@pytest.mark.skipif(not on_linux_cpu, reason="only a Linux CPU needs another BLAS")
def test_the_product_that_mlx_calls_is_that_of_the_fast_blas():
    assert linux_cpu.FAST_BLAS
    called = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value
    assert Path(library_at(called)).resolve() == Path(linux_cpu.FAST_BLAS).resolve()


def library_at(address: int) -> str:
    """The file that is mapped at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, file = line.split(maxsplit=5)
        start, end = (int(x, 16) for x in span.split("-"))
        if start <= address < end:
            return file
    raise AssertionError("no file is mapped there")


def test_products_are_right_in_every_layout():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 70, 50)), rng.normal(size=(3, 50, 90))
    for left, right in [(a, b), (a.swapaxes(1, 2).copy().swapaxes(1, 2), b)]:
        product = mx.array(left.astype(np.float32)) @ mx.array(right.astype(np.float32))
        np.testing.assert_allclose(np.array(product), a @ b, atol=1e-4)
