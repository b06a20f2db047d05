"""`--hf-model-path NAME` against a small server on this machine that speaks the part of the hub's API that is used.

The real hub cannot be reached by a test; paths, headers and error codes are those that huggingface_hub expects.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import urlparse

import pytest

from mixtral_run.errors import WeightsError
from tests.integration.test_convert import run_cli
from tests.tiny import write_tiny

NAME = "mistralai/Tiny-Mixtral"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as one model. `state` is what the account may do; `cut` names a file sent by half, once."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.state = "open"
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
        elif re.fullmatch(rf"/api/models/{NAME}(/revision/main)?", path):
            self.reply({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in self.files()]})
        elif path.startswith(f"/api/models/{NAME}/tree/{COMMIT}"):
            oid = "1" * 40
            self.reply([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": oid} for f in self.files()])
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            self.send(self.server.folder / path.rpartition("/")[2])
        else:
            self.refuse(404, "EntryNotFound")

    def files(self) -> list[Path]:
        return sorted(self.server.folder.iterdir())

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

    def send(self, file: Path) -> None:
        content = file.read_bytes()
        start = 0
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
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
            self.connection.close()
            return
        self.wfile.write(content[start:])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    write_tiny(tmp_path / "served")
    (tmp_path / "served" / "consolidated.00.pt").write_bytes(b"93 GB that nobody here reads")
    server = Hub(tmp_path / "served")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def convert_from(hub: Hub, tmp_path: Path, name: str = NAME, **environment: str) -> CompletedProcess[str]:
    common = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": "",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    return run_cli("convert", "--hf-model-path", name, "--output-path", tmp_path / "out", **(common | environment))


def test_download_that_breaks_off_goes_on_and_the_second_run_needs_none(tmp_path: Path, hub: Hub) -> None:
    hub.cut = "model-00002-of-00003.safetensors"
    size = sum(f.stat().st_size for f in hub.folder.iterdir() if f.name != "consolidated.00.pt")
    done = convert_from(hub, tmp_path, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert f"downloading {size:,} bytes of {NAME}" in done.stdout
    assert "✓ Conversion complete!" in done.stdout
    assert hub.sent.count("model-00002-of-00003.safetensors") == 2
    assert hub.sent.count("model-00001-of-00003.safetensors") == 1
    assert "consolidated.00.pt" not in hub.sent
    assert "Bearer hf_secret" in hub.tokens
    assert "hf_secret" not in done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "mixtral_run.json").read_text())
    assert record["source"] == NAME
    (tmp_path / "out").rename(tmp_path / "first")
    hub.sent.clear()
    again = convert_from(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.sent == []


@pytest.mark.parametrize(
    ("state", "environment", "said"),
    [
        ("gated", {}, ["owner asks for your consent", "no token", "hf auth login"]),
        ("gated", {"HF_TOKEN": "hf_secret"}, ["owner asks for your consent", "a token was sent"]),
        ("missing", {}, ["no such model", "no token"]),
        ("open", {"HF_HUB_OFFLINE": "1"}, ["cannot be reached", "HF_HUB_OFFLINE"]),
        ("open", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot be reached", "HF_ENDPOINT"]),
    ],
)
def test_refusals_in_words(tmp_path: Path, hub: Hub, state: str, environment: dict[str, str], said: list[str]) -> None:
    hub.state = state
    done = convert_from(hub, tmp_path, **environment)
    assert done.returncode == WeightsError.exit_code, done.stderr
    for words in said:
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_of_another_model_only_its_config_is_downloaded(tmp_path: Path, hub: Hub) -> None:
    file = hub.folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "llama", "architectures": ["Llama"]}))
    done = convert_from(hub, tmp_path)
    assert done.returncode == WeightsError.exit_code
    assert "llama" in done.stderr
    assert hub.sent == ["config.json"]


def test_neither_a_directory_nor_a_name(tmp_path: Path, hub: Hub) -> None:
    done = convert_from(hub, tmp_path, name="./no/such/folder")
    assert done.returncode == WeightsError.exit_code
    assert "The HF model does not exist." in done.stderr
    assert hub.tokens == set()
