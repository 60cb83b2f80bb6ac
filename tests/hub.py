"""A model hub on this computer, which speaks the HTTP API of the real one for some repositories."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote

API = re.compile(r"/api/models/([^/]+(?:/[^/]+)?)(?:/(revision|tree|xet-read-token)/(.+))?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """The repositories of a hub by their names, each a folder, and how the hub behaves.

    Attributes:
        folders: by repository and revision, which is "main" where none is asked for.
        asked: the requests so far, as method and path.
        silent: a part of the paths of requests that are accepted and never answered.
        resets: how many times a file's connection is reset in the middle.
        token: where not None, requests with another token are refused, as by the real hub.
        members: where not None, tokens that files are given to, as of a gated repository.
        seconds: that each kilobyte of a file takes.
        xet: the address of the storage service that has the weights, None without one.
    """

    def __init__(self) -> None:
        self.folders: dict[tuple[str, str], Path] = {}
        self.asked: list[str] = []
        self.silent: str | None = None
        self.resets = 0
        self.token: str | None = None
        self.members: list[str] | None = None
        self.seconds = 0.0
        self.xet: str | None = None
        self.ended = Event()

    def find(self, repository: str, revision: str) -> tuple[Path | None, str]:
        """The folder and the commit of a revision, which may be the commit itself."""
        for (name, known), folder in self.folders.items():
            commit = hashlib.sha1(f"{name} {known} {folder}".encode()).hexdigest()
            if name == repository and revision in (known, commit):
                return folder, commit
        return None, ""


def describe(folder: Path, file: Path, xet: str | None) -> dict:
    """A file as a listing has it: weights and what is large are in LFS."""
    content = file.read_bytes()
    sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": str(file.relative_to(folder)), "size": len(content)}
    entry["oid"] = sha1
    if file.suffix == ".safetensors":
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        entry |= {"xetHash": sha256} if xet else {}
    return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        hub = self.hub
        hub.asked.append(f"{self.command} {self.path}")
        if hub.silent and hub.silent in self.path:
            self.close_connection = hub.ended.wait()
            return
        given = self.headers.get("Authorization")
        if hub.token and given and given != f"Bearer {hub.token}":
            self.fail(401, "", "Invalid credentials in Authorization header")
        elif match := API.fullmatch(self.path.partition("?")[0]):
            self.answer_api(*match.groups())
        elif hub.members is not None and str(given)[7:] not in hub.members:
            self.fail(403 if given else 401, "GatedRepo", "Access to the model is restricted.")
        elif match := FILE.fullmatch(self.path):
            self.answer_file(*match.groups())
        else:
            self.fail(404, "", "")

    do_HEAD = do_GET  # noqa: N815

    def answer_api(self, repository: str, kind: str | None, revision: str | None) -> None:
        hub = self.hub
        folder, commit = hub.find(repository, unquote(revision or "main"))
        if kind == "xet-read-token":
            headers = {"X-Xet-Cas-Url": hub.xet, "X-Xet-Access-Token": "t"}
            return self.send(b"{}", headers | {"X-Xet-Token-Expiration": str(2**33)})
        if folder is None:
            known = any(name == repository for name, _ in hub.folders)
            return self.fail(404, "RevisionNotFound" if known else "RepoNotFound", "")
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        listed = [describe(folder, file, hub.xet) for file in files]
        if kind != "tree":
            names = [{"rfilename": entry["path"]} for entry in listed]
            listed = {"id": repository, "sha": commit, "siblings": names}
        self.send(json.dumps(listed).encode(), {})

    def answer_file(self, repository: str, revision: str, name: str) -> None:
        hub = self.hub
        folder, commit = hub.find(repository, revision)
        if folder is None or not (folder / name).is_file():
            return self.fail(404, "RepoNotFound" if folder is None else "EntryNotFound", "")
        entry = describe(folder, folder / name, hub.xet)
        etag = entry.get("lfs", entry)["oid"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        content = (folder / name).read_bytes()
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            content = content[int(wanted[1]) :]
            hub.asked[-1] += f" from {wanted[1]}"
            self.send(content, headers, status=206)
        else:
            self.send(content, headers)

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(content), 1024):
            if self.hub.resets and start > len(content) // 2 and len(content) > 50_000:
                self.hub.resets -= 1
                linger = struct.pack("ii", 1, 0)  # at once, and with a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                return self.connection.close()
            self.wfile.write(content[start : start + 1024])
            time.sleep(self.hub.seconds)

    def fail(self, status: int, code: str, message: str) -> None:
        self.send(b"", {"X-Error-Code": code, "X-Error-Message": message}, status)

    def log_message(self, *_: object) -> None:
        """Keep silent."""


@contextmanager
def started() -> Iterator[tuple[Hub, str]]:
    """A hub that runs, and its address."""
    hub = Hub()
    handler = type("HandlerOfHub", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # where a test ended in the middle of an answer
        server.daemon_threads, server.block_on_close = True, False
        Thread(target=server.serve_forever, daemon=True).start()
        yield hub, f"http://127.0.0.1:{server.server_port}"
        hub.ended.set()
        server.shutdown()
