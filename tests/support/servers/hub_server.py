"""Local server that implements the part of the hub's API that the kit uses.

A test cannot reach the real hub. Paths, headers and error codes are those that huggingface_hub expects.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

NAME = "mistralai/Tiny-Mixtral"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Server of one folder as one model.

    state: the access of the account (open, gated, missing or broken). cut: name of a file of which only half is sent,
    once. commits: commit of each revision; all revisions have the same files.
    """

    daemon_threads = True

    def __init__(self, folder: Path, address: str) -> None:
        super().__init__((address, 0), Handler)
        self.folder = folder
        self.state = "open"
        self.commits = {"main": COMMIT}
        self.cut = ""
        self.sent: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = urlparse(self.path).path
        if self.server.state == "gated" and ("/resolve/" in path or "/tree/" in path):
            self.refuse(403, "GatedRepo")
        elif self.server.state == "missing":
            self.refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
        elif self.server.state == "broken":
            self.refuse(500, "Internal")
        elif model := re.fullmatch(rf"/api/models/{NAME}(?:/revision/(.+))?", path):
            self.tell(self.server.commits.get(model[1] or "main"))
        elif re.match(rf"/api/models/{NAME}/tree/[0-9a-f]{{40}}", path):
            oid = "1" * 40
            self.reply([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": oid} for f in self.files()])
        elif file := re.fullmatch(rf"/{NAME}/resolve/([0-9a-f]{{40}})/([^/]+)", path):
            self.send(self.server.folder / file[2], file[1])
        else:
            self.refuse(404, "EntryNotFound")

    def files(self) -> list[Path]:
        return sorted(self.server.folder.iterdir())

    def tell(self, commit: str | None) -> None:
        if commit is None:
            self.refuse(404, "RevisionNotFound")
        else:
            self.reply({"id": NAME, "sha": commit, "siblings": [{"rfilename": file.name} for file in self.files()]})

    def reply(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, file: Path, commit: str) -> None:
        content = file.read_bytes()
        start = 0
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command != "GET":
            return
        self.server.sent.append(file.name)
        if file.name == self.server.cut:
            self.server.cut = ""
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            # The socket stays open until its streams are closed: the client would wait until its own time limit.
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(content[start:])


@contextmanager
def serving(folder: Path, address: str = "127.0.0.1") -> Iterator[Hub]:
    server = Hub(folder, address)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def client_environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Return the environment for a process that uses this hub without a token and downloads to tmp_path/hf-home."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": "",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
