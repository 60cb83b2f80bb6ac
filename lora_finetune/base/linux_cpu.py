"""What MLX needs on a Linux CPU: a fast BLAS, freed memory kept, a folder for temporary files."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path

from lora_finetune.base.errors import warn

# A folder in memory, writable in most containers whose root is read-only.
SHARED_MEMORY = "/dev/shm"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as in glibc's malloc.h
SYSTEM_BLAS = ("libopenblasp.so.0", "libopenblas.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2")


def find_temporary_folder() -> None:
    """Where none of the usual folders takes temporary files, use the one in memory.

    Several packages ask `tempfile` for a folder when they are imported, which raises otherwise.
    If this one takes none either, then only what does write a file gets an OSError that names it.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        os.environ["TMPDIR"] = tempfile.tempdir = SHARED_MEMORY


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
    try:
        with tempfile.TemporaryDirectory() as folder:
            for library in libraries:
                is_fortran = library.name.startswith("libgfortran")
                name = "libgfortran.so.5" if is_fortran else library.name
                (Path(folder) / name).symlink_to(library.resolve())
            loaded = _load_globally(str(Path(folder) / libraries[0].name))
    except OSError:  # no folder takes temporary files
        return None
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


find_temporary_folder()
FAST_BLAS = load_fast_blas() if platform.system() == "Linux" else None


def warn_of_slow_blas() -> None:
    """Warn where MLX computes on a Linux CPU with the slow BLAS that it brings."""
    if platform.system() == "Linux" and not FAST_BLAS:
        warn(
            "no fast BLAS was found, so MLX will be some 20 times slower than this CPU; get one "
            "with `pip install ngsolve-openblas` (x86-64; it needs a folder for temporary files), "
            "`apt install libopenblas0` or conda"
        )


def share_cores(processes: int) -> None:
    """Let BLAS take its share of the cores only, where several processes compute on this machine.

    Threads that wait for more cores than there are make each other many times slower.
    """
    if processes > 1 and not os.environ.get("OPENBLAS_NUM_THREADS"):
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        for name in ("openblas_set_num_threads", "MKL_Set_Num_Threads"):
            if set_number := getattr(ctypes.CDLL(None), name, None):
                set_number(threads)


def keep_freed_memory() -> None:
    """Let the C library keep the memory that MLX frees, which it takes again in the next step.

    Given back to the system, each page would have to be cleared before it can be used again, which
    took a fifth of the time of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def can_compile() -> bool:
    """Whether `mx.compile` works; where it fails it is turned off, as a CPU is hardly slower then.

    MLX has its C++ compiled in the folder of temporary files, if there is a compiler, and loads it
    from there. Neither may be allowed: the folder may be read-only, or mounted with `noexec`.
    """
    import mlx.core as mx  # not above: the BLAS has to be loaded before it

    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # as std::filesystem::temp_directory_path has it
    folder = next(filter(None, map(os.environ.get, names)), "/tmp")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"C++")
        mx.eval(mx.compile(lambda x: mx.exp(x) * x)(mx.zeros(1)))
    except (OSError, RuntimeError):
        mx.disable_compile()
        return False
    return True
