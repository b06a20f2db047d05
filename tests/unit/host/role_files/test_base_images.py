"""The lock of the base images, against a registry that is a stand-in: an HTTP server of this process."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from tests import locks
from tests.base_images import RegistryError, digest_of, write_lock

BODY = b'{"schemaVersion": 2, "manifests": []}'
DIGEST = "sha256:" + hashlib.sha256(BODY).hexdigest()


class Registry(ThreadingHTTPServer):
    """A STAND-IN for a registry with one image, team/base:1. token: what it wants, if anything."""

    daemon_threads = True
    token = ""
    claimed = DIGEST
    asked: list[tuple[str, str]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Accept", "")))
        at = urlsplit(self.path)
        if at.path == "/token":
            good = parse_qs(at.query) == {"service": ["reg"], "scope": ["repository:team/base:pull"]}
            self.answer(200 if good else 400, json.dumps({"token": self.server.token}).encode())
        elif self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            wanted = f'Bearer realm="{self.server.url}/token",service="reg",scope="repository:team/base:pull"'
            self.answer(401, b"", {"WWW-Authenticate": wanted})
        elif at.path == "/v2/team/base/manifests/1":
            self.answer(200, BODY, {"Docker-Content-Digest": self.server.claimed} if self.server.claimed else {})
        else:
            self.answer(404, b"none")

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Registry(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_digest_is_the_sha256_of_what_is_sent(registry: Registry) -> None:
    mirrors = {"reg.example": registry.url + "/"}
    assert digest_of("reg.example/team/base:1", mirrors) == DIGEST
    assert registry.asked == [("/v2/team/base/manifests/1", registry.asked[0][1])]
    # An index of all platforms is what an engine pulls by.
    assert registry.asked[0][1].startswith("application/vnd.oci.image.index.v1+json, ")
    registry.claimed = ""
    assert digest_of("reg.example/team/base:1", mirrors) == DIGEST
    registry.claimed = "sha256:" + "0" * 64
    with pytest.raises(RegistryError, match=f"names the digest 'sha256:0+', but sent {DIGEST}"):
        digest_of("reg.example/team/base:1", mirrors)
    with pytest.raises(RegistryError, match="manifests/2 answers 404"):
        digest_of("reg.example/team/base:2", mirrors)


def test_a_token_that_anybody_gets_is_asked_for(registry: Registry) -> None:
    registry.token = "abc"
    assert digest_of("reg.example/team/base:1", {"reg.example": registry.url}) == DIGEST
    assert [path.split("?")[0] for path, _ in registry.asked] == [
        "/v2/team/base/manifests/1", "/token", "/v2/team/base/manifests/1",
    ]  # fmt: skip


def test_a_lock_keeps_what_cannot_be_asked_and_drops_what_is_not_used(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "base-images.json"
    path.write_text(json.dumps({"gone.example/a:1": "sha256:old", "unused.example/b:1": "sha256:unused"}))
    images = {"cu130": "reg.example/team/base:1", "cpu": "gone.example/a:1", "cu126": "gone.example/new:1"}
    mirrors = {"reg.example": registry.url, "gone.example": registry.url}
    assert not write_lock(tmp_path, images, mirrors)
    assert json.loads(path.read_text()) == {"gone.example/a:1": "sha256:old", "reg.example/team/base:1": DIGEST}
    words = capsys.readouterr().err
    assert "the digest of gone.example/new:1 is not written" in words
    assert "LOCK_ARGS='--registry gone.example=MIRROR'" in words
    assert write_lock(tmp_path, {"cu130": "reg.example/team/base:1"}, mirrors)
    assert json.loads(path.read_text()) == {"reg.example/team/base:1": DIGEST}


def test_make_lock_asks_for_the_images_of_the_role(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "IMAGE_LOCKS", tmp_path)
    words = [word for host in ("nvcr.io", "docker.io") for word in ("--registry", f"{host}={registry.url}")]
    assert locks.main(["--base-images", *words]) == 1
    assert sorted(path for path, _ in registry.asked) == [
        "/v2/library/ubuntu/manifests/24.04",
        "/v2/nvidia/cuda/manifests/12.6.3-base-ubuntu24.04",
        "/v2/nvidia/cuda/manifests/13.0.1-base-ubuntu24.04",
    ]


def test_the_lock_that_is_here_has_digests_of_the_roles_images() -> None:
    lock = json.loads((locks.IMAGE_LOCKS / "base-images.json").read_text())
    defaults = yaml.safe_load((locks.ROOT / "roles/image/defaults/main.yml").read_text())
    assert set(lock) == set(defaults["image_base_images"].values())
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in lock.values())
