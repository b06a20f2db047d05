"""A source and key that were there before the kit's are put back when it leaves; what it did not write it leaves."""

import base64
import hashlib
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.apt.openpgp import primary_fingerprints

from tests.unit.host.conftest import call_module, load_module

MODULE = load_module("apt_source")
PINNED = "F" * 40
KEY, THEIRS = "the repository's key", "somebody's own\n"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STAND-IN for the repository: answers with its key, whose fingerprint is the pinned one."""
    for name in ("SOURCES", "KEYRINGS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(MODULE, name, str(tmp_path / name))
    monkeypatch.setattr(MODULE, "_open", lambda *_: KEY.encode())
    monkeypatch.setattr(MODULE, "_fingerprints", lambda data: [PINNED] if data == KEY.encode() else [])


def _call(tmp_path: Path, **more: str) -> dict:
    given = {"uri": "https://mirror/{id}", "key_url": "https://mirror/key", "key_fingerprint": PINNED, **more}
    return call_module(MODULE, tmp_path / "records", name="docker", **given)


def _files(tmp_path: Path) -> dict[str, str]:
    return {path.name: path.read_text() for name in ("SOURCES", "KEYRINGS") for path in (tmp_path / name).iterdir()}


@pytest.mark.parametrize(
    "before",
    [{}, {"SOURCES/docker.sources": THEIRS, "KEYRINGS/docker.asc": THEIRS}, {"KEYRINGS/docker.asc": KEY}],
    ids=["nothing", "both", "the same key"],
)
def test_what_was_there_comes_back(tmp_path: Path, before: dict[str, str]) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    found = _files(tmp_path)
    assert _call(tmp_path)["changed"] and not _call(tmp_path)["changed"]
    _call(tmp_path, uri="https://another/{id}")
    assert _files(tmp_path)["docker.asc"] == KEY and "another" in _files(tmp_path)["docker.sources"]
    assert _call(tmp_path, state="absent")["changed"]
    assert _files(tmp_path) == found
    assert not _call(tmp_path, state="absent")["changed"] and not list((tmp_path / "records").glob("*"))


def test_a_source_that_is_as_wanted_is_not_the_kits(tmp_path: Path) -> None:
    _call(tmp_path)
    (tmp_path / "records/apt_sources.json").unlink()
    found = _files(tmp_path)
    assert not _call(tmp_path)["changed"]
    assert not _call(tmp_path, state="absent")["changed"] and _files(tmp_path) == found


def test_sources_of_others_that_were_switched_off_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("ansible.module_utils.basic.AnsibleModule.warn", lambda _self, text: warnings.append(text))
    monkeypatch.setattr(MODULE.probe, "os_release", lambda: {"id": "debian", "version": "12", "codename": "bookworm"})
    one, two = tmp_path / "SOURCES/old.list", tmp_path / "SOURCES/edited.list"
    for path in (one, two):
        path.write_text("deb https://mirror/debian bookworm main\n")
    assert len(_call(tmp_path)["switched_off"]) == 2 and one.read_text().endswith(
        "# deb https://mirror/debian bookworm main\n"
    )
    assert not _call(tmp_path)["changed"]
    two.write_text(two.read_text() + "# by ann\n")
    edited = two.read_text()
    assert _call(tmp_path, state="absent")["changed"]
    assert one.read_text() == "deb https://mirror/debian bookworm main\n" and two.read_text() == edited
    assert len(warnings) == 1 and "edited.list was changed" in warnings[0]
    assert not _call(tmp_path, state="absent")["changed"] and not list((tmp_path / "records").glob("*"))


def test_a_source_that_was_switched_on_again_comes_back_as_it_was_last(tmp_path: Path) -> None:
    path = tmp_path / "SOURCES/old.list"
    release = MODULE.probe.os_release()["id"]
    path.write_text(f"deb https://mirror/{release} bookworm main\n")
    _call(tmp_path)
    path.write_text(f"# ann\ndeb https://mirror/{release} bookworm main\n")
    _call(tmp_path)
    _call(tmp_path, state="absent")
    assert path.read_text() == f"# ann\ndeb https://mirror/{release} bookworm main\n"


def _key(name: bytes) -> tuple[bytes, str]:
    """Return an OpenPGP packet with a public key of version 4, and its fingerprint (RFC 9580, 5.5.4.2)."""
    body = b"\x04" + name
    packet = b"\x99" + len(body).to_bytes(2, "big") + body
    return packet, hashlib.sha1(packet).hexdigest().upper()


def _armored(*packets: bytes) -> str:
    text = base64.b64encode(b"".join(packets)).decode()
    return f"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n{text}\n-----END PGP PUBLIC KEY BLOCK-----\n"


GOOD, FINGERPRINT = _key(b"the repository's")
STRANGE, _ = _key(b"somebody else's")
BUNDLES = {
    "strange second": _armored(GOOD, STRANGE),
    "strange first": _armored(STRANGE, GOOD),
    "strange in a block of its own": _armored(GOOD) + _armored(STRANGE),
    "strange alone": _armored(STRANGE),
    "twice": _armored(GOOD, GOOD),
}


@pytest.fixture
def real_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprints(data: bytes) -> list[str]:
        try:
            return primary_fingerprints(data)
        except ValueError:
            return []

    monkeypatch.setattr(MODULE, "_fingerprints", fingerprints)


@pytest.mark.parametrize("there", BUNDLES)
def test_a_key_file_that_trusts_another_key_too_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_fingerprints: None, there: str
) -> None:
    """apt trusts every key of the file: one that holds the pinned key and a strange one is not in place."""
    monkeypatch.setattr(MODULE, "_open", lambda *_: _armored(GOOD).encode())
    (tmp_path / "KEYRINGS/docker.asc").write_text(BUNDLES[there])
    assert _call(tmp_path, key_fingerprint=FINGERPRINT)["changed"]
    assert (tmp_path / "KEYRINGS/docker.asc").read_text() == _armored(GOOD)


@pytest.mark.parametrize("sent", BUNDLES)
def test_a_repository_that_sends_another_key_too_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_fingerprints: None, sent: str
) -> None:
    monkeypatch.setattr(MODULE, "_open", lambda *_: BUNDLES[sent].encode())
    result = _call(tmp_path, key_fingerprint=FINGERPRINT)
    assert result["failed"] and "is not the pinned one; nothing was changed" in result["msg"]
    assert _files(tmp_path) == {} and not (tmp_path / "records").exists()
