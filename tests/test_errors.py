"""What a user gets wrong: one line that starts `error:`, exit status 2, and nothing touched."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import models
import tiny
from conftest import TEXTS, Run, listing, one_error
from lora_finetune.adapters import npz
from lora_finetune.base.errors import UserError
from lora_finetune.texts.dataset import OTHER_FORMS

import mlx.core as mx
import numpy as np
import pytest

Fails = Callable[..., str]


@pytest.fixture
def fails(
    call: Run, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Fails:
    """Run the command line, here or with `by=run`, and check that it fails as it should.

    With the tiny model and its data, unless other ones are given; from the folder `tmp_path`.
    """
    monkeypatch.chdir(tmp_path)

    def fails(*args: object, mentions: tuple[str, ...] = (), by: Run = call, **options) -> str:
        common = ["--model", model, "--data", data, "--adapter-file", tmp_path / "a.npz"]
        before = listing(tmp_path, data, model)
        error = one_error(by(*common, *args, **options), *mentions)
        assert listing(tmp_path, data, model) == before
        return error

    return fails


# --- The command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_lora.py", "prepare_lora_data.py"])
def test_a_python_without_what_is_needed_is_reported(run: Run, script: str) -> None:
    """As where `source .venv/bin/activate` was forgotten: here Python leaves its packages out."""
    error = one_error(run("--help", script=script, python=("-S",)), "is not installed for")
    assert "make demo" in error and sys.executable in error


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        # As MLX for CUDA on a machine without a GPU.
        ("raise ImportError('no device')", ("no device", "README.md")),
        ("import not_there", ("not_there is not installed for",)),
    ],
)
def test_a_package_that_does_not_load_is_reported_with_the_reason(
    run: Run, tmp_path: Path, content: str, mentions: tuple[str, ...]
) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(content)
    one_error(run("--train", env={"PYTHONPATH": str(tmp_path)}), *mentions)


OUT_OF_RANGE = {
    "--batch-size": ["0", "-1", "1.5", "x", "", "99999999999"],
    "--learning-rate": ["-1", "-1e-5", "nan", "inf", "x", "1e999"],
    "--temp": ["-1", "nan", "inf", "x"],
    "--max-tokens": ["0", "-1", "2.5"],
    "-m": ["0"],
    "--iters": ["0", "-1", "1e3"],
    "--epochs": ["0", "-1", "0.5"],
    "--lora-layers": ["0", "-1", "all"],
    "--val-batches": ["0", "-2"],
    "--test-batches": ["0", "-2"],
    "--steps-per-report": ["0", "-1"],
    "--steps-per-eval": ["0", "-1"],
    "--save-every": ["0", "-1"],
    "--start-iter": ["-1", "x"],
    "--seed": ["-1", "1.0"],
    "--max-seq-length": ["1", "0", "-1"],
    "--add-eos-token": ["2", "-1", "yes"],
}


NOT_A_NUMBER = {"x", "", "1.5", "2.5", "1e3", "0.5", "all", "1.0", "yes"}  # or not a whole one


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_number_out_of_range_is_reported_at_once_with_its_flag_and_the_reason(
    call: Run, flag: str, value: str
) -> None:
    is_invalid = value in NOT_A_NUMBER or flag == "--add-eos-token"
    reason = "invalid " if is_invalid else "must be "
    bound = ["below 2147483648"] if value == "99999999999" else []
    given = [f"{flag}={value}"] if flag.startswith("--") else [flag, value]
    one_error(call("--train", *given), flag, reason, value, *bound)


@pytest.mark.parametrize(
    ("args", "mentions"),
    [
        ([], ["--train", "--test", "--prompt"]),
        (["--iters", "3"], ["--train", "--test", "--prompt"]),
        (["--prompt", ""], ["--prompt"]),
        (["--train", "--prompt", ""], ["--prompt"]),
        (["--train", "--frobnicate"], ["--frobnicate"]),
        (["--train", "stray"], ["stray"]),
        (["--trai"], ["--trai"]),
        (["--train", "--batch", "3"], ["--batch"]),
        (["--train", "--iters"], ["--iters"]),
        (["--prompt"], ["--prompt"]),
        (["--train", "--resume-adapter-file", ""], ["--resume-adapter-file"]),
        (["--train", "--model", ""], ["--model"]),
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense_is_reported_at_once(
    call: Run, args: list[str], mentions: list[str]
) -> None:
    one_error(call(*args), *mentions)


def test_a_prompt_that_is_not_utf_8_is_reported(run: Run, fails: Fails, tmp_path: Path) -> None:
    tiny.make_adapter(tmp_path / "a.npz")
    fails("--prompt", b"caf\xe9", by=run, mentions=("prompt",))


@pytest.mark.parametrize("start", [3, 4])
def test_a_start_behind_the_last_iteration_is_reported(fails: Fails, start: int) -> None:
    fails("--train", "--iters", 3, "--start-iter", start, mentions=("--start-iter", "3"))
    fails("--train", "--batch-size", 20, "--start-iter", start, mentions=("--start-iter", "2"))


# --- The data -----------------------------------------------------------------------------------

GOOD = b'{"text": "good"}\n'
BAD_LINES = {  # and the reason that is reported
    "not JSON": (b"text: bad", "is not JSON"),
    "half an object": (b'{"text": "bad"', "is not JSON"),
    "two objects": (b'{"text": "bad"} {"text": "bad"}', "is not JSON"),
    "an array": (b'["text", "bad"]', "is not a JSON object"),
    "a string": (b'"text"', "is not a JSON object"),
    "a number": (b"3", "is not a JSON object"),
    "null": (b"null", "is not a JSON object"),
    "no text": (b'{"prompt": "bad"}', 'has no "text"'),
    "text is not a number": (b'{"text": NaN}', 'its "text" is not a text'),
    "text is null": (b'{"text": null}', 'has no "text"'),
    "text is an array": (b'{"text": ["bad"]}', 'its "text" is not a text'),
    "text is empty": (b'{"text": ""}', 'its "text" is not a text'),
    "text is only spaces": ('{"text": " \\n\\t\\u3000　"}'.encode(), 'its "text" is not a text'),
    "not UTF-8": ('{"text": "한글"}'.encode("euc-kr"), "is not UTF-8"),
    "half a character": ('{"text": "한글"}'.encode()[:-4] + b'"}', "is not UTF-8"),
    "an unpaired surrogate": (b'{"text": "bad \\ud83d"}', "half of a surrogate pair"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not JSON"),
    "a huge number": (b'{"id": ' + b"9" * 10_000 + b', "text": "bad"}', "is not JSON"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_reported_with_its_file_and_number_and_the_reason(
    fails: Fails, tmp_path: Path, line: bytes, reason: str
) -> None:
    for split in TEXTS:
        (tmp_path / f"{split}.jsonl").write_bytes(GOOD)
    (tmp_path / "valid.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    fails("--train", "--data", tmp_path, mentions=("valid.jsonl", "line 3", reason))


def test_a_file_in_utf_16_is_reported(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD.decode().encode("utf-16"))
    fails("--train", "--data", tmp_path, mentions=("train.jsonl", "is not JSON", OTHER_FORMS))


ROWS = [{"text": f"text {i}"} for i in range(3)]
FILES = {  # that are no JSON Lines, and what is said of them
    "a list": (json.dumps(ROWS), f'is not a JSON object such as {{"text": "…"}}; {OTHER_FORMS}'),
    "a list over lines": (json.dumps(ROWS, indent=2), OTHER_FORMS),
    "an object over lines": (json.dumps(ROWS[0], indent=2), OTHER_FORMS),
    "commas between lines": (
        ",\n".join(map(json.dumps, ROWS)),
        "line 1: is not JSON: Extra data: character 19",
    ),
    "Python": (f"{ROWS[0]}\n", "property name enclosed in double quotes: character 2"),
    "columns": (json.dumps({"text": ["a", "b"]}), "its \"text\" is not a text, but ['a', 'b']"),
    "a list in an object": (json.dumps({"data": ROWS}), 'with a "completion"; it has data'),
    "other names": ('{"body": "a"}', 'with a "completion"; it has body'),
    "an object by key": (
        json.dumps({f"key {i}": ROWS[0] for i in range(50_000)}),
        'with a "completion"; it has key 0, key 1, key 2, key 3, key 4 and 49995 more',
    ),
    "CSV": ("text,number\na,1\n", f"is not JSON: Expecting value: character 1; {OTHER_FORMS}"),
    "Parquet": ("PAR1\x15", OTHER_FORMS),
    "Excel": ("PK\x03\x04\x14", "looks like a zip archive or an Excel file: unpack it, or save"),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer to the file: `"),
    "a web page": ("<!DOCTYPE html>\n<html>", "looks like a web page: download the file itself"),
    "a long line": ("x" * 100_000, "line 1: is not JSON"),
}


@pytest.mark.parametrize(("content", "reason"), FILES.values(), ids=FILES.keys())
def test_what_a_file_looks_like_is_reported(
    fails: Fails, tmp_path: Path, content: str, reason: str
) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    assert len(fails("--train", "--data", tmp_path, mentions=("train.jsonl", reason))) < 600


def test_no_message_is_long_whatever_it_mentions(fails: Fails, tmp_path: Path) -> None:
    names = {f"{'x' * 5000}.{i}": np.zeros((64, 8), np.float32) for i in range(300)}
    (tmp_path / "bad.npz").write_bytes(npz.npz_content(names))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + '{"b": "' + "c" * 9999)
    for args in (
        ["--prompt", "a", "--adapter-file", tmp_path / "bad.npz"],
        ["--train", "--data", tmp_path],
        ["--train", "--iters", "9" * 5000],
        ["--prompt", "a", "--model", "m/" * 2000],
    ):
        assert len(fails(*args)) < 700


@pytest.mark.parametrize("folder", ["d" * 200, "d e " * 50, "\x01" * 200], ids=ascii)
def test_the_file_and_the_way_out_survive_however_long_a_path_and_what_is_wrong_are(
    folder: str,
) -> None:
    file = "/".join([folder] * 15) + "/train.jsonl"
    for wrong in ("it", "x" * 5000, "x y " * 5000, "\0" * 5000):
        message = str(UserError(f"{wrong} is wrong in {file}; lower --batch-size"))
        assert len(message) < 620
        assert message.endswith("/train.jsonl; lower --batch-size")
        assert message.startswith(wrong[:1].replace("\0", "\\x00"))


@pytest.mark.parametrize(
    ("phase", "split", "content"),
    [
        (phase, split, content)
        for phase, split in [("--train", "train"), ("--train", "valid"), ("--test", "test")]
        for content in (None, b"", b"\n \r\n", b"\xef\xbb\xbf")
        if (split, content) != ("valid", None)  # then some texts are held out
    ],
)
def test_a_missing_or_empty_file_is_reported(
    fails: Fails, tmp_path: Path, phase: str, split: str, content: bytes | None
) -> None:
    tiny.make_adapter(tmp_path / "a.npz")
    for name in TEXTS:
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD)
    if content is None:
        (tmp_path / f"{split}.jsonl").unlink()
    else:
        (tmp_path / f"{split}.jsonl").write_bytes(content)
    fails(phase, "--data", tmp_path, mentions=(f"{split}.jsonl",))


@pytest.mark.parametrize("phase", ["--train", "--test"])
@pytest.mark.parametrize("folder", ["missing", "file", "file/below"])
def test_a_missing_data_folder_is_reported(
    fails: Fails, tmp_path: Path, phase: str, folder: str
) -> None:
    tiny.make_adapter(tmp_path / "a.npz")
    (tmp_path / "file").write_bytes(GOOD)
    fails(phase, "--data", tmp_path / folder, mentions=(folder,))


def test_test_texts_matter_only_to_a_test(
    call: Run, fails: Fails, model: Path, data: Path, tmp_path: Path
) -> None:
    for split in ("train", "valid"):
        shutil.copy(data / f"{split}.jsonl", tmp_path)
    fails("--train", "--test", "--data", tmp_path, mentions=("test.jsonl",))
    args = ["--model", model, "--data", tmp_path, "--adapter-file", tmp_path / "a.npz"]
    assert call(*args, "--train", "--iters", 1).returncode == 0
    assert call(*args, "--prompt", "a", "--data", tmp_path / "missing").returncode == 0


# --- Adapter files ------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [["--test"], ["--prompt", "a"]])
@pytest.mark.parametrize("file", ["missing.npz", "missing/a.npz", "folder", "file/a.npz"])
def test_a_missing_adapter_is_reported_and_how_to_make_one(
    fails: Fails, tmp_path: Path, phase: list[str], file: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    error = fails(*phase, "--adapter-file", tmp_path / file, mentions=(file,))
    if file != "folder":
        assert "--train" in error


@pytest.mark.parametrize("file", ["missing.npz", "folder", "file/a.npz"])
def test_a_missing_adapter_to_resume_from_is_reported(
    fails: Fails, tmp_path: Path, file: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    fails("--train", "--resume-adapter-file", tmp_path / file, mentions=(file,))


@pytest.mark.parametrize("file", ["folder.npz", "file/a.npz", "file/to/a.npz", "n" * 300 + ".npz"])
def test_where_the_adapter_cannot_be_saved_is_reported_before_training(
    fails: Fails, tmp_path: Path, file: str
) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_bytes(b"")
    fails("--train", "--adapter-file", tmp_path / file, mentions=(file[-99:],))


def test_an_adapter_to_resume_from_needs_train(fails: Fails, tmp_path: Path) -> None:
    file = tiny.make_adapter(tmp_path / "a.npz")
    fails("--test", "--resume-adapter-file", file, mentions=("--resume-adapter-file", "--train"))


def test_fewer_layers_than_the_file_adapts_are_reported(fails: Fails, tmp_path: Path) -> None:
    file = tiny.make_adapter(tmp_path / "from.npz")
    args = ["--train", "--resume-adapter-file", file, "--lora-layers", 2]
    fails(*args, mentions=("from.npz", "--lora-layers", "model.layers.0.self_attn.q_proj"))


GOOD_ADAPTER = tiny.adapter_arrays()
FIRST = "model.layers.0.self_attn.q_proj"


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in GOOD_ADAPTER.items() if key != name}


def renamed(old: str, new: str) -> dict[str, np.ndarray]:
    return {name.replace(old, new): array for name, array in GOOD_ADAPTER.items()}


WHOLE = npz.npz_content(GOOD_ADAPTER)
BAD_FILES = {
    "empty": b"",
    "text": b"this is not an adapter\n",
    "an npy file": npy(np.zeros((64, 8), np.float32)),
    "cut in half": WHOLE[: len(WHOLE) // 2],
    "cut at the end": WHOLE[:-10],
    "a byte changed": WHOLE[:5000] + bytes([WHOLE[5000] ^ 1]) + WHOLE[5001:],
    "a safetensors file": b"\x02\0\0\0\0\0\0\0{}",
}
NOT_WHOLE = "is not a whole .npz or .safetensors file of plain arrays"
NOT_A_PAIR = f"{FIRST} is not a pair of matrices (d_in, r) and (r, d_out)"


def with_first(which: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """A good adapter with another A or B in the first place."""
    return GOOD_ADAPTER | {f"{FIRST}.{which}": array}


BAD_ARRAYS = {  # and the reason that is reported
    "none": ({}, "holds no arrays"),
    "another name": ({"arr_0": np.zeros((64, 8), np.float32)}, "has .arr_0, not a lora_a"),
    "no B": (without(f"{FIRST}.lora_b"), f"has {FIRST}.lora_a, not a lora_a and its lora_b"),
    "no A": (without(f"{FIRST}.lora_a"), f"has {FIRST}.lora_b, not a lora_a and its lora_b"),
    "something else": (with_first("bias", np.zeros(64, np.float32)), f"has {FIRST}.bias and"),
    "integers": (with_first("lora_a", np.zeros((64, 8), np.int32)), NOT_A_PAIR),
    "complex": (with_first("lora_a", np.zeros((64, 8), np.complex64)), NOT_A_PAIR),
    "text": (with_first("lora_a", np.full((64, 8), "a")), NOT_A_PAIR),
    "another rank": (with_first("lora_a", np.zeros((64, 4), np.float32)), NOT_A_PAIR),
    "rank 0": (
        with_first("lora_a", np.zeros((64, 0), np.float32))
        | {f"{FIRST}.lora_b": np.zeros((0, 64), np.float32)},
        NOT_A_PAIR,
    ),
    "experts of two numbers": (
        with_first("lora_a", np.zeros((4, 8, 64), np.float32))
        | {f"{FIRST}.lora_b": np.zeros((3, 64, 8), np.float32)},
        NOT_A_PAIR,
    ),
    "a vector": (with_first("lora_a", np.zeros(64, np.float32)), NOT_A_PAIR),
    "a scalar": (with_first("lora_a", np.float32(0)), NOT_A_PAIR),
    "not finite": (with_first("lora_a", np.full((64, 8), np.inf, np.float32)), "not finite"),
    "a wider model": (
        with_first("lora_a", np.zeros((96, 8), np.float32)),
        f"is not for this model: {FIRST} maps 64 to 64 numbers, its A and B 96 to 64",
    ),
    "as PEFT has it": (with_first("lora_a", np.zeros((8, 64), np.float32)), NOT_A_PAIR),
    "a layer too many": (
        renamed("layers.3.", "layers.4."),
        "is not for this model: there is no linear layer model.layers.4.self_attn.q_proj",
    ),
    "an unknown projection": (
        renamed("q_proj", "qkv_proj"),
        "is not for this model: there is no linear layer model.layers.0.self_attn.qkv_proj",
    ),
    "a norm": (
        renamed("self_attn.q_proj", "input_layernorm"),
        "is not for this model: there is no linear layer model.layers.0.input_layernorm",
    ),
    "the whole model": (renamed(f"{FIRST}.", ""), "there is no linear layer "),
    "numbers among names": (renamed(f"{FIRST}.", "0."), "there is no linear layer 0"),
    "a superscript": (
        renamed("layers.0.", "layers.².") | renamed("layers.0.", "layers.1."),
        "there is no linear layer model.layers.².self_attn.q_proj",
    ),
}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(content, NOT_WHOLE) for content in BAD_FILES.values()]
    + [(npz.npz_content(arrays), reason) for arrays, reason in BAD_ARRAYS.values()],
    ids=[*BAD_FILES, *BAD_ARRAYS],
)
def test_the_reason_is_reported_why_an_adapter_cannot_be_used(
    fails: Fails, tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    fails("--prompt", "a", "--adapter-file", tmp_path / "bad.npz", mentions=("bad.npz", reason))
    resume = ["--train", "--resume-adapter-file", tmp_path / "bad.npz"]
    fails(*resume, mentions=("bad.npz", reason))


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_a_git_lfs_pointer_in_place_of_an_adapter_is_reported(
    fails: Fails, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    fails("--prompt", "a", "--adapter-file", tmp_path / name, mentions=(name, "`git lfs pull`"))


class Payload:
    """Makes the folder `ran` in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.mkdir, (Path("ran"),)


@pytest.mark.parametrize("phase", [["--test"], ["--prompt", "a"]])
def test_a_pickle_in_an_adapter_is_refused_and_not_run(
    fails: Fails, tmp_path: Path, phase: list[str]
) -> None:
    pickled = np.array([[Payload()]], dtype=object)
    for name, content in [
        ("object.npz", npz.npz_content(GOOD_ADAPTER | {f"{FIRST}.lora_a": pickled})),
        ("object.npy", npy(pickled)),
    ]:
        (tmp_path / name).write_bytes(content)
        fails(*phase, "--adapter-file", tmp_path / name, mentions=(name,))
    (tmp_path / "plain.pkl").write_bytes(pickled.dumps())
    fails(*phase, "--adapter-file", tmp_path / "plain.pkl", mentions=("plain.pkl",))


def test_a_full_disk_leaves_the_old_adapter_as_it_was(model: Path, tmp_path: Path) -> None:
    file = tiny.make_adapter(tmp_path / "a.npz")
    loaded, _ = models.load(str(model))
    models.add_lora(loaded, dict.fromkeys(models.find_targets(loaded, 4), 64))
    before = listing(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"a\.npz cannot be written: File too large"):
            npz.write_arrays(file, npz.trainable_arrays(loaded))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(tmp_path) == before


# --- Models -------------------------------------------------------------------------------------


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoilt, beside an adapter that is in order."""
    tiny.make_adapter(tmp_path / "a.npz")
    return Path(shutil.copytree(model, tmp_path / "copied"))


def damage_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def damage_weights(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def cut_weights(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def split_weights(folder: Path) -> None:
    """Put the weights into two files, which an index lists as the hub has it."""
    weights = list(mx.load(str(folder / "model.safetensors")).items())
    weight_map = {}
    for part, arrays in [(1, weights[:20]), (2, weights[20:])]:
        name = f"model-0000{part}-of-00002.safetensors"
        mx.save_safetensors(str(folder / name), dict(arrays))
        weight_map |= {array: name for array, _ in arrays}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


SECOND = "model-00002-of-00002.safetensors"


def lose_second_file(folder: Path) -> None:
    split_weights(folder)
    (folder / SECOND).unlink()


def cut_index(folder: Path) -> None:
    split_weights(folder)
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text()[:99])


def no_map(folder: Path) -> None:
    split_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def point_to(name: str) -> Callable[[Path], object]:
    """A clone without Git LFS has a few lines in the place of a large file."""
    return lambda folder: (folder / name).write_text(POINTER)


def point_to_second_file(folder: Path) -> None:
    split_weights(folder)
    (folder / SECOND).write_text(POINTER)


def break_link(folder: Path) -> None:
    """As in a cache of the hub that was not copied whole."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/0123456789abcdef")


DAMAGED_JSON = "config.json is damaged or cut short"
DAMAGED_WEIGHTS = "model.safetensors is damaged or cut short"
NO_WEIGHTS = "has no model*.safetensors (no pickle such as pytorch_model.bin is loaded); download"
IS_POINTER = "is not the file itself but a Git LFS pointer to it; `git lfs pull` in"
DAMAGED = {  # and the reason that is reported
    "half of the special tokens": (
        lambda folder: (folder / "special_tokens_map.json").write_text('{"a": '),
        "special_tokens_map.json is damaged or cut short",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json; download"),
    "an empty config": (lambda folder: (folder / "config.json").write_text(""), DAMAGED_JSON),
    "half a config": (lambda folder: (folder / "config.json").write_text("{"), DAMAGED_JSON),
    "a config that is an array": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json is not a JSON object; download it again",
    ),
    "no model type": (
        lambda folder: (folder / "config.json").write_text("{}"),
        "as mlx-lm's None (KeyError 'model_type'); compare",
    ),
    "an unknown model type": (
        lambda folder: damage_config(folder, model_type="frobnicator"),
        "as mlx-lm's frobnicator (Model type frobnicator not supported.); compare",
    ),
    "a model type that is a module": (
        lambda folder: damage_config(folder, model_type="base"),
        "as mlx-lm's base (module 'mlx_lm.models.base' has no attribute 'Model'); compare",
    ),
    "a model type that ends the process": (
        lambda folder: damage_config(folder, model_type="olmo"),
        "as mlx-lm's olmo (SystemExit 1)",
    ),
    "a config of nonsense": (
        lambda folder: damage_config(folder, hidden_size="many"),
        "as mlx-lm's llama (",
    ),
    "a config without a number": (
        lambda folder: damage_config(folder, rms_norm_eps=None),
        "as mlx-lm's llama (",
    ),
    "another number of layers": (
        lambda folder: damage_config(folder, num_hidden_layers=5),
        "(Missing 9 parameters: model.layers.4.input_layernorm.weight, model.layers.4.mlp.down_",
    ),
    "no tokenizer": (no_tokenizer, "has no tokenizer*; download"),
    "no tokenizer.json": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "cannot be loaded (Couldn't instantiate the backend tokenizer",
    ),
    "a damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "cannot be loaded (KeyError 'added_tokens'); compare its files with their source",
    ),
    "half a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version": '),
        "tokenizer.json is damaged or cut short",
    ),
    "half of the tokenizer's settings": (
        lambda folder: (folder / "tokenizer_config.json").write_text("{"),
        f"tokenizer_{DAMAGED_JSON}",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), NO_WEIGHTS),
    "only pickled weights": (only_pickled_weights, NO_WEIGHTS),
    "empty weights": (lambda folder: cut_weights(folder, 0), DAMAGED_WEIGHTS),
    "half of the weights": (lambda folder: cut_weights(folder, 300_000), DAMAGED_WEIGHTS),
    "weights cut in their header": (lambda folder: cut_weights(folder, 1000), DAMAGED_WEIGHTS),
    "a weight too few": (
        lambda folder: damage_weights(folder, lambda weights: weights.pop(f"{FIRST}.weight")),
        f"as mlx-lm's llama (Missing 1 parameters: {FIRST}.weight.); compare",
    ),
    "a weight too many": (
        lambda folder: damage_weights(folder, lambda weights: weights.update(more=mx.zeros(3))),
        "as mlx-lm's llama (Received 1 parameters not in model: more.); compare",
    ),
    "a weight of another shape": (
        lambda folder: damage_weights(
            folder, lambda weights: weights.update({f"{FIRST}.weight": mx.zeros((64, 32))})
        ),
        f"Expected shape (64, 64) but received shape (64, 32) for parameter {FIRST}.weight",
    ),
    "a file of the weights missing": (lose_second_file, f"{SECOND} of "),
    "half an index": (cut_index, "index.json is damaged or cut short"),
    "an index without a map": (no_map, "weight_map of "),
    "a pointer to the weights": (point_to("model.safetensors"), f"model.safetensors {IS_POINTER}"),
    "a pointer to some weights": (point_to_second_file, f"{SECOND} {IS_POINTER}"),
    "a pointer to the config": (point_to("config.json"), f"config.json {IS_POINTER}"),
    "a pointer to the tokenizer": (point_to("tokenizer.json"), f"tokenizer.json {IS_POINTER}"),
    "a link to nowhere": (break_link, "model.safetensors: No such file or directory"),
}


@pytest.mark.parametrize(("spoil", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_the_reason_is_reported_why_a_model_folder_cannot_be_loaded(
    fails: Fails, copied: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(copied)
    fails("--prompt", "a", "--model", copied, mentions=(str(copied), reason))


def test_weights_in_several_files_are_all_loaded(call: Run, copied: Path, tmp_path: Path) -> None:
    args = ["--model", copied, "--adapter-file", tmp_path / "a.npz", "--prompt", "a", "--temp", 0]
    in_one = call(*args)
    split_weights(copied)
    in_two = call(*args)
    assert in_two.returncode == 0, in_two.stderr
    assert in_two.stdout.split("=====")[0] == in_one.stdout.split("=====")[0]


@pytest.mark.parametrize("name", ["a[8bit]", "*", "[!m]?{a,b}", "모델 폴더", "~model", "model.txt"])
def test_any_path_of_a_model_folder_works(
    call: Run, data: Path, copied: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the path itself alone: also relative to the working directory, and over a link."""
    copied.rename(tmp_path / name)
    (tmp_path / "link").symlink_to(name)
    monkeypatch.chdir(data)
    args = ["--data", ".", "--adapter-file", tmp_path / "a.npz", "--test", "--test-batches", 1]
    for path in (tmp_path / name, f"{os.path.relpath(tmp_path)}/{name}/", tmp_path / "link"):
        ended = call("--model", path, *args)
        assert (ended.returncode, ended.stderr) == (0, "")
    (tmp_path / name / "config.json").unlink()
    monkeypatch.chdir(tmp_path)
    one_error(call("--model", f"./{name}", *args, "--data", data), f"folder {name} has no config")


@pytest.mark.parametrize("name", ["missing", "./missing", "owner/name/more", "a.npz", "/missing"])
def test_a_model_that_is_not_there_is_reported(fails: Fails, tmp_path: Path, name: str) -> None:
    tiny.make_adapter(tmp_path / "a.npz")
    fails("--prompt", "a", "--model", name, mentions=(name,))


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_out_of_reach_is_reported(
    run: Run, fails: Fails, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, offline: bool
) -> None:
    """Tests are offline; and nothing listens at port 9 of this computer."""
    tiny.make_adapter(tmp_path / "a.npz")
    env = {
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": None,
    }
    args = ["--prompt", "a", "--model", "some-owner/some-model"]
    how = {} if offline else {"by": run, "env": env}
    fails(*args, **how, mentions=("some-owner/some-model", "hub"))


def test_what_else_is_wrong_is_reported_before_a_model_is_fetched(
    fails: Fails, tmp_path: Path
) -> None:
    hub = ["--model", "some-owner/some-model"]
    fails("--train", *hub, "--data", tmp_path / "missing", mentions=("train.jsonl",))
    fails("--prompt", "a", *hub, mentions=("a.npz",))
    (tmp_path / "file").touch()
    fails("--train", *hub, "--adapter-file", tmp_path / "file/a.npz", mentions=("a.npz",))
    fails("--train", *hub, "--iters", 3, "--start-iter", 3, mentions=("--start-iter",))
    (tmp_path / "bad.npz").write_bytes(b"bad")
    fails("--train", *hub, "--resume-adapter-file", tmp_path / "bad.npz", mentions=("bad.npz",))


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}),
        ("config.json", {"auto_map": {"AutoTokenizer": "code.Tokenizer"}}),
        ("config.json", {"auto_map": {"AutoConfig": "code.Config"}}),
        ("config.json", {"model_file": "code.py"}),
    ],
)
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    call: Run, data: Path, copied: Path, tmp_path: Path, file: str, setting: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whether it can be done without is another matter: then all is well, else an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    (copied / "code.py").write_text("import pathlib\npathlib.Path('ran').mkdir()\n")
    settings = json.loads((copied / file).read_text())
    settings["tokenizer_class"] = "Tokenizer"
    (copied / file).write_text(json.dumps(settings | setting))
    args = ["--model", copied, "--data", data, "--adapter-file", tmp_path / "a.npz"]
    ended = call(*args, "--prompt", "a")
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in ended.stdout + ended.stderr
    if ended.returncode:
        one_error(ended, str(copied))
    else:
        assert ended.stderr == ""
