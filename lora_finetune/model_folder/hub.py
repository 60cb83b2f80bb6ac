"""A model of the Hugging Face hub: fetched or found in the cache, and compared with checksums."""

from __future__ import annotations

import errno
import glob
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lora_finetune.base.errors import UserError, abbreviated, bar_options, hint_if_slow, warn
from lora_finetune.base.files import file_checksum
from lora_finetune.base.signals import STOPS, handled
from lora_finetune.model_folder.files import (
    FILES,
    WEIGHTS,
    again,
    check_memory,
    matching,
    problem,
    shortened,
)

import httpx2
import huggingface_hub
from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import tqdm
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils._runtime import is_xet_available


def find_model(
    name: str | Path, check: Callable = lambda folder: None, only: Iterable[str] = (*FILES, WEIGHTS)
) -> Path:
    """The folder of a model; a repository OWNER/NAME or OWNER/NAME@REVISION is fetched if need be.

    With `only` files of those patterns are. Before weights are fetched, `check` is called with the
    folder of the others; it raises UserError where no model can be made with it.
    """
    folder = Path(os.path.expanduser(name))  # noqa: PTH111 (raises for ~nobody)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; --model takes a folder or a repository id")
    with ending_at_once():
        folder = fetch(str(name), check, only)
    compare(folder)
    return folder


def public_name(name: str | None, folder: Path) -> tuple[str, str | None]:
    """The model's name for other tools, and its revision if one was pinned.

    The name is that of its repository, or the absolute path of its folder.
    """
    if not name or Path(os.path.expanduser(name)).is_dir():  # noqa: PTH111
        return str(folder.absolute()), None
    repo, _, revision = name.partition("@")
    return repo, revision or None


# --- Fetching -----------------------------------------------------------------------------------


def fetch(name: str, check: Callable, patterns: Iterable[str]) -> Path:
    """The folder of a repository in the cache, with all its files of those patterns."""
    repo, at, revision = name.partition("@")
    huggingface_hub.set_client_factory(patient_client)
    huggingface_hub.utils.logging.set_verbosity_error()  # it warns of what it tries again
    try:
        if at and not revision:
            raise hub_errors.HFValidationError
        ask = huggingface_hub.HfApi().model_info
        info = unless_reset(partial(ask, repo, revision=revision or None))
    except hub_errors.HFValidationError:
        raise UserError(
            f"there is no model folder {name}, and it is no name of a repository either, "
            "OWNER/NAME or OWNER/NAME@REVISION"
        ) from None
    except Exception as error:  # whatever the network does
        return find_cached(name, patterns, error)
    names = [each.rfilename for each in info.siblings or []]
    weights = [each for each in matching(names, [WEIGHTS]) if WEIGHTS in patterns]
    blobs = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "blobs")
    try:
        blobs.mkdir(parents=True, exist_ok=True)  # where that cannot be, an error tells at once
        folder = download(repo, revision or None, set(matching(names, patterns)) - set(weights))
        if wrong := problem(names, folder):
            raise UserError(f"the model {name} {wrong}; take another repository")
        if not all((folder / each).exists() for each in weights):
            check(folder)
            tree = huggingface_hub.get_cached_repo_tree(repo, revision=folder.name)
            check_memory(folder, size=sum(file.size for file in tree if file.path in weights))
            waits = is_xet_available() and any(file.xet_hash for file in tree)
            words = "waiting for Xet, the hub's storage service; HF_HUB_DISABLE_XET=1 goes without"
            Bar.came = not waits
            with hint_if_slow(words, lambda: Bar.came):
                download(repo, folder.name, weights)
    except UserError:
        raise
    except SilentError as error:
        return find_cached(name, patterns, error)
    except Exception as error:
        raise UserError(f"the model {name} cannot be fetched: {why(error)}") from error
    return folder


def download(repo: str, revision: str | None, names: Iterable[str]) -> Path:
    """The folder with these files of a revision, which are fetched if they are not there."""
    patterns = [glob.escape(name) for name in names]
    what = partial(snapshot_download, repo, revision=revision, allow_patterns=patterns)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: warn(str(message))  # of a disk that is too full
        return Path(unless_reset(partial(what, tqdm_class=Bar)))


def find_cached(name: str, patterns: Iterable[str], error: Exception) -> Path:
    """The folder of a repository in the cache, or a UserError with the hub's error."""
    repo, _, revision = name.partition("@")
    where, reason = {"revision": revision or None}, why(error)
    try:
        folder = Path(snapshot_download(repo, **where, allow_patterns=[], local_files_only=True))
    except hub_errors.LocalEntryNotFoundError:
        raise UserError(f"there is no model folder {name}, and {reason}") from None
    wrong = WEIGHTS in patterns and problem(
        [file.name for file in folder.iterdir() if file.exists()], folder
    )
    with suppress(hub_errors.CachedRepoTreeNotFoundError):  # others fetch files one by one
        tree = huggingface_hub.get_cached_repo_tree(repo, **where)
        names = matching([file.path for file in tree], patterns)
        if lacking := [each for each in names if not (folder / each).exists()]:
            wrong = f"has no {abbreviated(lacking)}"
    if wrong:
        raise UserError(f"the model {name} is in the cache in part only, and {reason} (it {wrong})")
    if not isinstance(error, hub_errors.OfflineModeIsEnabled):
        warn(f"{reason}; the model is taken from the cache as it was fetched last")
    return folder


OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
OF_DISKS += (errno.ENOTDIR,)


def why(error: Exception) -> str:
    """Why the hub did not give what was asked for, and what to do."""
    if isinstance(error, hub_errors.LocalEntryNotFoundError) and error.__cause__:
        return why(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    of_xet = re.search(r"\(os error (\d+)\)", str(error))
    number = int(of_xet[1]) if of_xet else getattr(error, "errno", None)
    token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
    page = f"{constants.ENDPOINT}/{getattr(error, 'repo_id', '')}"
    cases = [
        (isinstance(error, hub_errors.OfflineModeIsEnabled),
         "the Hugging Face hub is not asked, as HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set"),
        (status == 401 and huggingface_hub.get_token(),
         f"the hub does not take your token, that of {token}; `hf auth login` takes a new one"),
        (isinstance(error, hub_errors.GatedRepoError) and status == 403,
         f"its owner has not given the account of your token, that of {token}, access yet (ask on "
         f"{page})"),
        (isinstance(error, hub_errors.GatedRepoError),
         f"its owner has not given you access yet (ask on {page}, then `hf auth login`)"),
        (isinstance(error, hub_errors.RevisionNotFoundError),
         "its repository has no such revision; name a branch, a tag or a commit"),
        (isinstance(error, hub_errors.RepositoryNotFoundError),
         "the Hugging Face hub has no such repository, or it is private (`hf auth login`)"),
        (isinstance(error, (SilentError, httpx2.TimeoutException)),
         f"the Hugging Face hub has not answered within {constants.HF_HUB_DOWNLOAD_TIMEOUT} s "
         "(HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer, HF_HUB_OFFLINE=1 does not ask)"),
        (number in OF_DISKS,
         f"the cache {constants.HF_HUB_CACHE} cannot be written: {os.strerror(number or 0)}; make "
         "room, or let HF_HOME name another folder"),
        (isinstance(error, RuntimeError),
         f"Xet, the hub's storage service, cannot be reached ({shortened(error)}); "
         "HF_HUB_DISABLE_XET=1 goes without it"),
        (status, f"the Hugging Face hub refuses ({shortened(error)})"),
        (True, f"the Hugging Face hub cannot be reached ({shortened(error)})"),
    ]  # fmt: skip
    return next(text for holds, text in cases if holds)


# --- Waiting ------------------------------------------------------------------------------------


class SilentError(Exception):
    """The hub has not answered in time.

    It is no TimeoutException, after which the client would ask again, and wait, five times.
    """


def patient_client() -> httpx2.Client:
    """The client's own, with a limit for the time to each answer, HF_HUB_DOWNLOAD_TIMEOUT, 10 s."""

    def limit(request: httpx2.Request) -> None:
        most, given = constants.HF_HUB_DOWNLOAD_TIMEOUT, request.extensions["timeout"]
        request.extensions["timeout"] = {wait: min(n or most, most) for wait, n in given.items()}

    def resume(response: httpx2.Response) -> None:
        response.stream = Resumed(response.stream)

    def send(request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            return as_it_comes(request, **options)
        except httpx2.TimeoutException as error:
            raise SilentError from error

    client = default_client_factory()
    as_it_comes, client.send = client.send, send
    client.event_hooks["request"].append(limit)
    client.event_hooks["response"].append(resume)
    return client


class Resumed(httpx2.SyncByteStream):
    """What the hub sends; a reset is an error after which the client goes on where it was."""

    def __init__(self, stream: httpx2.SyncByteStream):
        self.stream, self.close = stream, stream.close

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self.stream
        except httpx2.ReadError as error:  # after which it would begin anew
            raise httpx2.RemoteProtocolError(str(error)) from error


def unless_reset(call: Callable[[], Any]) -> Any:
    """The result of a call, made again where a connection breaks off."""
    for seconds in (1, 2, 4):
        with suppress(httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
            return call()
        time.sleep(seconds)
    return call()


class Bar(tqdm):
    """The client's progress bars, which note that something has come."""

    came = False

    def __init__(self, *args: object, **options: object):
        super().__init__(*args, **options | bar_options())

    def update(self, n: float | None = 1) -> bool | None:
        Bar.came = True
        return super().update(n)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Signals end the process at once, where the client would wait until running files are whole.

    It never uses what it has of those, so that is removed.
    """

    def end(number: int, _: object) -> NoReturn:
        ours = []
        for entry in Path("/dev/fd").iterdir():
            with suppress(OSError):
                ours.append(os.fstat(int(entry.name)))
        for file in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*.incomplete"):
            with suppress(OSError):
                if any(os.path.samestat(file.stat(), each) for each in ours):
                    file.unlink()
        clear = "\r\033[J" if sys.stderr.isatty() else ""  # bars stand here and below
        words = "interrupted: the next run fetches what is missing"
        print(f"{clear}{words}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    with handled((signal.SIGINT, *STOPS), end):
        yield


# --- Comparing ----------------------------------------------------------------------------------


def compare(folder: Path) -> None:
    """Raise UserError where weights in the cache are not what the hub has.

    The client stores each large file under its SHA-256, to which the name in a snapshot is a link.
    A file that was compared is noted where the hub has programs keep notes; it is not compared
    again as long as it has the same size and time of change.
    """
    notes = Path(constants.HF_ASSETS_CACHE, "lora_finetune", "compared")
    with hint_if_slow("comparing the model's files with the hub's checksums, once"):
        for file in sorted(folder.glob(WEIGHTS)):
            sha256 = file.readlink().name if file.is_symlink() else ""
            if not re.fullmatch("[0-9a-f]{64}", sha256):
                continue
            note, stamp = notes / sha256, f"{file.stat().st_size} {file.stat().st_mtime_ns}"
            with suppress(OSError):
                if note.read_text() == stamp:
                    continue
            if file_checksum(file) != sha256:
                raise UserError(f"{file} is damaged (its SHA-256 is not the hub's); {again(file)}")
            with suppress(OSError):
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(stamp)
