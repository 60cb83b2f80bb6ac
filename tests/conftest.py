"""What the tests share: a tiny model, some data, and the command line."""

from __future__ import annotations

import gc
import hashlib
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Threads only cost time with matrices as small as here, very much so on a busy computer.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Bytes are compared, which on CUDA are the same without cuDNN's attention alone.
os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")

import kernels  # noqa: E402
import tiny  # noqa: E402
from background import run_script  # noqa: E402
from lora_finetune.base import linux_cpu  # noqa: E402

import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402

kernels.install()
# As a run does before it loads a model, so that runs in this process are those of others.
if mx.default_device() == mx.cpu:
    linux_cpu.can_compile()

# What a background job ignores is ignored by all that it starts; what it handles is not.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Take what is imported by now out of every later search for garbage, of 0.1 s each."""
    gc.collect()
    gc.freeze()


Ended = subprocess.CompletedProcess
Run = Callable[..., Ended]

SENTENCES = ["서울입니다.", "100도요.", "Sugar, from light.", "The earth.", "김치 🥬🌶️.", "네."]


def make_texts(number: int, start: int) -> list[str]:
    """Questions with answers of one to four sentences, no two alike."""
    return [
        f"질문: {i}?\n답변: "
        + " ".join(SENTENCES[i * n % len(SENTENCES)] for n in range(1, 2 + i % 4))
        for i in range(start, start + number)
    ]


TEXTS = {"train": make_texts(37, 0), "valid": make_texts(11, 100), "test": make_texts(13, 200)}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with TEXTS; not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    for split, texts in TEXTS.items():
        tiny.write_jsonl(folder, split, texts)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a llama of four layers; not to be changed."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def run() -> Run:
    """The command line, in a process of its own."""

    def run(
        *args: object,
        script: str = "train_lora.py",
        python: tuple[str, ...] = (),
        env: dict[str, str | None] | None = None,
        **options: object,
    ) -> Ended:
        """Run `script` with `args`; `env` adds to the environment, or with None takes away."""
        environment = {**os.environ, **(env or {})}
        ended = subprocess.run(
            [sys.executable, *python, ROOT / script, *map(as_argument, args)],
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            timeout=600,
            check=False,
            **options,
        )
        # Decoded there, since text mode would take each \r that a model says for a line end.
        return without_outcome(Ended(ended.args, ended.returncode, ended.stdout, ended.stderr))

    return run


@pytest.fixture
def call(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process, which has MLX already; that saves two seconds a run."""

    def call(*args: object) -> Ended:
        argv = [str(ROOT / "train_lora.py"), *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)
        for name in ("stdout", "stderr"):  # which the program replaces
            monkeypatch.setattr(sys, name, getattr(sys, name))
        status = run_script(argv[0])
        if status or mx.default_device() == mx.gpu:
            gc.collect()  # or a run that failed would keep its lock and its memory
        return without_outcome(Ended(argv, status, *capfdbinary.readouterr()))

    return call


def on_terminal(*command: object) -> tuple[int, bytes]:
    """The status of a process, and what it writes to a terminal of 60 columns."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 60))
    with subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=writer) as process:
        os.close(writer)
        shown = b""
        with suppress(OSError):  # at its end
            while more := os.read(reader, 1000):
                shown += more
    os.close(reader)
    return process.returncode, shown


PERPLEXITY = re.compile(r"ppl ([\d.]+)\.\n")  # on the test set, in what a program wrote

# How the last lines of training begin, on stderr.
OUTCOME = ("Validation loss ", "Ask it: ", "Go on: ", "Export it: ")

# What a GPU has to say beside, on stderr.
OF_GPU = re.compile("^hint: (trying out|the weights are dequantized|attention is).*\n", re.M)


def without_outcome(ended: Ended) -> Ended:
    """What a program wrote, decoded; the last lines of training, on stderr, are in `outcome`."""
    ended.stdout, stderr = ended.stdout.decode(), ended.stderr.decode()
    if mx.default_device() == mx.gpu:
        stderr = OF_GPU.sub("", stderr)
    lines = "".join(f"{start}.*\n" for start in OUTCOME)
    ended.stderr, ended.outcome, _ = re.split(rf"({lines})?\Z", stderr, maxsplit=1)
    return ended


def as_argument(arg: object) -> str | bytes:
    """An argument for a process: bytes stay as they are, all else becomes text."""
    return arg if isinstance(arg, bytes) else str(arg)


def one_error(ended: Ended, *mentions: str) -> str:
    """Check that a run ended with one error line, which mentions certain things; returns it."""
    assert ended.returncode == 2, ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in ended.stdout
    for mention in mentions:
        assert mention in lines[0]
    return lines[0]


def listing(*folders: Path) -> dict[str, str]:
    """All files below some folders, each with a hash of what it holds, and all folders."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in folder.rglob("*")
    }
