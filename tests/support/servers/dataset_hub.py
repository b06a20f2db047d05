"""Local server that implements the part of the hub's API with which datasets reads a dataset of plain files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

NAME = "owner/tiny"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class DatasetHub(ThreadingHTTPServer):
    """Server of one folder as one dataset, at one commit, whatever the revision's name but `nowhere`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self) -> list[str]:
        return sorted(str(each.relative_to(self.folder)) for each in self.folder.rglob("*") if each.is_file())


class Handler(BaseHTTPRequestHandler):
    server: DatasetHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self.server.paths.append(self.path)
        self.reply([self.entry(name) for name in asked if name in self.server.files()])

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        path = unquote(urlparse(self.path).path)
        if "nowhere" in path:
            self.refuse(404, "RevisionNotFound")
        elif re.fullmatch(rf"/api/datasets/{NAME}(/revision/.+)?", path):
            siblings = [{"rfilename": name} for name in self.server.files()]
            self.reply({"id": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False, "tags": []})
        elif re.match(rf"/api/datasets/{NAME}/tree/", path):
            below = path.split("/tree/")[1].partition("/")[2]
            folder = self.server.folder / below
            if folder.is_dir():
                self.reply([self.entry(str(each.relative_to(self.server.folder))) for each in sorted(folder.iterdir())])
            else:
                self.refuse(404, "EntryNotFound")
        elif file := re.fullmatch(rf"/datasets/{NAME}/resolve/[^/]+/(.+)", path):
            self.send(file[1])
        else:
            self.refuse(404, "RepoNotFound")

    def entry(self, name: str) -> dict[str, object]:
        if (self.server.folder / name).is_dir():
            return {"type": "directory", "path": name, "size": 0, "oid": "1" * 40}
        content = (self.server.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def reply(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"})

    def send(self, name: str) -> None:
        file = self.server.folder / name
        if not file.is_file():
            self.refuse(404, "EntryNotFound")
            return
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving_dataset(folder: Path) -> Iterator[DatasetHub]:
    server = DatasetHub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
