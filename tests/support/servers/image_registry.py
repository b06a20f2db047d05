"""A real registry of images on this machine, for tests: Debian's docker-registry, run from the cache."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from tests.support.servers.unpacked import unpacked

START_SECONDS = 30
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def sha256(content: bytes) -> str:
    """Return a digest as registries write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass(frozen=True)
class ImageRegistry:
    """A registry that answers at `url`."""

    url: str

    def push(self, name: str, tag: str, layer: bytes) -> str:
        """Push an image of one layer for two platforms under a tag. Return the digest of its index."""
        manifests = [self._push_platform(name, layer, each) for each in ("amd64", "arm64")]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
        return self._put_manifest(name, tag, INDEX, index)

    def manifest(self, name: str, reference: str) -> bytes | None:
        """Return what a pull by a tag or a digest begins with; None if there is no such image."""
        words = {"Accept": f"{INDEX}, {MANIFEST}"}
        try:
            return self._ask("GET", f"{self.url}/v2/{name}/manifests/{reference}", None, words)[0]
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return None

    def _push_platform(self, name: str, layer: bytes, architecture: str) -> dict[str, object]:
        found = {"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": [sha256(layer)]}}
        config = json.dumps(found).encode()
        for blob in (config, layer):
            self._put_blob(name, blob)
        manifest = {
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": sha256(config), "size": len(config)},
            "layers": [{"mediaType": LAYER, "digest": sha256(layer), "size": len(layer)}],
        }  # fmt: skip
        digest = self._put_manifest(name, sha256(json.dumps(manifest).encode()), MANIFEST, manifest)
        platform = {"architecture": architecture, "os": "linux"}
        size = len(json.dumps(manifest).encode())
        return {"mediaType": MANIFEST, "digest": digest, "size": size, "platform": platform}

    def _put_blob(self, name: str, content: bytes) -> None:
        _, where = self._ask("POST", f"{self.url}/v2/{name}/blobs/uploads/", b"", {})
        joint = "&" if "?" in where else "?"
        digest = urlencode({"digest": sha256(content)})
        self._ask("PUT", f"{where}{joint}{digest}", content, {"Content-Type": "application/octet-stream"})

    def _put_manifest(self, name: str, reference: str, kind: str, manifest: dict[str, object]) -> str:
        content = json.dumps(manifest).encode()
        self._ask("PUT", f"{self.url}/v2/{name}/manifests/{reference}", content, {"Content-Type": kind})
        return sha256(content)

    def _ask(self, method: str, url: str, content: bytes | None, headers: dict[str, str]) -> tuple[bytes, str]:
        request = urllib.request.Request(url, data=content, headers=headers, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.read(), answer.headers.get("Location", "")


@contextmanager
def running_registry(folder: Path, port: int, *, password: bool = False) -> Iterator[ImageRegistry]:
    """Run a registry for the duration of the context. password: it lets nobody in without one."""
    program = unpacked("docker-registry", ("docker-registry",)) / "usr/bin/docker-registry"
    folder.mkdir()
    configuration = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "images")}},
        "http": {"addr": f"127.0.0.1:{port}"},
        **({"auth": {"htpasswd": {"realm": "basic-realm", "path": str(folder / "passwords")}}} if password else {}),
    }
    (folder / "config.yml").write_text(json.dumps(configuration), encoding="utf-8")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", folder / "config.yml"], stdout=log, stderr=log)
    registry = ImageRegistry(f"http://127.0.0.1:{port}")
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(registry):
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text(encoding="utf-8")
            time.sleep(0.02)
        yield registry
    finally:
        process.terminate()
        process.wait()


def _answers(registry: ImageRegistry) -> bool:
    try:
        registry.manifest("none/none", "none")
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True
