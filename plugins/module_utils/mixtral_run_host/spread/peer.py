"""Client that reads files of another host over SSH, with a key that allows nothing else there."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
import time

from ..files import RECORD_FOLDER, write_text
from .blobs import CopyError

ASKING = os.path.join(RECORD_FOLDER, "asking")
"""Holds the private key during a copy."""
_ERROR_BYTES = 2000
SLOW_SECONDS = 30
"""A source is measured over this time. Nothing at all for as long counts as slow too."""


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
        self._argv += ["--", "{}@{}".format(user, address)]

    @contextlib.contextmanager
    def open_file(self, file, start):
        """Yield a stream of the file's bytes from `start` on, and True, because the other host can resume."""
        argv = self._argv + ["get {} {}".format(file.digest, start)]
        # A pipe for the errors would fill up, and both sides would wait, while only the file is read.
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(os.environ, LC_ALL="C"),
            )
            try:
                yield _Measured(process.stdout, self.target, self._slowest), True
            except BaseException:
                process.kill()  # the other host may send nothing more, and never end
                raise
            finally:
                process.stdout.close()
                code = process.wait()
            errors.seek(0)
            error = errors.read(_ERROR_BYTES).decode("utf-8", "replace").strip()
            if code:
                raise CopyError(
                    "{}: {}".format(self.target, error or "ssh ended with {}".format(code)),
                    "run again: it goes on there; hosts reach each other by SSH at their address among hosts",
                )


class _Measured:
    """Stream of a pipe that gives up a source which is slower than `slowest` bytes per second."""

    def __init__(self, pipe, target, slowest):
        self._pipe, self._target, self._slowest = pipe, target, slowest
        self._since, self._arrived = time.monotonic(), 0

    def read(self, size):
        ready, _, _ = select.select([self._pipe], [], [], SLOW_SECONDS if self._slowest else None)
        chunk = os.read(self._pipe.fileno(), size) if ready else b""
        self._arrived += len(chunk)
        seconds = time.monotonic() - self._since
        if self._slowest and (not ready or seconds >= SLOW_SECONDS):
            if self._arrived < self._slowest * seconds:
                raise CopyError(
                    "{}: {:.2f} MiB/s over {:.0f} s is slower than {:g} MiB/s".format(
                        self._target, self._arrived / seconds / 2**20, seconds, self._slowest / 2**20
                    ),
                    "run again: it goes on there",
                )
            self._since, self._arrived = time.monotonic(), 0
        return chunk
