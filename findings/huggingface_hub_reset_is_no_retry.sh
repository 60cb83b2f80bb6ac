#!/bin/sh
# huggingface_hub goes on with a file (Range) after a connection that ends early, and raises at one
# that is reset, which is how routers and proxies often break a download off. It uses nothing of what
# it has when it is asked again.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0
cd "$folder"
cat > show.py <<'PYTHON'
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import logging

constants.DOWNLOAD_CHUNK_SIZE = 1000  # of 10 MB, so that a small file shows it
CONTENT, asked, breaks = bytes(range(256)) * 100, [], []


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0] or 0)
        if self.command == "GET":
            asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("ETag", f'"{self.path[-9:-4]}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Connection", "close")  # a connection for each request
        self.end_headers()
        if self.command == "HEAD":
            return
        if not breaks:
            return self.wfile.write(CONTENT[start:])
        self.wfile.write(CONTENT[:10000])
        self.wfile.flush()
        if breaks.pop() == "reset":
            threading.Event().wait(0.5)
            options = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, options)
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True
        self.connection.close()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
where = {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": "cache"}
logging.set_verbosity_error()
print("huggingface_hub", huggingface_hub.__version__)
found = []
for how in ("closed", "reset"):
    asked.clear()
    breaks.append(how)
    try:
        file = huggingface_hub.hf_hub_download("o/m", f"{how}.bin", **where)
        ended = f"whole: {Path(file).read_bytes() == CONTENT}"
    except Exception as error:
        ended = type(error).__name__
        huggingface_hub.hf_hub_download("o/m", f"{how}.bin", **where)
    found.append((ended, asked[0], asked[1] > 0))
    print(f"{how} in the middle: {ended}; GETs begin at bytes {asked}")
raise SystemExit(found != [("whole: True", 0, True), ("ReadError", 0, False)])
PYTHON
venv/bin/python show.py
