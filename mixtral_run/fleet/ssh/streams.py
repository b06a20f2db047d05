"""Output of processes that talk to hosts, read with bounds: a host may send without end."""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from typing import IO

from mixtral_run.fleet.untrusted import printable

CHUNK_BYTES = 1 << 16
MAX_ANSWER_BYTES = 16 << 20
"""Longest output of a command that is read as a whole. The largest answer, that of `status`, is below 1 MiB."""
MAX_LINE_BYTES = 1 << 20
"""Longest line of a live output. A longer one is passed on in parts."""
MAX_REST_BYTES = 1 << 20
"""Output that is read and discarded after its receiver has finished. A command that sends more is cut off."""
MAX_ERROR_BYTES = 1 << 16
"""Standard error of a streamed command that is kept: the last bytes of it."""


class AnswerTooLongError(Exception):
    """A command printed more than MAX_ANSWER_BYTES."""


def text_of(data: bytes) -> str:
    """Decode the output of a host and remove terminal control sequences."""
    return printable(data.decode(errors="replace"))


def communicate(
    process: subprocess.Popen[bytes], stdin: bytes | None, timeout_seconds: float | None
) -> tuple[bytes, bytes]:
    """Send `stdin` to a process and return both its outputs after its end, as Popen.communicate does, within a bound.

    Raises:
        subprocess.TimeoutExpired: the process did not end in time. The caller has to end it.
        AnswerTooLongError: an output is longer than MAX_ANSWER_BYTES. The caller has to end the process.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    if stdin is not None:
        threading.Thread(target=_send, args=(process.stdin, stdin), daemon=True).start()
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    found = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    with process.stdout, process.stderr, selectors.DefaultSelector() as selector:
        for descriptor in found:
            selector.register(descriptor, selectors.EVENT_READ)
        output, errors = found.values()
        while selector.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(process.args, timeout_seconds or 0)
            for key, _ in selector.select(left):
                data = os.read(key.fd, CHUNK_BYTES)
                if not data:
                    selector.unregister(key.fd)
                found[key.fd] += data
                if len(found[key.fd]) > MAX_ANSWER_BYTES:
                    raise AnswerTooLongError(f"the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
    process.wait(None if deadline is None else max(deadline - time.monotonic(), 1))
    return bytes(output), bytes(errors)


def _send(stream: IO[bytes], data: bytes) -> None:
    # A process that ends without reading its input reports the reason itself.
    with contextlib.suppress(OSError, ValueError), stream:
        stream.write(data)


def lines(pipes: Iterable[IO[bytes]]) -> Iterator[tuple[IO[bytes], str]]:
    """Yield the lines of all pipes as they arrive, each with its pipe, without terminal control sequences."""
    begun: dict[IO[bytes], bytes] = {}
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ, pipe)
        while selector.get_map():
            for key, _ in selector.select():
                pipe = key.data
                data = os.read(key.fd, CHUNK_BYTES)
                *complete, rest = (begun.pop(pipe, b"") + data).split(b"\n")
                if not data:
                    selector.unregister(pipe)
                if data and len(rest) < MAX_LINE_BYTES:
                    begun[pipe] = rest
                else:
                    complete += [rest] if rest else []
                for line in complete:
                    yield pipe, text_of(line.rstrip(b"\r"))


def drained(stream: IO[bytes]) -> bool:
    """Read a stream to its end. Return False if it holds more than MAX_REST_BYTES."""
    left = MAX_REST_BYTES
    while left > 0 and (data := stream.read(CHUNK_BYTES)):
        left -= len(data)
    return left > 0


class LastBytes:
    """Reader of a stream in its own thread that keeps the last MAX_ERROR_BYTES."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._pieces: collections.deque[bytes] = collections.deque(maxlen=MAX_ERROR_BYTES // 256)
        self._thread = threading.Thread(target=self._collect, args=(stream,), daemon=True)
        self._thread.start()

    def _collect(self, stream: IO[bytes]) -> None:
        while data := stream.read(256):
            self._pieces.append(data)

    def text(self) -> str:
        """Wait for the end of the stream and return its last bytes as text."""
        self._thread.join()
        return text_of(b"".join(self._pieces))
