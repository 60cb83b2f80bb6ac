"""Models of the Hugging Face hub, by its own client from a hub on this computer."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import hub as hubs
import tiny
from conftest import ROOT, Run, one_error
from lora_finetune.base import errors
from lora_finetune.base.errors import UserError
from lora_finetune.model_folder.hub import find_model

import mlx.core as mx
import pytest
from huggingface_hub import close_session, constants, hf_hub_download

NAME = "some-owner/some-model"
LIMIT = 1  # seconds for the first answer, 10 without these tests

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[hubs.Hub, str]]:
    with hubs.started() as (hub, address):
        yield hub, address


@pytest.fixture
def hub(
    server: tuple[hubs.Hub, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[hubs.Hub]:
    """The hub, with the tiny model and nothing in the cache; what a test does to it is undone."""
    hub, address = server
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", LIMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "home" / "assets"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    vars(hub).update(vars(hubs.Hub()))
    hub.folders[NAME, "main"] = model
    yield hub
    hub.ended.set()
    close_session()


@pytest.fixture
def environment(hub: hubs.Hub, tmp_path: Path) -> dict[str, str]:
    """Variables by which another process sees that hub and that cache."""
    environment = os.environ | {"HF_ENDPOINT": constants.ENDPOINT}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DOWNLOAD_TIMEOUT": str(LIMIT)}
    return environment | {"HF_HUB_OFFLINE": "0"}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tiny.make_adapter(tmp_path / "a.npz")
    return tmp_path / "a.npz"


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(model, tmp_path / "copied"))


def names_in(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


# --- What is fetched ----------------------------------------------------------------------------

WANTED = {
    "config.json", "tokenizer.json", "tokenizer_config.json", "tekken.json", "README.md", "LICENSE",
    "chat_template.jinja", "additional_chat_templates/tools.jinja", "spiece.model", "merges.txt",
}  # fmt: skip
UNWANTED = [
    "onnx/config.json", "onnx/model.onnx", "original/params.json", "original/model.safetensors",
    "checkpoint-500/model.safetensors", "checkpoint-500/chat_template.jinja", "image.png",
    "checkpoint-500/trainer_state.json", "pytorch_model.bin", "consolidated.safetensors",
    "modeling.py", "model-q4.gguf", "runs/events.txt",
]  # fmt: skip


def test_what_a_model_has_is_fetched_and_goes_on_into_exports(
    call: Run, hub: hubs.Hub, adapter: Path, copied: Path, tmp_path: Path
) -> None:
    for name in [*WANTED, *UNWANTED]:
        (copied / name).parent.mkdir(exist_ok=True)
        if not (copied / name).exists():
            (copied / name).write_text("{}" if name.endswith(".json") else "x")
    hub.folders[NAME, "main"] = copied
    args = ["--model", NAME, "--adapter-file", adapter, "--export", "merged", tmp_path / "merged"]
    ended = call(*args)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert names_in(find_model(NAME)) == WANTED | {"model.safetensors"}
    assert names_in(tmp_path / "merged") >= WANTED
    assert not names_in(tmp_path / "merged") & {*UNWANTED}


def test_a_model_is_fetched_once_and_then_needs_no_hub(
    call: Run, hub: hubs.Hub, adapter: Path, copied: Path, data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A changed repository is fetched, and told to those who go on with an adapter."""
    args = ["--model", NAME, "--data", data, "--batch-size", 4, "--val-batches", 1]
    trained = [
        "--train",
        "--iters",
        1,
        "--lora-layers",
        4,
        "--adapter-file",
        adapter.with_name("b.npz"),
    ]
    assert call(*args, *trained).returncode == 0
    asked = [line for line in hub.asked if "safetensors" in line]
    assert asked[1:] == [asked[0].replace("HEAD", "GET")]
    ask = [*args, "--adapter-file", adapter.with_name("b.npz"), "--prompt", "a", "--temp", 0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    number = len(hub.asked)
    offline = call(*ask)
    assert (offline.returncode, offline.stderr, len(hub.asked)) == (0, "", number)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
    hub.folders[NAME, "main"] = copied
    assert "have changed: the model's config.json" in call(*ask).stderr


# --- When the hub does not do what it should ----------------------------------------------------


def test_a_hub_that_never_answers_is_waited_for_so_long_and_no_longer(
    call: Run, hub: hubs.Hub, adapter: Path
) -> None:
    find_model(NAME)
    hub.silent = "/api/models"
    args = ["--adapter-file", adapter, "--prompt", "a", "--temp", 0, "--model"]
    started = time.monotonic()
    ended = call(*args, NAME)
    assert ended.returncode == 0 and ended.stderr.count("\n") == 1
    assert f"has not answered within {LIMIT} s" in ended.stderr
    assert "taken from the cache" in ended.stderr
    one_error(call(*args, "other/model"), "other/model", "has not answered", "HF_HUB_OFFLINE=1")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("silent", ["/revision/", "/tree/", "/resolve/"])
def test_a_hub_that_falls_silent_later_is_not_asked_again_and_again(
    call: Run, hub: hubs.Hub, adapter: Path, silent: str
) -> None:
    args = ["--adapter-file", adapter, "--prompt", "a", "--temp", 0, "--model", NAME]
    hub.silent = silent
    one_error(call(*args), NAME, f"has not answered within {LIMIT} s")
    assert 1 <= sum(silent in request for request in hub.asked) <= len(hub.folders) * 8
    hub.silent = None
    find_model(NAME)
    hub.silent, hub.asked[:] = silent, []
    ended = call(*args)
    assert ended.returncode == 0
    if any(silent in request for request in hub.asked):
        assert "taken from the cache" in ended.stderr


def test_a_connection_that_is_reset_is_made_again_and_goes_on_where_it_was(
    hub: hubs.Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.resets = 2
    weights = find_model(NAME) / "model.safetensors"
    assert weights.read_bytes() == (model / "model.safetensors").read_bytes()
    first, *more = [line for line in hub.asked if "GET" in line and "safetensors" in line]
    assert " from " not in first and len(more) == 2
    assert all(int(line.rpartition(" from ")[2]) >= 50_000 for line in more)


def ggufs(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")
    (folder / "config.json").unlink()


def lora(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    config = {"peft_type": "LORA", "base_model_name_or_path": "its/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def lora_of_mlx(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"model": "its/base"}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unknown(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "frobnicator"}))


def mamba(folder: Path) -> None:
    config = {"model_type": "mamba", "vocab_size": 300, "hidden_size": 64, "state_size": 16}
    config |= {"intermediate_size": 128, "num_hidden_layers": 2, "conv_kernel": 4}
    config |= {"use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    (folder / "config.json").write_text(json.dumps(config))


OTHERS = {  # what a repository is instead, and what is said of it
    "GGUF files": (ggufs, "has its weights as GGUF files only"),
    "an adapter of PEFT": (lora, "is an adapter of its/base: give --model its/base"),
    "an adapter of mlx-lm": (lora_of_mlx, "is an adapter of its/base: give --model its/base"),
    "pickles": (pickled, "has no model*.safetensors (no pickle"),
    "an unknown architecture": (unknown, "Model type frobnicator not supported"),
    "an architecture without attention": (mamba, "(mamba) have no attention for LoRA"),
}


@pytest.mark.parametrize(("make", "words"), OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_model_is_told_before_weights_are_fetched(
    call: Run, hub: hubs.Hub, adapter: Path, copied: Path, make, words: str
) -> None:
    make(copied)
    hub.folders[NAME, "main"] = copied
    one_error(call("--prompt", "a", "--model", NAME, "--adapter-file", adapter), words)
    assert not any(name in line for line in hub.asked for name in ("safetensors", ".gguf", ".bin"))


def test_weights_beyond_the_memory_are_told_before_they_are_fetched(
    hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"max_recommended_working_set_size": 100_000}
    monkeypatch.setattr(mx, "device_info", lambda: small)
    with pytest.raises(UserError, match=r"there are 0\.0001 GB of memory; take a smaller"):
        find_model(NAME)
    assert not any("safetensors" in line for line in hub.asked)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other/model", "no such repository, or it is private"),
        (f"{NAME}@v9", f"no model folder {NAME}@v9, and its repository has no such revision"),
        (f"{NAME}@", "no name of a repository either, OWNER/NAME or OWNER/NAME@REVISION"),
        ("https://huggingface.co/a/b", "no name of a repository either, OWNER/NAME or"),
    ],
)
def test_a_model_that_the_hub_lacks_is_reported(hub: hubs.Hub, name: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        find_model(name)


def test_a_wrong_token_is_reported(hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"does not take your token, that of HF_TOKEN; `hf auth"):
        find_model(NAME)


def test_a_gated_model_is_reported_with_where_to_ask(
    call: Run, hub: hubs.Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.members = ["hf_member"]
    args = ["--model", NAME, "--adapter-file", adapter, "--prompt", "a"]
    page = f"{constants.ENDPOINT}/{NAME}"
    one_error(call(*args), f"not given you access yet (ask on {page}, then `hf auth login`)")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    account = "the account of your token, that of HF_TOKEN, access yet"
    one_error(call(*args), f"not given {account} (ask on {page})")
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    assert call(*args).returncode == 0


def test_a_cache_that_cannot_be_written_is_reported(hub: hubs.Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(UserError, match=r"home/hub cannot be written: .*; make room, or let HF_HO"):
        find_model(NAME)


def test_a_disk_that_does_not_take_the_weights_is_reported(hub: hubs.Hub) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written: File too large; make room"):
            find_model(NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_cache_that_another_tool_filled_in_part_is_reported(
    call: Run, hub: hubs.Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "tokenizer.json"):
        hf_hub_download(NAME, name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ended = call("--prompt", "a", "--model", NAME, "--adapter-file", adapter)
    one_error(ended, NAME, "in part only", "HF_HUB_OFFLINE", "it has no model*.safetensors")


# --- Damage and interruption --------------------------------------------------------------------


def test_damaged_weights_of_the_right_size_are_reported_and_can_be_fetched_anew(
    hub: hubs.Hub, environment: dict[str, str], model: Path
) -> None:
    """The command that the error names does so; without the force, files in the cache stay."""
    file = find_model(NAME) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.resolve().write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        find_model(NAME)
    command = shlex.split(str(caught.value).split("`")[1])
    assert command[0] == "hf"
    hf = Path(sys.executable).with_name("hf")
    subprocess.run([hf, *command[1:]], env=environment, check=True, capture_output=True)
    assert (
        find_model(NAME).joinpath("model.safetensors").read_bytes()
        == (model / "model.safetensors").read_bytes()
    )


def start(model: str, adapter: Path, environment: dict[str, str]) -> subprocess.Popen:
    args = ["--prompt", "a", "--model", model, "--adapter-file", adapter]
    return subprocess.Popen(
        [sys.executable, ROOT / "train_lora.py", *args],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_ctrl_c_ends_a_download_at_once(
    hub: hubs.Hub, environment: dict[str, str], adapter: Path, tmp_path: Path
) -> None:
    """Files that are whole stay; of the others, which the client never uses, nothing does."""
    hub.seconds = 0.1
    blobs = tmp_path / "home" / "hub" / "models--some-owner--some-model" / "blobs"
    hub.folders[NAME, "main"] = shutil.copytree(hub.folders[NAME, "main"], tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    process = start(NAME, adapter, environment)
    while not list(blobs.glob(f"{'?' * 64}.*.incomplete")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGINT
    assert stderr.decode() == "interrupted: the next run fetches what is missing\n"
    assert len(list(blobs.iterdir())) == 3


def test_what_is_waited_for_is_told_where_xet_cannot_be_reached(
    hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "0")
    monkeypatch.setattr(errors, "SLOW", 0.5)
    hub.xet, hub.silent = constants.ENDPOINT, "/reconstructions/"
    Timer(1, hub.ended.set).start()
    with pytest.raises(UserError, match=r"Xet, .* cannot be reached .*HF_HUB_DISABLE_XET=1"):
        find_model(NAME)
    line, rest = capfd.readouterr().err.split("\n", 1)
    assert line.startswith("hint: waiting for Xet") and "HF_HUB_DISABLE_XET=1" in line and not rest


# --- Revisions ----------------------------------------------------------------------------------


def test_a_pinned_revision_is_kept_in_the_state_and_in_exports(
    call: Run, hub: hubs.Hub, copied: Path, data: Path, tmp_path: Path
) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
    hub.folders[NAME, "refs/pr/1"] = copied
    adapter = tmp_path / "a.npz"
    args = ["--data", data, "--adapter-file", adapter, "--val-batches", 1, "--lora-layers", 4]
    first = call("--train", "--iters", 1, "--model", f"{NAME}@refs/pr/1", *args)
    assert (first.returncode, first.stderr) == (0, "")
    assert f"--model {NAME}@refs/pr/1" in first.outcome
    go_on = ["--train", "--iters", 2, "--resume-adapter-file", adapter]
    exports = ["--export", "peft", tmp_path / "peft", "--export", "mlx-lm", tmp_path / "mlx-lm"]
    again = call(*go_on, "--model", NAME, *args, *exports)
    assert again.returncode == 0 and again.stderr.startswith(f"hint: the model is {NAME}@refs/pr/1")
    assert "have changed" not in again.stderr
    for form, key in [("peft", "base_model_name_or_path"), ("mlx-lm", "model")]:
        config = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert (config[key], config["revision"]) == (NAME, "refs/pr/1")
        asked = call("--prompt", "a", "--model", NAME, "--adapter-file", tmp_path / form)
        assert f"the model is {NAME}@refs/pr/1, since" in asked.stderr
    further = [*go_on[:3], "--model", NAME, "--data", data, "--adapter-file", tmp_path / "b.npz"]
    resumed = call(*further, "--val-batches", 1, "--resume-adapter-file", tmp_path / "peft")
    assert f"the model is {NAME}@refs/pr/1, since" in resumed.stderr
    alone = call("--prompt", "a", "--model", NAME, "--no-adapter", "--adapter-file", adapter)
    assert f"was pinned when {adapter} was trained" in alone.stderr
    ask = ["--prompt", "a", "--model", f"{NAME}@main", "--adapter-file", adapter]
    assert "have changed: the model's config.json" in call(*ask).stderr
    assert not call(*ask, "--no-adapter").stderr
