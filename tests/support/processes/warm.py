"""Start Python programs by forking a process that has already imported torch, Megatron and Transformers.

A new interpreter spends three seconds of CPU time on these imports, and a command that starts a job spends them twice.
`run` returns the same result as `subprocess.run` with the same arguments, from a process with its own pid, environment,
folder and streams. If a fork could differ from a new interpreter, `run` starts a new one: if environment variables
differ from those at the server's start (libraries read them when they are imported), on a GPU, or on an operating
system without pidfd. For commands with their own HF_… variables there is a second server, which has not imported the
libraries that read them. MIXTRAL_RUN_TEST_FRESH=1 always starts a new interpreter, to check if a failure depends on
forking.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

START_SECONDS = 300
FRESH_VARIABLE = "MIXTRAL_RUN_TEST_FRESH"
ROOT = Path(__file__).parents[3]
CHANGING = (
    "PYTEST_CURRENT_TEST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "GLOO_SOCKET_IFNAME", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MIXTRAL_RUN_STORE_CACHE",
)  # fmt: skip
"""Environment variables that no library reads while it is imported."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
"""The server's: as it is before any test changes it."""
HF_LIBRARIES = ("transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers")


class WarmServer:
    """Server process and its socket."""

    def __init__(self, modules: Sequence[str]) -> None:
        """Start the server, which imports `modules` in addition to the modules that every command needs."""
        self._folder = Path(tempfile.mkdtemp(prefix="mixtral-run-warm-"))
        self._socket = str(self._folder / "socket")
        lifeline, self._end = os.pipe()
        words = [sys.executable, "-m", "tests.support.processes.warm_server", self._socket, str(lifeline), *modules]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd=ROOT,
            pass_fds=(lifeline,),
        )
        os.close(lifeline)
        self._owner = os.getpid()
        atexit.register(self.close)

    def close(self) -> None:
        """Stop the server. In a fork of this process, do nothing."""
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.close)
        os.close(self._end)
        # A fork that still runs may hold the other end of the lifeline.
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def path(self) -> str:
        """The socket, which is there once the first connection was made."""
        return self._socket

    def connect(self) -> socket.socket:
        """Connect to the server. The first call waits for its imports."""
        until = time.monotonic() + START_SECONDS
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self._socket)
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if self._process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"The warm server did not start (exit code {self._process.poll()}).") from None
                time.sleep(0.02)


class WarmProcess:
    """Process that was forked for a command. It is not a child of this process."""

    def __init__(
        self,
        server: WarmServer,
        argv: Sequence[str],
        env: Mapping[str, str],
        stdout: int,
        stderr: int,
        *,
        cwd: Path | str | None = None,
        group: bool = False,
    ) -> None:
        words = {"argv": list(argv), "cwd": str(cwd or Path.cwd()), "env": dict(env), "group": group}
        request = json.dumps(words).encode() + b"\n"
        self._connection = server.connect()
        with Path(os.devnull).open("rb") as nothing:
            sent = socket.send_fds(self._connection, [request], [nothing.fileno(), stdout, stderr])
            self._connection.sendall(request[sent:])
        # The stream is unbuffered, so that `fileno` is readable exactly when the process has ended.
        self._answers = self._connection.makefile("rb", buffering=0)
        self.pid: int = self._answer()["pid"]
        self.returncode: int | None = None

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("The warm server ended.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def fileno(self) -> int:
        return self._connection.fileno()

    def wait(self) -> int:
        """Return the exit code, or the negative number of the signal that ended the process."""
        if self.returncode is None:
            self.returncode = int(self._answer()["status"])
            self._answers.close()
            self._connection.close()
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


@cache
def _server(modules: Sequence[str]) -> WarmServer:
    return WarmServer(modules)


def server_for(env: Mapping[str, str]) -> WarmServer | None:
    """Return the server; the first call starts it. Return None if a fork would differ in this environment."""
    import torch

    names = {name for name in env.keys() | ENVIRONMENT.keys() if env.get(name) != ENVIRONMENT.get(name)}
    names -= set(CHANGING)
    other = {name for name in names if name != "NO_PROXY" and not name.startswith("HF_")}
    if other or FRESH_VARIABLE in env or not hasattr(os, "pidfd_open") or torch.cuda.is_available():
        return None
    return _server(() if names else HF_LIBRARIES)


def run(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python with the arguments `argv` and capture its output. `env` is its complete environment."""
    server = server_for(env)
    if server is None:
        return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env, check=False)
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    try:
        process = WarmProcess(server, argv, env, out_end, err_end)
    finally:
        os.close(out_end)
        os.close(err_end)
    try:
        # Read all output first, as subprocess does, because any process that holds a stream may still write.
        stdout, stderr = _read_all(out, err)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(list(argv), process.wait(), stdout, stderr)


def _read_all(*descriptors: int) -> list[str]:
    """Read pipes to their ends and close them."""
    outputs = {descriptor: bytearray() for descriptor in descriptors}
    try:
        with selectors.DefaultSelector() as selector:
            for descriptor in descriptors:
                selector.register(descriptor, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    data = os.read(key.fd, 2**16)
                    outputs[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return [output.decode() for output in outputs.values()]


def run_ranks(num_processes: int, argv: Sequence[str], env: Mapping[str, str]) -> tuple[list[int], str]:
    """Run a Python program in several processes of one job, as torchrun does. Return their exit codes and their output.

    The first rank that fails ends the others.
    """
    server = server_for(env)
    assert server is not None
    job = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    with tempfile.TemporaryFile() as output:
        ranks = []
        for rank in range(num_processes):
            own = {**env, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(WarmProcess(server, argv, own, output.fileno(), output.fileno()))
        try:
            codes = _wait_for_all(ranks)
        finally:
            for each in ranks:
                each.kill()
        output.seek(0)
        return codes, output.read().decode(errors="replace")


def _wait_for_all(ranks: Sequence[WarmProcess]) -> list[int]:
    """Return the exit codes. When one fails, the others are killed."""
    with selectors.DefaultSelector() as selector:
        for number, rank in enumerate(ranks):
            selector.register(rank, selectors.EVENT_READ, number)
        while selector.get_map():
            for key, _ in selector.select():
                selector.unregister(ranks[key.data])
                if ranks[key.data].wait() != 0:
                    for each in ranks:
                        each.kill()
    return [rank.wait() for rank in ranks]


def _free_port() -> int:
    """Return a port below the range that the system uses for outgoing connections, so that no connection takes it."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("There is no free port.")


def can_fork(env: Mapping[str, str]) -> bool:
    """Return True if `run` forks in this environment instead of starting a new interpreter."""
    return server_for(env) is not None
