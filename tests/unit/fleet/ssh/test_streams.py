"""Bounds of what is read of a process, at each bound and one byte beyond it, and how long its end is waited for."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest.mock import MagicMock

import pytest

from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.ssh import connection, streams
from mixtral_run.fleet.ssh.streams import AnswerTooLongError, communicate, drained
from tests.unit.fleet.ssh.test_calls import piped


class Ended:
    """STAND-IN for a process that has written both outputs. waited: how long its end is waited for."""

    args = ("ssh",)

    def __init__(self, output: bytes = b"", errors: bytes = b"", stdin: IO[bytes] | None = None) -> None:
        self.stdout, self.stderr, self.stdin = piped(output), piped(errors), stdin
        self.waited: list[float | None] = []

    def wait(self, seconds: float | None) -> int:
        self.waited.append(seconds)
        return 0


@pytest.mark.parametrize("which", [0, 1])
def test_the_longest_answer_is_taken_and_one_byte_more_is_not(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    monkeypatch.setattr(streams, "MAX_ANSWER_BYTES", 1 << 10)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 100)
    data = [b"", b""]
    data[which] = b"x" * 1024
    process: Any = Ended(*data)
    assert communicate(process, None, None) == tuple(data)
    assert process.waited == [None] and process.stdout.closed and process.stderr.closed
    data[which] += b"x"
    process = Ended(*data)
    with pytest.raises(AnswerTooLongError, match="longer than 0 MiB"):
        communicate(process, None, None)
    assert process.stdout.closed


def test_the_end_is_waited_for_as_long_as_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 s nothing has passed, or 59.5 s, of which a second is waited for at least."""
    for times, expected in (
        ([100.0, 100.0, 100.0, 100.0, 100.0], 60.0),
        ([100.0, 101.0, 102.0, 159.5], 1),
        ([100.0, 159.2, 159.4, 159.5], 1),
    ):
        left = list(times)
        monkeypatch.setattr(
            streams, "time", SimpleNamespace(monotonic=lambda left=left: left.pop(0) if len(left) > 1 else left[0])
        )
        process: Any = Ended(b"a", b"b")
        assert communicate(process, None, 60.0) == (b"a", b"b")
        assert process.waited == [expected]


@pytest.mark.parametrize("seconds", [0, 2.5])
def test_no_time_is_left(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    times = [100.0, 100.0 + seconds]
    monkeypatch.setattr(
        streams, "time", SimpleNamespace(monotonic=lambda: times.pop(0) if len(times) > 1 else times[0])
    )
    process: Any = Ended(b"a")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        communicate(process, None, seconds)
    assert (caught.value.cmd, caught.value.timeout) == (("ssh",), seconds) and process.waited == []


def test_a_rest_is_read_up_to_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_REST_BYTES", 1000)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 100)
    for size, reads, is_end in ((0, 1, True), (999, 11, True), (1000, 10, False), (5000, 10, False)):
        asked: list[int] = []
        left = [size]

        def read(count: int, left: list[int] = left, asked: list[int] = asked) -> bytes:
            asked.append(count)
            given = min(count, left[0])
            left[0] -= given
            return b"x" * given

        stream: Any = SimpleNamespace(read=read)
        assert drained(stream) is is_end
        assert asked == [100] * reads


def test_an_interrupt_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    process = MagicMock()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(connection, "_start", lambda *_, **__: process)
    monkeypatch.setattr(connection, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        connection.Ssh(Path("known")).run(Host("a", "b"), ["true"])
    process.kill.assert_called_once_with()
