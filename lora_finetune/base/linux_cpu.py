"""A fast BLAS for MLX on a Linux CPU, and freed memory that is kept."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from lora_finetune.base.errors import warn

BLAS_NAMES = ("libopenblasp.so.0", "libopenblas.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as in glibc's malloc.h


def load_fast_blas() -> str | None:
    """Load a BLAS in place of the slow one in the mlx-cpu wheel; returns its file or name.

    The dynamic linker gives libmlx the first `cblas_sgemm` in the process, so a library that was
    loaded globally before it wins. That of the wheel ngsolve-openblas looks for libgfortran.so.5
    in its own folder but does not bring it. NumPy's wheel does, under a name with a hash; a folder
    of links puts the two side by side while they are loaded.
    """
    wheel = package_files("ngsolve_openblas", "libopenblas*.so")
    with suppress(OSError), tempfile.TemporaryDirectory() as folder:
        for file in [*wheel, *package_files("numpy", "../numpy.libs/lib*")]:
            name = "libgfortran.so.5" if file.name.startswith("libgfortran") else file.name
            Path(folder, name).symlink_to(file.resolve())
        for file in wheel:
            ctypes.CDLL(f"{folder}/{file.name}", mode=ctypes.RTLD_GLOBAL)
            return str(file)
    for folder in (f"{sys.prefix}/lib/", ""):  # conda's or the mkl wheel's, then the system's
        for name in BLAS_NAMES:
            with suppress(OSError):
                ctypes.CDLL(folder + name, mode=ctypes.RTLD_GLOBAL)
                return folder + name
    return None


def package_files(package: str, pattern: str) -> list[Path]:
    """The files that match beside a package's `__init__.py`; the package is not imported."""
    spec = importlib.util.find_spec(package)
    return sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []


FAST_BLAS = load_fast_blas() if platform.system() == "Linux" else None


def prepare() -> None:
    """Warn of the slow BLAS, and let the C library keep the memory that MLX frees.

    The next step takes that memory again; given back to the system, each page would have to be
    cleared first, which took a fifth of the time of a step.
    """
    if platform.system() == "Linux" and not FAST_BLAS:
        warn(
            "no fast BLAS was found, so MLX will be some 20 times slower than this CPU; get one "
            "with `pip install ngsolve-openblas` (x86-64; it needs a folder for temporary files), "
            "`apt install libopenblas0` or conda"
        )
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def can_compile() -> bool:
    """Whether `mx.compile` works; where it fails it is turned off, as a CPU is hardly slower then.

    If there is a C++ compiler, MLX writes to the folder of temporary files and loads from there:
    neither may be allowed.
    """
    import mlx.core as mx  # not above: the BLAS has to be loaded before it

    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * x)(mx.zeros(1)))
    except RuntimeError:
        mx.disable_compile()
        return False
    return True
