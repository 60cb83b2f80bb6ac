"""The models of train_lora.py: load one, put LoRA into it, read and write adapter files.

Import this module before `mlx.core`: on a Linux CPU it puts a fast BLAS in place first.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# --- A fast BLAS for MLX on a Linux CPU ---------------------------------------------------------

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

# On CUDA, MLX would round the factors of float32 products to TF32's 10 bits: gradients 1 % off.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, get_total_parameters
from transformers.utils import logging

logging.set_verbosity_error()  # its warnings are for programmers


class UserError(Exception):
    """Something the user can put right; the program prints it as one `error:` line."""


def lacks_fast_blas() -> bool:
    """Whether MLX computes on a Linux CPU with the slow BLAS that it brings."""
    return platform.system() == "Linux" and mx.default_device() == mx.cpu and not FAST_BLAS


def memory_size() -> int:
    """Bytes of memory that MLX's default device has: its own, or the machine's."""
    own = mx.device_info().get("memory_size") or mx.device_info().get("total_memory")
    return own or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- Loading ------------------------------------------------------------------------------------

# What is fetched from the hub: weights as safetensors, settings and tokenizer; never code.
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


def load(path_or_repo: str) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer from a folder or a Hugging Face repository.

    Nothing that comes with a model is run: no remote code, no pickle. On the CPU the weights are
    computed with in float32, quantized ones dequantized: MLX's CPU products of other types are 40
    and more times slower. Elsewhere they stay as they are.

    Args:
        path_or_repo: a folder with `config.json`, `model*.safetensors` and a tokenizer, or a
            repository id such as `GuminiResearch/Gumini-1B-Base`.

    Raises:
        UserError: there is no such model, or it cannot be loaded; says which and why.
    """
    folder = find_model(path_or_repo)
    for needed, pattern in [("config.json", "config.json"), ("tokenizer", "tokenizer*")]:
        if not any(folder.glob(pattern)):
            raise UserError(f"the model folder {folder} has no {needed}")
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"the model folder {folder} has no weights (model*.safetensors)")
    try:
        model, tokenizer = mlx_lm.load(
            str(folder), tokenizer_config={"trust_remote_code": False}, lazy=True
        )
        if mx.default_device() == mx.cpu:
            model = dequantize_model(model)
            model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    except Exception as error:  # mlx-lm and transformers raise of every kind on what they dislike
        raise UserError(f"the model {folder} cannot be loaded: {first_line(error)}") from error
    return model, tokenizer


def find_model(path_or_repo: str) -> Path:
    """The folder of a model; a Hugging Face repository is downloaded, or found in the cache.

    Raises:
        UserError: no such folder, no such repository, or the hub is out of reach.
    """
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        return folder
    try:
        validate_repo_id(path_or_repo)
    except hub_errors.HFValidationError:
        raise UserError(f"there is no model folder {path_or_repo}") from None
    if folder.exists():
        raise UserError(f"{path_or_repo} is a file; --model takes a folder or a repository id")
    try:
        return Path(snapshot_download(path_or_repo, allow_patterns=HUB_FILES))
    except hub_errors.GatedRepoError:
        why = "its owner has not given you access yet (ask on its page, then `hf auth login`)"
    except hub_errors.RepositoryNotFoundError:
        why = "the Hugging Face hub has no such repository, or it is private (`hf auth login`)"
    except Exception as error:  # whatever the network does
        why = f"the Hugging Face hub cannot be reached ({first_line(error)})"
    raise UserError(f"there is no model folder {path_or_repo}, and {why}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- LoRA ---------------------------------------------------------------------------------------

TARGETS = ("q_proj", "v_proj", "gate")
RANK = 8
SCALE = 20.0


class LoRALinear(nn.Module):
    """A frozen linear map with a trainable low-rank update: y = W x + scale · B (A x).

    The form, names, shapes and defaults are those of `mlx_lm.tuner.lora.LoRALinear`: `lora_a`
    (d_in, r) uniform in ±1/sqrt(d_in) and `lora_b` (r, d_out) zero, both float32, so that a fresh
    update changes nothing and adapters move freely between the tools.
    """

    @staticmethod
    def from_base(linear: nn.Module, r: int = RANK, scale: float = SCALE) -> LoRALinear:
        """Wrap a linear layer, float or quantized."""
        return LoRALinear(linear, r, scale)

    def __init__(self, linear: nn.Module, r: int, scale: float):
        super().__init__()
        d_out, d_in = linear_shape(linear)
        bound = 1 / math.sqrt(d_in)
        self.linear = linear
        self.scale = scale
        self.lora_a = mx.random.uniform(-bound, bound, (d_in, r))
        self.lora_b = mx.zeros((r, d_out))

    def __call__(self, x: mx.array) -> mx.array:
        update = self.scale * ((x @ self.lora_a) @ self.lora_b)
        return self.linear(x) + update.astype(x.dtype)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, whose quantized weights are packed into 32-bit words."""
    d_out, d_in = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        d_in = d_in * 32 // linear.bits
    return d_out, d_in


def find_targets(model: nn.Module, num_layers: int) -> list[str]:
    """The linear layers to adapt in the last `num_layers` layers (all, where there are fewer).

    These are the query and value projections of the attention and, in a mixture of experts, the
    router's `gate`.

    Returns:
        Paths such as `model.layers.9.self_attn.q_proj`, first layer first.

    Raises:
        UserError: those layers have none.
    """
    paths = [
        f"{path}.{name}"
        for path, layer in list(zip(layer_paths(model), model.layers, strict=True))[-num_layers:]
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in TARGETS and is_linear(module)
    ]
    if not any(path.endswith(("q_proj", "v_proj")) for path in paths):
        raise UserError(
            f"{type(model).__module__.rpartition('.')[2]} models have no q_proj and v_proj in "
            f"their last {num_layers} layers, where LoRA would go"
        )
    return sorted(paths, key=natural_order)


def layer_paths(model: nn.Module) -> list[str]:
    """The paths of the model's layers, such as `model.layers.9`, from first to last."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model.layers]


def natural_order(path: str) -> list[tuple[int, str]]:
    """A sort key under which layer 9 comes before layer 10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in path.split(".")]


def add_lora(model: nn.Module, ranks: dict[str, int]) -> None:
    """Freeze the model and put a fresh LoRALinear of the given rank at each path."""
    modules = dict(model.named_modules())
    wrapped = [(path, LoRALinear.from_base(modules[path], r)) for path, r in ranks.items()]
    model.freeze()
    model.update_modules(tree_unflatten(wrapped))


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model, each packed weight counted as the numbers that it stands for."""
    return get_total_parameters(model)


def count_trainable(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.trainable_parameters()))


# --- Adapter files ------------------------------------------------------------------------------

Adapter = dict[str, tuple[np.ndarray, np.ndarray]]  # path of a linear layer -> its A and B


def write_adapter(file: Path, model: nn.Module) -> None:
    """Write the trainable parameters as an .npz file of float32 arrays, whole or not at all."""
    arrays = {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}
    with replacing(file) as stream:
        np.savez(stream, **arrays)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream to a file beside `file` that takes its place when all is written, or vanishes."""
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_adapter(file: Path) -> Adapter:
    """Read an adapter file and check it by itself; no pickled object is ever loaded.

    Returns:
        For each adapted path, first layer first, A (d_in, r) and B (r, d_out).

    Raises:
        UserError: no such file, not a whole .npz file, or not pairs of matrices.
    """
    if not file.is_file():
        raise UserError(f"there is no adapter file {file}")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except Exception:  # zipfile, zlib and NumPy each raise in their own way on a damaged file
        raise UserError(f"{file} is not a whole .npz file of plain arrays") from None

    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(arrays, key=natural_order):
        path, _, which = name.rpartition(".")
        pairs.setdefault(path, {})[which] = arrays[name]
    for path, pair in pairs.items():
        if set(pair) != {"lora_a", "lora_b"}:
            raise UserError(f"{file} has {path}.{' and '.join(pair)}, not a lora_a and its lora_b")
        a, b = pair["lora_a"], pair["lora_b"]
        if not (is_matrix(a) and is_matrix(b) and a.shape[1] == b.shape[0] > 0):
            raise UserError(f"{file}: {path} is not a pair of matrices (d_in, r) and (r, d_out)")
    if not pairs:
        raise UserError(f"{file} holds no arrays")
    return {path: (pair["lora_a"], pair["lora_b"]) for path, pair in pairs.items()}


def is_matrix(array: object) -> bool:
    return isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind == "f"


def check_adapter(file: Path, adapter: Adapter, model: nn.Module) -> None:
    """Check that an adapter has its place in a model that is not adapted yet.

    Raises:
        UserError: some of it has not; names the first few.
    """
    modules = dict(model.named_modules())
    wrong = []
    for path, (a, b) in adapter.items():
        linear = modules.get(path)
        if not is_linear(linear):
            wrong.append(f"there is no linear layer {path}")
        elif (b.shape[1], a.shape[0]) != linear_shape(linear):
            wrong.append(
                f"{path} maps {linear_shape(linear)[1]} to {linear_shape(linear)[0]} numbers, "
                f"its A and B {a.shape[0]} to {b.shape[1]}"
            )
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{file} is not for this model: {'; '.join(wrong[:3])}{more}")


def load_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter's arrays, as float32, into a model that is adapted at its paths."""
    weights = [
        (f"{path}.{which}", mx.array(array.astype(np.float32)))
        for path, pair in adapter.items()
        for which, array in zip(("lora_a", "lora_b"), pair, strict=True)
    ]
    model.load_weights(weights, strict=False)
