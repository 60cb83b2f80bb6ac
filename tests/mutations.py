"""Files spoilt at random, from a seed: their bytes, or what they hold in the form they have."""

from __future__ import annotations

import copy
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

# Python's JSON has no way to write these, so these names in a string are replaced by them.
UNWRITABLE = {
    '"@deep@"': "[" * 100_000 + "]" * 100_000,
    '"@nearly too deep@"': "[" * 970 + "]" * 970,
    '"@long number@"': "9" * 10_000,
}
ODD_TEXTS = [
    "",
    " ",
    "\0",
    "a\nb\x1b[31m",
    "\ud800",
    "\u2028",
    "가" * 3000,
    "9" * 5000,
    "²",
    "..",
    "/",
    "llama",
    "<|endoftext|>",
    *(name.strip('"') for name in UNWRITABLE),
]
ODD_NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 64, 255, 256, 300, 4096, -64),
    *(
        sign * 2**power + by
        for power in (16, 31, 32, 63, 64, 100)
        for by in (-1, 0)
        for sign in (1, -1)
    ),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e30, 1e308, float("nan"), float("inf"), -float("inf")),
]
ODD_VALUES = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [0],
    [0] * 5000,
    {"a": None},
    *ODD_TEXTS,
    *ODD_NUMBERS,
]


def mutate(content: bytes, suffix: str, seed: str) -> bytes:
    """The content of a file with such a suffix, spoilt; the same each time for the same seed."""
    rng = Random(seed)
    by_form = {
        ".json": lambda: write_json(bend(json.loads(content), rng)),
        ".jsonl": lambda: spoil_lines(content, rng),
        ".npz": lambda: spoil_npz(content, rng),
        ".safetensors": lambda: spoil_safetensors(content, rng),
    }
    return by_form[suffix]() if rng.random() < 0.6 else spoil_bytes(content, rng)


# --- Bytes --------------------------------------------------------------------------------------


def spoil_bytes(content: bytes, rng: Random) -> bytes:
    """Flip, cut, repeat, splice, insert and overwrite, one to a few times."""
    spoilt = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        start = position(spoilt, rng)
        end = start + rng.choice([1, 2, 8, 100, len(spoilt) // 3])
        other = position(spoilt, rng)
        change = rng.randrange(8)
        if change == 0 and spoilt:
            spoilt[start] ^= 1 << rng.randrange(8)
        elif change == 1:
            del spoilt[start:]
        elif change == 2:
            del spoilt[start:end]
        elif change == 3:
            spoilt[start:start] = spoilt[start:end] * rng.choice([1, 3])
        elif change == 4:
            spoilt[start:end] = spoilt[other : other + end - start]
        elif change == 5:
            spoilt[start:start] = rng.randbytes(rng.choice([1, 4, 64]))
        elif change == 6:
            spoilt[start : start + 1] = bytes([rng.choice(b'\0\xff \n"[{}],:-9e\\')])
        else:
            number = rng.choice([0, 1, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1])
            spoilt[start : start + 4] = struct.pack("<I", number)
    return bytes(spoilt)


def position(content: bytearray, rng: Random) -> int:
    """A place in a file, often near its start or its end, where its headers are."""
    last = max(len(content) - 1, 0)
    near = min(last, 400)
    return rng.choice([rng.randint(0, last), rng.randint(0, near), last - rng.randint(0, near)])


# --- JSON ---------------------------------------------------------------------------------------


def write_json(value: Any) -> bytes:
    text = json.dumps(value)
    for name, written in UNWRITABLE.items():
        text = text.replace(name, written)
    return text.encode()


def bend(value: Any, rng: Random) -> Any:
    """Change a few of the values in a JSON value for odd ones, or drop, rename or add some."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = [(None, None), *inner_places(value)]
        holder, key = rng.choice(places)
        if holder is None:
            if rng.random() < 0.1:
                value = copy.deepcopy(rng.choice(ODD_VALUES))
            continue
        change = rng.randrange(8)
        if change == 0:
            del holder[key]
        elif change == 1:
            other, other_key = rng.choice(places[1:])
            holder[key] = copy.deepcopy(other[other_key])
        elif change == 2 and isinstance(holder, dict):
            holder[rng.choice(ODD_TEXTS)] = holder.pop(key)
        elif change == 3 and isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice([0, 2, 100])
        elif change == 4 and isinstance(holder[key], int | float):
            holder[key] *= rng.choice([-1, 2, 0.5, 1000])
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def inner_places(value: Any) -> list[tuple[Any, Any]]:
    """All lists and objects in a JSON value, each with each of its keys."""
    places, found = [value], []
    while places:
        holder = places.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else range(min(len(holder), 50))
            found += [(holder, key) for key in keys]
            places += [holder[key] for key in keys]
    return found


def spoil_lines(content: bytes, rng: Random) -> bytes:
    """JSON Lines, of which one or two are bent."""
    lines = content.splitlines()
    for place in rng.sample(range(len(lines)), rng.choice([1, 1, 2])):
        lines[place] = write_json(bend(json.loads(lines[place]), rng))
    return rng.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines)


# --- Arrays -------------------------------------------------------------------------------------


class Payload:
    """Makes the folder `ran` in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.mkdir, (Path("ran"),)


DTYPES = ["<f2", "<f4", ">f4", "<f8", "<f16", "<c8", "<i4", ">i8", "<u8", "?", "S3", "U2", "<M8[s]"]
ODD_NAMES = [
    "",
    ".",
    "lora_a",
    "notes",
    "optimizer.step",
    "optimizer.",
    "a\nb.lora_a",
    "9" * 5000 + ".lora_a",
    "a" * 20_000,
    "../../ran",
    "model.layers.².lora_a",
    "model.layers.0.self_attn.lora_a",
    "model.layers.0.mlp.gate_proj.lora_b",
    "model.norm.lora_b",
]
ODD_HEADERS = [
    {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**40)},
    {"descr": "<f4", "fortran_order": False, "shape": (2**32, 2**32)},
    {"descr": "<f4", "fortran_order": False, "shape": (2**30, 8)},
    {"descr": "<f4", "fortran_order": False, "shape": (-1, 8)},
    {"descr": "<f4", "fortran_order": False, "shape": (2**70, 0)},
    {"descr": "<f4", "fortran_order": False, "shape": (1,) * 70},
    {"descr": "|O", "fortran_order": False, "shape": (64, 8)},
    {"descr": "<f4", "fortran_order": 3, "shape": (64, 8)},
    {"descr": "|V0", "fortran_order": False, "shape": (64, 8)},
    {"descr": "|S99999999999", "fortran_order": False, "shape": (1,)},
    {"descr": [("a", "<f4"), ("b", "|O")], "fortran_order": False, "shape": (64,)},
    {"descr": ("<f4", (2**20, 2**20)), "fortran_order": False, "shape": (64,)},
    {"descr": "<f4", "shape": (64, 8)},
    "64(8)",
    "[" * 3000,
    "{'descr': '<f4', 'fortran_order': False, 'shape': (64L, 8L), }",
    "{'descr': '\\d', 'fortran_order': False, 'shape': (64 if 1else 2, 8), }",
    "",
]


def spoil_npz(content: bytes, rng: Random) -> bytes:
    """An .npz file of arrays that are changed, or with members that no array is in."""
    arrays = read_npz(content)
    if "notes" in arrays and rng.random() < 0.7:
        notes = bend(json.loads(arrays["notes"].tobytes()), rng)
        arrays["notes"] = np.frombuffer(write_json(notes), np.uint8)
    spoil_arrays(arrays, rng)
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, array in arrays.items():
            packing = rng.choice(
                [zipfile.ZIP_STORED] * 60 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]
            )
            member = (name or "a") + rng.choice([".npy"] * 60 + ["", ".npy.npy"])
            archive.writestr(member, npy(array), packing)
        if rng.random() < 0.2:
            name = rng.choice([*arrays, *ODD_NAMES]) + ".npy"
            archive.writestr(name, odd_npy(rng.choice(ODD_HEADERS)))
    return stream.getvalue()


def spoil_arrays(arrays: dict[str, np.ndarray], rng: Random) -> None:
    """Drop, rename, add and change a few of some arrays."""
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        name = rng.choice(sorted(arrays) or ["none"])
        change = rng.randrange(8)
        if change == 0:
            arrays.pop(name, None)
        elif change == 1 and name in arrays:
            arrays[rng.choice(ODD_NAMES)] = arrays.pop(name)
        elif change == 2:
            arrays[rng.choice(ODD_NAMES)] = np.zeros((64, 8), np.float32)
        elif name in arrays and arrays[name].dtype.kind in "fu":
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                arrays[name] = odd_array(arrays[name], rng)


def odd_array(array: np.ndarray, rng: Random) -> np.ndarray:
    """An array of another type, shape, order or of other numbers."""
    array = np.atleast_1d(array)
    numbers = [0, -1, 1e38, -1e30, 1e-40, np.nan, np.inf, -np.inf]
    changes: list[Callable[[], Any]] = [
        lambda: array.astype(rng.choice(DTYPES)),
        lambda: array.astype(np.float64) * 1e200,
        lambda: np.full_like(
            array, rng.choice(numbers[:1] if array.dtype.kind == "u" else numbers)
        ),
        lambda: np.where(np.arange(array.size).reshape(array.shape) == 3, np.nan, array),
        lambda: np.asfortranarray(array),
        lambda: array.T,
        lambda: array.flatten(),
        lambda: array[:0],
        lambda: array[..., :0],
        lambda: array[..., :3],
        lambda: array[None],
        lambda: np.float32(3),
        lambda: np.zeros(array.shape, [("a", "<f4"), ("b", "<i2")]),
        lambda: np.array([[Payload()]], object),
        lambda: np.full(array.shape, Payload(), object),
    ]
    return np.asanyarray(rng.choice(changes)())


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def odd_npy(header: object) -> bytes:
    """An .npy file with a header that NumPy would not write, and 2 KB of zeros."""
    written = f"{header}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(written)) + written + bytes(2048)


def spoil_safetensors(content: bytes, rng: Random) -> bytes:
    """A .safetensors file with a header that is bent."""
    (length,) = struct.unpack("<Q", content[:8])
    header = write_json(bend(json.loads(content[8 : 8 + length]), rng))
    claimed = rng.choice([len(header)] * 20 + [0, len(header) + 1, 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", claimed) + header + content[8 + length :]


# --- Inputs that once ended in something worse than an error --------------------------------------

Change = Callable[[bytes], bytes]


def with_values(*keys: str, **values: Any) -> Change:
    """Change values of the JSON object that lies under some keys in a JSON file."""

    def change(content: bytes) -> bytes:
        whole = json.loads(content)
        holder = whole
        for key in keys:
            holder = holder[key]
        holder.update(values)
        return write_json(whole)

    return change


def with_arrays(**arrays: np.ndarray) -> Change:
    """Change arrays of an .npz file."""
    return lambda content: write_npz(read_npz(content) | arrays)


def with_member(name: str, content: bytes) -> Change:
    """Put a file into an .npz file in place of the array of that name."""

    def change(whole: bytes) -> bytes:
        stream = io.BytesIO(
            write_npz({n: a for n, a in read_npz(whole).items() if n != name.removesuffix(".npy")})
        )
        with zipfile.ZipFile(stream, "a") as archive:
            archive.writestr(name, content)
        return stream.getvalue()

    return change


def read_npz(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content)) as archive:
        return dict(archive)


def write_npz(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def with_gaps(content: bytes) -> bytes:
    """Give other numbers to the tokens that are in no text here, so that theirs are no token's."""
    vocabulary = json.loads(content)["model"]["vocab"]
    used = "### 질문: 물은?\n### 답변: H2O 가".encode()
    moved = {name: i if i in used else 1000 + i for name, i in vocabulary.items()}
    return with_values("model", vocab=moved)(content)


MATRIX = "model.layers.0.self_attn.q_proj.lora_a"
REPLACED = {
    "a.npz": {
        "a layer of many digits": with_arrays(**{"9" * 5000 + ".lora_a": np.zeros((64, 8))}),
        "a name of two lines": with_arrays(**{"a\nb\x1b[31m.lora_a": np.zeros((64, 8))}),
        "numbers beyond float32": with_arrays(**{MATRIX: np.full((64, 8), 1e200)}),
        "not finite": with_arrays(**{MATRIX: np.full((64, 8), np.nan, np.float32)}),
        "a header of Python 2": with_member(
            MATRIX + ".npy",
            odd_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (64L, 8L), }"),
        ),
        "a header that Python warns of": with_member(MATRIX + ".npy", odd_npy("{'shape': 64if 1}")),
    },
    "model/config.json": {
        "a rope base that is a list": with_values(rope_theta=[]),
        "an epsilon that is a text": with_values(rms_norm_eps="a"),
        "heads and sizes below zero": with_values(
            num_attention_heads=-4, num_key_value_heads=-2, head_dim=-16
        ),
        "layers that no memory holds": with_values(num_hidden_layers=2**31 - 1),
        "layers that take minutes": with_values(num_hidden_layers=200_000),
    },
    "model/tokenizer.json": {
        "no tokens": with_values("model", vocab={}),
        "tokens that are none": with_gaps,
        "a token beyond 31 bits": with_values("model", "vocab", H=2**32 - 1),
    },
    "model/tokenizer_config.json": {
        "a greatest length that is a list": with_values(model_max_length=[])
    },
    "messages/train.jsonl": {
        "half of a surrogate pair in a tool": lambda content: content.replace(b'"f"', b'"\\ud83d"')
    },
}
