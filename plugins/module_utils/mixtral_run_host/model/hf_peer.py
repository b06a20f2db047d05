"""Client that reads a model in the HF cache of another host over SSH, with a key that allows nothing else there."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile

from ..commands import last_lines, run
from .model_cache import ModelError, checked_commit, checked_files, matching

_ERROR_BYTES = 2000


class Peer:
    """Connection to `serve_model.py` on another host."""

    def __init__(self, address, port, user, model, key_path, known_hosts_path):
        self.target, self._model = "{}@{}:{}".format(user, address, port), model
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
        self._listing = None

    def commit(self, revision):
        """Return the commit that a revision names on the other host, and store the listing for `files`."""
        answer = run(self._argv + ["list " + revision], timeout=120)
        if answer.code:
            raise ModelError(
                "{}: {}".format(self.target, last_lines(answer, 3) or "ssh ended with {}".format(answer.code)),
                "hf_cache_peer names a host that has {} and that this host reaches by SSH at hf_cache_peer_address, "
                "hf_cache_peer_port".format(self._model),
            )
        try:
            listing = json.loads(answer.out)
            commit, files = listing["commit"], listing["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError("{}: it does not list the model: {!r}".format(self.target, error), "run again") from error
        self._listing = checked_commit(commit, self.target), checked_files(files, self.target)
        return commit

    def files(self, commit, patterns):
        """Return the files of the model whose path matches one of `patterns`. Call `commit` first."""
        assert self._listing is not None and self._listing[0] == commit
        return matching(self._listing[1], patterns)

    @contextlib.contextmanager
    def open_file(self, _commit, file, start):
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
                yield process.stdout, True
            except BaseException:
                process.kill()  # the other host may send nothing more, and never end
                raise
            finally:
                process.stdout.close()
                code = process.wait()
            errors.seek(0)
            error = errors.read(_ERROR_BYTES).decode("utf-8", "replace").strip()
            if code and error:
                raise ModelError("{}: {}".format(self.target, error), "run again: it goes on there")
