"""The program that serves files to one other host, and the lock on archives: what is asked, sent and waited for."""

from __future__ import annotations

import fcntl
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible.module_utils.mixtral_run_host.spread import archive, serve

DIGEST = "0123456789" * 4


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    found = io.BytesIO()
    monkeypatch.setattr(serve, "sys", SimpleNamespace(stdout=SimpleNamespace(buffer=found)))
    return found


@pytest.mark.parametrize(
    "command",
    ["", "a", "prob", "probe ", "zzz", "get", f"get {DIGEST}", f"get {DIGEST} x", f"get {DIGEST[:-1]} 0",
     f"get {DIGEST}0 0", f"get {DIGEST} {'1' * 19}", f"get ../{DIGEST} 0", f"get {DIGEST} 0\n",
     f"get {DIGEST.upper()}A 0"],
)  # fmt: skip
def test_nothing_else_is_served(tmp_path: Path, sent: io.BytesIO, command: str) -> None:
    (tmp_path / DIGEST).write_bytes(b"content")
    assert serve.main(str(tmp_path), 0, command) == "only get HASH START is served" and sent.getvalue() == b""


def test_a_file_is_sent_from_a_byte_on(tmp_path: Path, sent: io.BytesIO) -> None:
    (tmp_path / DIGEST).write_bytes(b"0123456789")
    for start, content in ((0, b"0123456789"), (4, b"456789"), (10, b""), (99, b"")):
        sent.seek(0)
        sent.truncate()
        assert serve.main(str(tmp_path), 0, f"get {DIGEST} {start}") is None and sent.getvalue() == content
    assert serve.main(str(tmp_path), 0, "probe") is None
    long = "a" * 64
    assert "No such file" in str(serve.main(str(tmp_path), 0, f"get {long} 0"))
    (tmp_path / long).symlink_to(tmp_path / DIGEST)
    assert "symbolic links" in str(serve.main(str(tmp_path), 0, f"get {long} 0"))
    assert "No such file" in str(serve.main(str(tmp_path / "none"), 0, "probe"))


def test_the_rate_is_kept(tmp_path: Path, sent: io.BytesIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes a second 25 are sent at a time, and each piece takes a quarter of a second in all."""
    now, slept = [50.0], []
    clock = SimpleNamespace(
        monotonic=lambda: now[0],
        sleep=lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds + 0.05)),
    )
    monkeypatch.setattr(serve, "time", clock)
    (tmp_path / DIGEST).write_bytes(bytes(60))
    assert serve.main(str(tmp_path), 100, f"get {DIGEST} 0") is None
    assert slept == [pytest.approx(0.25), pytest.approx(0.2), pytest.approx(0.05)] and len(sent.getvalue()) == 60
    slept.clear()
    now[0] = 50.0
    serve.main(str(tmp_path), 3, f"get {DIGEST} 58")  # a byte at a time at least
    assert len(slept) == 2 and serve.CHUNK == 1_048_576


@pytest.mark.parametrize("held", [False, True])
def test_a_lock_is_waited_for_unless_it_is_not_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    asked: list[int] = []

    def flock(_: int, flags: int) -> None:
        asked.append(flags)
        if held and flags & fcntl.LOCK_NB:
            raise BlockingIOError

    closed: list[int] = []
    close = os.close
    monkeypatch.setattr(archive.fcntl, "flock", flock)
    monkeypatch.setattr(archive.os, "close", lambda lock: (closed.append(lock), close(lock))[1])
    found = object.__new__(archive.ImageArchive)
    found.folder = str(tmp_path / "a/b")
    for options, flags in (
        ({}, fcntl.LOCK_EX),
        ({"wait": True}, fcntl.LOCK_EX),
        ({"wait": False}, fcntl.LOCK_EX | fcntl.LOCK_NB),
    ):
        with found.locked(**options) as mine:
            assert mine is not (held and options.get("wait") is False)
        assert asked.pop() == flags
    assert len(closed) == 3 and (tmp_path / "a").is_dir()
