"""A source and key that were there before the kit's are put back when it leaves; what it did not write it leaves."""

from pathlib import Path

import pytest

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
