"""`make lock --base-images` against a real registry: its digests are what a pull by digest gets, and nothing else is.

A build from such a digest is in roles/image/molecule/image/side_effect.yml, with this code and an engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import locks
from tests.base_images import LOCK_NAME, RegistryError, digest_of
from tests.hosts.light_hosts import free_ports
from tests.support.servers.image_registry import running_registry, sha256

IMAGES = {
    "docker.io/library/ubuntu:24.04": b"ubuntu",
    "nvcr.io/nvidia/cuda:12.6.3-base-ubuntu24.04": b"cuda 12",
    "nvcr.io/nvidia/cuda:13.0.1-base-ubuntu24.04": b"cuda 13",
}
"""The images of the role and the only layer that each has here."""


def test_the_lock_names_what_a_pull_by_digest_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(locks, "IMAGE_LOCKS", tmp_path)
    with running_registry(tmp_path / "registry", free_ports(1)[0]) as registry:
        words = [word for host in ("nvcr.io", "docker.io") for word in ("--registry", f"{host}={registry.url}")]
        assert locks.main(["--base-images", *words]) == 1
        assert json.loads((tmp_path / LOCK_NAME).read_text()) == {}
        pushed = {}
        for image, layer in IMAGES.items():
            name, _, tag = image.partition("/")[2].rpartition(":")
            pushed[image] = registry.push(name, tag, layer)
        assert locks.main(["--base-images", *words]) == 0
        lock = json.loads((tmp_path / LOCK_NAME).read_text())
        assert lock == pushed and len(set(lock.values())) == 3
        for image, digest in lock.items():
            name, _, tag = image.partition("/")[2].rpartition(":")
            index = registry.manifest(name, digest)
            assert index is not None and sha256(index) == digest and index == registry.manifest(name, tag)
            # All platforms are below it, each with its layer.
            parts = [registry.manifest(name, each["digest"]) for each in json.loads(index)["manifests"]]
            layers = [json.loads(each or b"")["layers"][0]["digest"] for each in parts]
            assert layers == [sha256(IMAGES[image])] * 2
            assert registry.manifest(name, "sha256:" + "0" * 64) is None
        # The digest of one image names none of another.
        assert registry.manifest("library/ubuntu", lock["nvcr.io/nvidia/cuda:12.6.3-base-ubuntu24.04"]) is None
        # A tag that has moved gets a new digest in the next lock; the old one still names the old image.
        before = lock["docker.io/library/ubuntu:24.04"]
        moved = registry.push("library/ubuntu", "24.04", b"a later ubuntu")
        assert registry.manifest("library/ubuntu", before) != registry.manifest("library/ubuntu", moved)
        assert locks.main(["--base-images", *words]) == 0
        assert json.loads((tmp_path / LOCK_NAME).read_text()) == {**pushed, "docker.io/library/ubuntu:24.04": moved}


def test_a_registry_that_wants_a_password_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with (
        running_registry(tmp_path / "registry", free_ports(1)[0], password=True) as registry,
        pytest.raises(RegistryError, match="wants a password, and a lock is made without one"),
    ):
        digest_of("reg.example/team/base:1", {"reg.example": registry.url})
