"""A fast BLAS for MLX on a Linux CPU, in place of the slow one in the mlx-cpu wheel."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
import tempfile
from pathlib import Path

from lora_finetune.command_line import warn

SYSTEM_BLAS = ("libopenblasp.so.0", "libopenblas.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2")


def load_fast_blas() -> str | None:
    """Load a BLAS that serves MLX's `cblas_sgemm` in place of the slow one in the mlx-cpu wheel.

    The dynamic linker gives libmlx the first `cblas_sgemm` in the process, so a library that was
    loaded globally before it wins. Looked for, in this order: the wheel ngsolve-openblas (an
    OpenBLAS; requirements.txt names it), the environment's own libraries (conda, the mkl wheel),
    the system's.

    Returns:
        The library that was loaded, or None where none was found.
    """
    if wheel := _load_openblas_wheel():
        return wheel
    environment = Path(sys.prefix) / "lib"
    for library in [*(str(environment / name) for name in SYSTEM_BLAS), *SYSTEM_BLAS]:
        if _load_globally(library):
            return library
    return None


def _load_openblas_wheel() -> str | None:
    """Load the OpenBLAS of the wheel ngsolve-openblas.

    It looks for libgfortran.so.5 in its own folder but does not bring it. NumPy's wheel does,
    under a name with a hash; a folder of links puts the two side by side while they are loaded.
    """
    libraries = [
        *_package_files("ngsolve_openblas", "libopenblas*.so"),
        *_package_files("numpy", "../numpy.libs/lib*fortran*"),
        *_package_files("numpy", "../numpy.libs/libquadmath*"),
    ]
    if not libraries or not libraries[0].name.startswith("libopenblas"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        for library in libraries:
            is_fortran = library.name.startswith("libgfortran")
            name = "libgfortran.so.5" if is_fortran else library.name
            (Path(folder) / name).symlink_to(library.resolve())
        loaded = _load_globally(str(Path(folder) / libraries[0].name))
    return str(libraries[0]) if loaded else None


def _package_files(package: str, pattern: str) -> list[Path]:
    """The files that match beside a package's `__init__.py`; the package is not imported."""
    spec = importlib.util.find_spec(package)
    return sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []


def _load_globally(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


FAST_BLAS = load_fast_blas() if platform.system() == "Linux" else None


def warn_of_slow_blas(on_cpu: bool) -> None:
    """Warn where MLX computes on a Linux CPU with the slow BLAS that it brings."""
    if on_cpu and platform.system() == "Linux" and not FAST_BLAS:
        warn(
            "no fast BLAS was found, so MLX will be some 20 times slower than this CPU; get one "
            "with `pip install ngsolve-openblas` (x86-64), `apt install libopenblas0` or conda"
        )
