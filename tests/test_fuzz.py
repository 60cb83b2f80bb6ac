"""Files that are damaged in thousands of ways: an error in one line, and never anything worse."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import json
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import background
import models
import tiny
from conftest import OUTCOME, ROOT
from lora_finetune.adapters import loading, mlx_lm, npz
from lora_finetune.base.errors import UserError
from lora_finetune.run import checkpoint
from lora_finetune.texts import dataset, tokenizing
from lora_finetune.texts.chat import template_of
from mutations import REPLACED, mutate

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

# How often each file is spoilt for the functions that read it, and for the command line.
NUMBERS = {
    "a.npz": (500, 20),
    "s.safetensors": (300, 20),
    "peft/adapter_model.safetensors": (200, 10),
    "peft/adapter_config.json": (400, 10),
    "adapter_config.json": (200, 10),
    "texts/train.jsonl": (300, 20),
    "prompts/train.jsonl": (200, 10),
    "messages/train.jsonl": (300, 20),
    "model/config.json": (300, 30),
    "model/tokenizer.json": (200, 20),
    "model/tokenizer_config.json": (200, 20),
    "model/model.safetensors": (200, 20),
}
WORKERS = 2
SECONDS = 60  # that a case may take, on a busy computer too
MEMORY = 2**30  # bytes that a case may take

ENTRIES = {
    "texts": {"text": "### 질문: 물은?\n### 답변: H2O"},
    "prompts": {"prompt": "물은?", "completion": "H2O"},
    "messages": {
        "messages": [{"role": "user", "content": "물은?"}, {"role": "assistant", "content": "H2O"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
}

TRAIN = ["--train", "--lora-layers", "2", "--batch-size", "2", "--val-batches", "1"]
RESUME = ["--train", "--batch-size", "2", "--val-batches", "1", "--iters", "3"]
GENERATE = ["--prompt", "가", "--max-tokens", "3"]
COMMANDS = {
    "a.npz": [
        ["--adapter-file", "a.npz", *GENERATE],
        [*RESUME, "--resume-adapter-file", "a.npz", "--adapter-file", "a.npz"],
    ],
    "s.safetensors": [
        ["--adapter-file", "s.safetensors", *GENERATE],
        [*RESUME, "--resume-adapter-file", "s.safetensors", "--adapter-file", "b.npz"],
    ],
    "peft": [["--adapter-file", "peft", *GENERATE]],
    "adapter_config.json": [["--adapter-file", "s.safetensors", *GENERATE]],
    "train.jsonl": [
        [*TRAIN, "--iters", "1", "--adapter-file", "b.npz"],
        [*TRAIN, "--iters", "1", "--adapter-file", "b.npz", "--mask-prompt"],
    ],
    "model": [
        [*TRAIN, "--iters", "1", "--test", *GENERATE, "--adapter-file", "b.npz"],
        ["--adapter-file", "a.npz", "--test", *GENERATE],
    ],
}


class Case(NamedTuple):
    """A file with other content, for the command line of a number or a function that reads it.

    Attributes:
        change: a name in REPLACED, or a seed.
    """

    file: str
    change: str
    command: int | None = None

    def content(self, whole: bytes) -> bytes:
        if change := REPLACED.get(self.file, {}).get(self.change):
            return change(whole)
        return mutate(whole, Path(self.file).suffix, f"{self.file} {self.change}")


# --- A worker -----------------------------------------------------------------------------------


def work(folder: Path, cases: list[Case], connection: Connection) -> None:
    """Try cases in a copy of a folder; send for each what is wrong, or an empty string."""
    gc.freeze()  # as in background.run
    os.chdir(folder)
    for descriptor, name in [(1, "../out"), (2, "../err")]:
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
    faulthandler.enable()
    whole = contents()
    for case in cases:
        connection.send(attempt(case, whole))
        restore(whole)


def allow_memory() -> int:
    """Bytes of memory that this process may take at most from here on; 0 where none can tell."""
    if platform.system() != "Linux":
        return 0
    most = memory("VmSize") + 3 * MEMORY  # much of it is never touched
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return memory("VmRSS") + MEMORY


def memory(what: str) -> int:
    """Bytes of memory of this process, as Linux tells them."""
    [kilobytes] = re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def restore(whole: dict[Path, bytes]) -> None:
    found = contents()
    for path in found.keys() - whole.keys():
        path.unlink()
    for path, content in whole.items():
        if found.get(path) != content:
            path.write_bytes(content)


def attempt(case: Case, whole: dict[Path, bytes]) -> str:
    """Try a case; returns what is wrong, if anything."""
    for name in ("../out", "../err"):
        os.truncate(name, 0)
    file = Path(case.file)
    before = whole | {file: case.content(whole[file])}
    file.write_bytes(before[file])
    limit = allow_memory()
    try:
        status = call_function(case) if case.command is None else run_command(case)
    except BaseException:
        return traceback.format_exc()
    said = Path("../err").read_text(errors="replace").splitlines()
    errors = [line for line in said if not line.startswith(("warning: ", "hint: ", *OUTCOME))]
    if status != (2 if errors else 0) or len(errors) > 1:
        return f"exit status {status}, and on standard error:\n" + "\n".join(said)
    if errors and not errors[0].startswith("error: "):
        return errors[0]
    if limit and memory("VmHWM") > limit:
        return f"{memory('VmHWM') / 1e9:.1f} GB of memory were taken"
    return what_is_left(before)


def run_command(case: Case) -> int:
    file, commands = Path(case.file), commands_of(case.file)
    data = str(file.parent) if file.suffix == ".jsonl" else "texts"
    common = ["--model", "model", "--data", data]
    sys.argv = [str(ROOT / "train_lora.py"), *common, *commands[case.command]]
    return background.run_script(sys.argv[0])


def commands_of(file: str) -> list[list[str]]:
    path = Path(file)
    return COMMANDS[path.parent.name if path.parent.name in COMMANDS else path.name]


def call_function(case: Case) -> int:
    file = Path(case.file)
    try:
        if file.suffix == ".jsonl":
            read_data(file)
        elif file.parent.name == "model":
            models.load("model")
        elif file.name == "adapter_config.json":
            names = ("adapter_model.safetensors", "s.safetensors")
            loading.read_adapter(next(filter(Path.is_file, map(file.with_name, names))))
        else:
            loading.read_adapter(file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


@cache
def tokenizer_in_order() -> TokenizerWrapper:
    return models.load("model")[1]


def read_data(file: Path) -> None:
    tokenizer = tokenizer_in_order()
    for mask_prompt in (False, True):
        tokenizing.load(
            {"train": dataset.read(file, mask_prompt)},
            tokenizer,
            template_of(tokenizer),
            vocabulary_size=300,
            add_eos=True,
            mask_prompt=mask_prompt,
            max_length=50,
        )


def what_is_left(before: dict[Path, bytes]) -> str:
    """What is wrong with the files that a case leaves, where anything is."""
    after = contents()
    if Path("ran").exists():
        return "code in the file ran"
    kept = {Path(str(path).replace("a.", "a.previous-1.", 1)): path for path in before}
    if before.keys() - after.keys() - {kept.get(path) for path in after}:
        return "a file has gone"
    changed = [path for path, content in after.items() if content != before.get(path)]
    for path in changed:
        if path.suffix == ".part" or not (path.parent == Path() or path.parent.suffix == ".run"):
            return f"{path} was written"
        if path.suffix in (".npz", ".safetensors"):
            npz.read_arrays(path)
    for path in changed:
        if path.suffix == ".npz" and path.parent == Path() and path not in kept:
            loading.read_adapter(path)
            if not checkpoint.read_state(path):
                return f"{path} and its state do not belong together"
    return ""


# --- All of them --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files in order: a model, data, and two adapters after two iterations."""
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    tiny.make_model(folder / "model", num_hidden_layers=2)
    file = folder / "model" / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ tools | tojson }}"
    )
    settings = json.loads(file.read_text()) | {"chat_template": template}
    file.write_text(json.dumps(settings))
    for name, entry in ENTRIES.items():
        make_data(folder / name, entry)
    args = ["--model", "model", "--data", "texts", *TRAIN, "--iters", 2, "--adapter-file", "a.npz"]
    process = background.start(folder, *args)
    process.join()
    assert process.exitcode == 0, (folder / "err").read_text()
    arrays, config = npz.read_arrays(folder / "a.npz"), {"lora_parameters": {"scale": 20.0}}
    mlx_lm.write_files(folder / "s.safetensors", arrays, "mlx", config)
    tiny.make_peft(
        folder / "peft", layer=1, alpha_pattern={"q_proj": 4}, rank_pattern={"q_proj": 2}
    )
    for path in [folder / "out", folder / "err", *folder.glob("*.best.*"), *folder.glob("*.log.*")]:
        path.unlink()
    return folder


def make_data(folder: Path, entry: dict[str, object]) -> None:
    """Three sets of a few times the same entry."""
    folder.mkdir()
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text(line * 5, encoding="utf-8")


def run_cases(folder: Path, cases: list[Case]) -> dict[Case, str]:
    """Try cases in processes of their own; returns the bad ones, and why they are."""
    bad = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        shares = [cases[number::WORKERS] for number in range(WORKERS)]
        for found in pool.map(run_share, itertools.repeat(folder), shares):
            bad |= found
    return bad


def run_share(folder: Path, cases: list[Case]) -> dict[Case, str]:
    """Try cases in one process after another: a new one for each that a case ends or halts."""
    bad = {}
    while cases:
        copy = Path(tempfile.mkdtemp(dir=folder.parent)) / "copy"
        shutil.copytree(folder, copy)
        receiver, sender = background.CONTEXT.Pipe(duplex=False)
        process = background.CONTEXT.Process(target=work, args=(copy, cases, sender))
        process.start()
        sender.close()
        for case, wrong in zip(cases, verdicts(receiver), strict=False):
            if wrong:
                bad[case] = wrong
            cases = cases[1:]
        if cases:
            process.kill()
        process.join()
        if cases:
            err = (copy.parent / "err").read_text(errors="replace")
            bad[cases[0]] = f"the process ended with {process.exitcode}, or took too long: {err}"
            cases = cases[1:]
    return bad


def verdicts(receiver: Connection) -> Iterator[str]:
    """What a worker sends, until it ends or is silent for too long."""
    try:
        while receiver.poll(SECONDS):
            yield receiver.recv()
    except EOFError:
        pass


@pytest.mark.parametrize("file", NUMBERS)
def test_a_damaged_file_gives_one_error_at_most(base: Path, file: str) -> None:
    read, run = NUMBERS[file]
    commands = len(commands_of(file))
    cases = [Case(file, f"seed {seed}") for seed in range(read)]
    cases += [Case(file, f"seed {seed}", seed % commands) for seed in range(read, read + run)]
    assert_all_good(run_cases(base, cases))


def test_past_crashes_are_errors(base: Path) -> None:
    cases = [
        Case(file, name, command)
        for file, changes in REPLACED.items()
        for name in changes
        for command in [None, *range(len(commands_of(file)))]
    ]
    assert_all_good(run_cases(base, cases))


def assert_all_good(bad: dict[Case, str]) -> None:
    assert not bad, "\n\n".join(f"{case}: {wrong}" for case, wrong in bad.items())
