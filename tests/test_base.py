"""Machines that are not as usual: nothing can be written, Windows, an old Python."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import tiny
import train_lora
from conftest import PERPLEXITY, ROOT, Run, on_terminal, one_error
from lora_finetune.base import files

import datasets
import mlx.core as mx
import pytest

# --- Nothing can be written ---------------------------------------------------------------------


def write_nothing() -> None:
    """Let this process write no file, wherever: as with a read-only root, no folder takes one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_testing_and_generating_need_no_file_to_be_written(
    call: Run, run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """Nor for what MLX compiles; the log is missed, and the fast BLAS where it is in a wheel."""
    tiny.make_adapter(tmp_path / "a.npz")
    args = ["--model", model, "--data", data, "--adapter-file", tmp_path / "a.npz", "--temp", 0]
    args += ["--test", "--prompt", "안녕", "--max-tokens", 5]
    # Kernels of earlier runs, in the folder of temporary files, would be taken for compiling.
    ended = run(*args, preexec_fn=write_nothing, env={"TMPDIR": tmp_path})
    assert ended.returncode == 0, ended.stderr
    *_, last = ended.stderr.splitlines()
    assert (
        last == f"warning: the log {tmp_path / 'a.run/log.jsonl'} cannot be written: File too large"
    )
    usual = call(*args)
    found = [float(PERPLEXITY.search(e.stdout)[1]) for e in (ended, usual)]
    assert found[0] == pytest.approx(found[1], 1e-5)  # computed another way, where nothing compiles
    printed = [PERPLEXITY.sub("", e.stdout).split("=====")[0] for e in (ended, usual)]
    assert printed[0] == printed[1]


def test_pytorch_is_not_imported_where_it_is_installed(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    """Which transformers would do, in seconds and 180 MB, for nothing that is used."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('PyTorch is imported')\n")
    (tmp_path / "torch-2.9.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n"
    (tmp_path / "torch-2.9.0.dist-info/METADATA").write_text(metadata)
    args = ["--train", "--model", model, "--data", data, "--adapter-file", tmp_path / "a.npz"]
    args += ["--iters", 1, "--prompt", "안녕", "--max-tokens", 1]
    ended = run(*args, env={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr


# Runs a script on one source after the other.
DRY_RUNS = """
import runpy, sys
script, *sources = sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]
for source in sources:
    sys.argv = [script, "--source", source, "--dry-run"]
    runpy.run_path(script, run_name="__main__")
"""


def test_a_dry_run_needs_no_file_to_be_written(run: Run, tmp_path: Path) -> None:
    """Nor a folder for the cache of `datasets`."""
    rows = {"question": [f"{i}?" for i in range(99)], "answer": ["네."] * 99}
    saved = datasets.Dataset.from_dict(rows)
    sources = [tmp_path / f"source.{kind}" for kind in ("arrow", "csv", "jsonl")]
    for save, source in zip(
        (saved.save_to_disk, saved.to_csv, saved.to_json), sources, strict=True
    ):
        save(source)
    (tmp_path / "file").touch()
    ended = run(
        *sources,
        script="prepare_lora_data.py",
        python=("-c", DRY_RUNS),
        env={"HF_HOME": str(tmp_path / "file/cache")},  # where no folder can be made
        cwd=tmp_path,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    for source in sources:
        assert f"Read 99 examples of {source}: " in ended.stdout


def test_a_command_that_has_to_write_says_what_it_cannot(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    args = ["--model", model, "--data", data, "--adapter-file", "a.npz", "--lora-layers", 2]
    ended = run(*args, "--train", cwd=tmp_path, preexec_fn=write_nothing)
    assert ended.returncode == 2
    assert (
        ended.stderr.splitlines()[-1] == "error: a.run/state.npz cannot be written: File too large"
    )
    output = ["--output", tmp_path]
    ended = run(*output, script="prepare_lora_data.py", preexec_fn=write_nothing)
    one_error(ended, "No usable temporary directory found in")


# --- Windows and others -------------------------------------------------------------------------

# What the standard library has to import itself is imported before the platform is another.
ON_WINDOWS = """
import ctypes, runpy, shutil, sqlite3, sys
sys.platform, sys.modules["fcntl"], sys.argv = "win32", None, sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "script", ["train_lora.py", "lora_finetune/train_lora.py", "prepare_lora_data.py"]
)
@pytest.mark.parametrize("args", [[], ["--help"], ["--train"]], ids=str)
def test_windows_is_referred_to_wsl2(run: Run, script: str, args: list[str]) -> None:
    one_error(run(*args, script=script, python=("-c", ON_WINDOWS)), "Windows", "WSL2")


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_names_what_is_missing_before_it_installs_anything(tmp_path: Path) -> None:
    """With a Python that says it is 3.10."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    old = tmp_path / "python3.10"
    code = "import sys; sys.version_info = (3, 10, 4); $2"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    old.chmod(0o755)
    # As typed, and not as a part of the `make test` that may have started these tests.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    make = ["make", "demo", f"PYTHON={old}"]
    ended = subprocess.run(make, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    first, *of_make = ended.stderr.splitlines()
    assert first.startswith("error: Python 3.11 to 3.14 is needed, and this is 3.10; ")
    assert all(line.startswith("make: ") for line in of_make)
    assert not (tmp_path / ".venv").exists()


# --- What differs between Macs and others -------------------------------------------------------


def test_tf32_is_turned_off_on_cuda_alone(run: Run) -> None:
    code = "import os, models; print(os.environ.get('MLX_ENABLE_TF32'))"
    ended = run(python=("-c", code), env={"MLX_ENABLE_TF32": None}, cwd=ROOT)
    assert ended.stdout == f"{0 if mx.cuda.is_available() else None}\n"


@pytest.mark.parametrize("able", [True, False])
def test_on_a_mac_what_is_saved_is_on_the_disk_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    """Where the file system can do that; where not, it is flushed in the usual way."""
    calls = []

    def control(descriptor: int, command: int) -> None:
        calls.append("F_FULLFSYNC")
        if not able:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    with files.atomic_write(tmp_path / "a", tmp_path / "b") as streams:
        for stream in streams:
            stream.write(b"whole")
    assert calls == (["F_FULLFSYNC"] * 2 if able else ["F_FULLFSYNC", "fsync"] * 2)
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"whole"] * 2


def test_what_a_folder_held_is_kept_in_it_where_nothing_can_be_made_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside the one folder that a container may write."""
    file = tmp_path / "above" / "out" / "train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("before")
    (tmp_path / "above").chmod(0o555)
    monkeypatch.chdir(tmp_path / "above")  # through what is above it, "nobody" may not go
    is_root, nobody = os.getuid() == 0, 65534
    if is_root:  # who may write everywhere
        for path in (file.parent, file):
            os.chown(path, nobody, -1)
        os.setresuid(nobody, nobody, 0)
    try:
        for text in ("now", "then"):
            with files.earlier_kept(Path("out"), [Path("out/train.jsonl")]):
                Path("out/train.jsonl").unlink()
                Path("out/train.jsonl").write_text(text)
    finally:
        if is_root:
            os.setresuid(0, 0, 0)
        (tmp_path / "above").chmod(0o755)
    kept = sorted(file.parent.glob(".previous-*/train.jsonl"))
    assert [each.read_text() for each in kept] == ["before", "now"]


def test_a_bar_is_closed_before_an_error_and_a_line_stands_above_it() -> None:
    """As people see it on a terminal of 60 columns, where the bar fills its line."""
    program = (
        "import lora_finetune; from lora_finetune.base import errors; from tqdm import tqdm\n"
        "bar = tqdm(total=2, mininterval=0, **errors.bar_options()); bar.update()\n"
        "errors.warn('a'); errors.print_line('b')\nraise errors.UserError('c')"
    )
    status, shown = on_terminal(sys.executable, "-c", program)
    assert status == 2
    lines = shown.decode().replace("\r\n", "\n").split("\n")
    # What is behind the last carriage return of a line is what is seen of it.
    seen = [line.rpartition("\r")[2] for line in lines]
    assert seen[:2] == ["warning: a", "b"]
    assert seen[2].startswith(" 50%|") and seen[3:] == ["error: c", ""]


def test_bars_leave_room_in_their_line_for_what_a_terminal_shows_of_ctrl_c(
    data: Path, model: Path, tmp_path: Path
) -> None:
    """Twice; in the next line it would let an old copy of the bar stand."""
    args = ["--train", "--model", model, "--data", data, "--iters", 2, "--val-batches", 1]
    args += ["--lora-layers", 4, "--adapter-file", tmp_path / "a.npz"]
    command = [sys.executable, ROOT / "train_lora.py", *args]
    status, shown = on_terminal(*map(str, command))
    assert status == 0
    drawn = [part.rstrip() for part in re.split("[\r\n\x1b]", shown.decode()) if "|" in part]
    assert {bar.partition(" ")[0] for bar in drawn} == {"Tokenizing", "Evaluating:", "Training:"}
    assert max(map(len, drawn)) <= 56


# --- Flags from a file ---------------------------------------------------------------------------


def test_flags_are_read_from_a_file_and_what_is_typed_after_wins(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.write_text("--seed 5\n")
    file = tmp_path / "flags of mine"
    file.write_text(f"# a comment\n--iters 3 --seed 4  # both\n--prompt '#1 안녕'\n@{inner}\n")
    parser = train_lora.build_parser()
    found = parser.parse_args(["--batch-size", "9", f"@{file}", "--iters", "7", "--train"])
    assert (found.batch_size, found.iters, found.seed, found.train) == (9, 7, 5, True)
    assert found.prompt == ["#1 안녕"]
    assert {"iters", "seed"} <= found.typed


def test_a_value_that_begins_with_the_mark_of_a_file_is_none() -> None:
    words = ["--prompt", "@you", "-p", "@me", "--export", "peft", "@here", "--prompt=@all"]
    found = train_lora.build_parser().parse_args(words)
    assert found.prompt == ["@you", "@me", "@all"]
    assert found.export == [["peft", "@here"]]


def test_a_file_of_flags_that_cannot_be_read_is_an_error(call: Run, tmp_path: Path) -> None:
    one_error(call("--train", f"@{tmp_path / 'none'}"), "none cannot be read: No such file")
    (tmp_path / "loop").write_text(f"@{tmp_path / 'loop'}")
    one_error(call("--train", f"@{tmp_path / 'loop'}"), "loop names itself")
