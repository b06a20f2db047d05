"""Files of secrets and records on a host: their modes from the first byte on, and keys that are gone afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host import files
from ansible.module_utils.mixtral_run_host.spread import peer
from ansible.module_utils.mixtral_run_host.spread.blobs import CopyError

from tests.unit.host.conftest import call_module, load_module

MODULE = load_module("hf_model")


def mode(path: str | Path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


@pytest.fixture(autouse=True)
def open_umask():
    """Under a umask that hides nothing, only what the code itself says keeps others out."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_record_is_for_root_alone_and_goes_with_its_last_value(tmp_path: Path) -> None:
    record = files.Record("docker", folder=str(tmp_path / "records"))
    record.values["proxy"] = "http://user:password@proxy"
    record.save()
    assert mode(record.path) == 0o600
    Path(record.path).chmod(0o644)
    record.values["more"] = 1
    record.save()
    assert mode(record.path) == 0o600
    record.values.clear()
    record.save()
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("wanted", [0o600, 0o640, 0o644])
def test_a_text_is_private_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    seen: list[tuple[int, int]] = []
    fsync, rename = os.fsync, os.rename

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        seen.append((stat.S_IMODE(os.fstat(descriptor).st_mode), os.fstat(descriptor).st_size))

    def renaming(*names: str, **folders: int) -> None:
        assert seen, "the content has to be on the disk before the file gets its name"
        rename(*names, **folders)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "rename", renaming)
    files.write_text(str(tmp_path / "secret"), "hf_abc\n", mode=wanted)
    assert seen == [(0o600, 7)]
    assert mode(tmp_path / "secret") == wanted
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_key_of_another_host_is_private_and_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    seen: list[Path] = []

    class Peer:
        """STAND-IN for the connection: looks at the files that ssh would read."""

        def __init__(self, address: str, port: int, user: str, key: str, known_hosts: str, slowest: float) -> None:
            seen.extend((Path(key), Path(known_hosts)))
            assert (mode(key), mode(known_hosts), mode(Path(key).parent)) == (0o600, 0o600, 0o700)
            assert sorted(Path(key).parent.iterdir()) == seen
            assert Path(key).read_text() == "PRIVATE KEY\n"
            assert Path(known_hosts).read_text() == "[10.0.0.1]:2222 ssh-ed25519 AAAA\n"

        @contextlib.contextmanager
        def open_file(self, *_: object) -> Iterator[tuple[io.BytesIO, bool]]:
            if fails:
                raise CopyError("refused", "run again")
            yield io.BytesIO(b"{}"), True

    monkeypatch.setattr(peer, "ASKING", str(tmp_path / "asking"))
    monkeypatch.setattr(peer, "Peer", Peer)
    (tmp_path / "asking").mkdir()
    (tmp_path / "asking/key-of-a-killed-run").touch()
    content = {"commit": "a" * 40, "files": [["config.json", 2, hashlib.sha256(b"{}").hexdigest()]]}
    result = call_module(
        MODULE, tmp_path / "records", host="gpu-02", home=str(tmp_path / "home"), model="org/model", patterns=["*"],
        via="peer", content=content, peer="gpu-01", peer_address="10.0.0.1", peer_port=2222, peer_user="ops",
        peer_key="PRIVATE KEY\n\n", peer_host_keys=["ssh-ed25519 AAAA"], uid=os.geteuid(), gid=os.getegid(),
    )  # fmt: skip
    assert ("refused" in result["msg"]) if fails else result["spread"]["holds"]
    assert len(seen) == 2 and not seen[0].parent.exists()
