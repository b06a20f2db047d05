"""Client that reads files of another host over SSH, with a key that allows nothing else there."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import threading
import time

from ..files import RECORD_FOLDER, write_text
from .blobs import CopyError

ASKING = os.path.join(RECORD_FOLDER, "asking")
"""Holds the private key during a copy."""
_ERROR_BYTES = 2000
SLOW_SECONDS, IDLE_SECONDS = 30, 120
"""A source is measured over this time. Nothing at all for as long counts as slow too; without a limit, for the second."""
END_SECONDS = 30
"""Time for ssh to end after the file."""


@contextlib.contextmanager
def connected(address, port, user, key, host_keys, slowest):
    """Yield a Peer. Its private key lies in a file for the time of the block; a killed module's is replaced."""
    forget_keys()
    os.makedirs(ASKING, mode=0o700)
    try:
        key_path, known_hosts = os.path.join(ASKING, "key"), os.path.join(ASKING, "known_hosts")
        write_text(key_path, key.strip() + "\n", mode=0o600)
        place = address if port == 22 else "[{}]:{}".format(address, port)
        write_text(known_hosts, "".join("{} {}\n".format(place, each) for each in host_keys), mode=0o600)
        yield Peer(address, port, user, key_path, known_hosts, slowest)
    finally:
        forget_keys()


def forget_keys():
    """Remove the private key that a killed run left on this host."""
    shutil.rmtree(ASKING, ignore_errors=True)


class Peer:
    """Connection to `serve.py` on another host. slowest: bytes per second below which the other host is given up."""

    def __init__(self, address, port, user, key_path, known_hosts_path, slowest=0):
        self.target, self._slowest = "{}@{}:{}".format(user, address, port), slowest
        self._argv = ["ssh", "-F", "none", "-p", str(port), "-i", key_path]
        for option in (
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "StrictHostKeyChecking=yes",
            "UserKnownHostsFile=" + known_hosts_path,
            "GlobalKnownHostsFile=/dev/null",
            "ConnectTimeout=20",
            "ServerAliveInterval=15",
            # Weights do not compress.
            "Compression=no",
            "LogLevel=ERROR",
        ):
            self._argv += ["-o", option]
        # In one word, ssh would read ssh:// and @ in a user's name, which the other host reports.
        self._argv += ["-l", user, "--", address]

    @contextlib.contextmanager
    def open_file(self, file, start):
        """Yield a stream of the file's bytes from `start` on, and True, because the other host can resume."""
        with self._answer("get {} {}".format(file.digest, start)) as stream:
            yield stream, True

    def probe(self):
        """Raise CopyError unless the other host can be reached with the key and serves its files."""
        with self._answer("probe") as stream:
            if stream.read(1):
                raise CopyError("{}: it answers more than was asked for".format(self.target), "look at that host")

    @contextlib.contextmanager
    def _answer(self, command):
        process = subprocess.Popen(
            self._argv + [command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(os.environ, LC_ALL="C"),
        )
        # The pipe for the errors would fill up, and both sides would wait, while only the file is read.
        errors = bytearray()
        reader = threading.Thread(target=_keep, args=(process.stderr, errors), daemon=True)
        reader.start()
        try:
            yield _Measured(process.stdout, self.target, self._slowest)
        except BaseException:
            process.kill()  # the other host may send nothing more, and never end
            raise
        finally:
            process.stdout.close()
            try:
                code = process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
                errors[:] = b"it did not end after the file"
            reader.join(END_SECONDS)
        error = bytes(errors[:_ERROR_BYTES]).decode("utf-8", "replace").strip()
        if code:
            raise CopyError(
                "{}: {}".format(self.target, error or "ssh ended with {}".format(code)),
                "run again: it goes on there; hosts reach each other by SSH at their address among hosts",
            )


def _keep(pipe, kept):
    """Read a pipe to its end and keep the first bytes of it. The other host decides how many there are."""
    with pipe:
        for chunk in iter(lambda: pipe.read1(1 << 16), b""):
            kept += chunk[: _ERROR_BYTES - len(kept)]


class _Measured:
    """Stream of a pipe that gives up a source which is slower than `slowest` bytes per second."""

    def __init__(self, pipe, target, slowest):
        self._pipe, self._target, self._slowest = pipe, target, slowest
        self._since, self._arrived = time.monotonic(), 0

    def read(self, size):
        idle = SLOW_SECONDS if self._slowest else IDLE_SECONDS
        ready, _, _ = select.select([self._pipe], [], [], idle)
        chunk = os.read(self._pipe.fileno(), size) if ready else b""
        self._arrived += len(chunk)
        seconds = time.monotonic() - self._since
        if not ready or (self._slowest and seconds >= SLOW_SECONDS):
            if not self._slowest:
                raise CopyError(
                    "{}: nothing arrived for {} s".format(self._target, idle), "run again: it goes on there"
                )
            # An empty chunk would count as the end.
            if not ready or self._arrived < self._slowest * seconds:
                raise CopyError(
                    "{}: {:.2f} MiB/s over {:.0f} s is slower than {:g} MiB/s".format(
                        self._target, self._arrived / seconds / 2**20, seconds, self._slowest / 2**20
                    ),
                    "run again: it goes on there",
                )
            self._since, self._arrived = time.monotonic(), 0
        return chunk
