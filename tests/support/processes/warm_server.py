"""Server process that has imported torch, Megatron and Transformers, and forks for every command of a test.

`python -m tests.support.processes.warm_server SOCKET LIFELINE [MODULE …]` also imports the modules, then listens on the
Unix socket SOCKET until the pipe LIFELINE is closed. The clients are warm.py, commands.py and forked_python.py next to
it. A request is a line of JSON with the three standard streams: `argv` as after the interpreter's name, `cwd`, `env`;
`group` if the process leads a process group of its own; `tied` if it is killed when the client has died. The answers
are two lines of JSON: `{"pid": …}` at once and `{"status": …}` at the end.

The server only imports. A fork of a process with threads would inherit locks that nobody releases, so the server
refuses to start if an import has started a thread.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import json
import os
import selectors
import signal
import socket
import sys
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

MAX_REQUEST_BYTES = 2**20
IMPORTED = (
    "matplotlib.backends.backend_agg",
    "torch.distributed.checkpoint",
    "torch.distributed.launcher.api",
    "torch.utils.tensorboard",
)
"""Modules that the processes of the product import late. None of them reads HF_… variables."""
EVERYTHING_IGNORED = ("ignore", None, Warning, None, 0)


def import_what_commands_need(more: Sequence[str]) -> None:
    import mixtral_run.cli.commands.finetune
    import mixtral_run.launch.preload  # noqa: F401
    from mixtral_run.train.jobs import FINETUNE

    for name in (*FINETUNE.preload, *IMPORTED, *more):
        importlib.import_module(name)
    # The import of the product silences warnings, but each command decides about that itself.
    warnings.filters[:] = [each for each in warnings.filters if each != EVERYTHING_IGNORED]
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    if num_threads != 1:
        raise RuntimeError(f"Imports started {num_threads - 1} threads. Forking after that is not safe.")
    # Freeze all objects: the garbage collector writes into every object that it visits, which would copy shared pages.
    gc.collect()
    gc.freeze()


class Server:
    """Server that forks for each request and reports the exit. `serve` returns in forked processes only."""

    def __init__(self, listener: socket.socket, lifeline: int) -> None:
        self._listener = listener
        self._lifeline = lifeline
        self._selector = selectors.DefaultSelector()
        self._clients: dict[int, tuple[int, socket.socket]] = {}
        """For the pidfd of each process: its pid, and the connection of who asked for it."""

    def serve(self) -> dict[str, Any]:
        """Return the request, in the process that was forked for it. Exit if the lifeline is closed."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._lifeline, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    request = self._fork(self._listener.accept()[0])
                    if request is not None:
                        return request
                elif key.fd == self._lifeline:
                    os._exit(0)
                elif key.data is not None:
                    # The client sends nothing more: it has died.
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
                elif key.fd in self._clients:
                    self._report_end(key.fd)

    def _fork(self, client: socket.socket) -> dict[str, Any] | None:
        data, streams, _, _ = socket.recv_fds(client, MAX_REQUEST_BYTES, 3)
        while not data.endswith(b"\n"):
            more = client.recv(MAX_REQUEST_BYTES)
            if not more:
                # The client was interrupted. Continue with the next one.
                for stream in streams:
                    os.close(stream)
                client.close()
                return None
            data += more
        request: dict[str, Any] = json.loads(data)
        pid = os.fork()
        if pid == 0:
            client.close()
            self._close()
            if request.get("group"):
                os.setpgid(0, 0)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return request
        for stream in streams:
            os.close(stream)
        if request.get("group"):
            # Here as well, so that the group is there before the client learns the number.
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)
        descriptor = os.pidfd_open(pid)
        self._clients[descriptor] = (pid, client)
        self._selector.register(descriptor, selectors.EVENT_READ)
        if request.get("tied"):
            self._selector.register(client, selectors.EVENT_READ, pid)
        _send(client, {"pid": pid})
        return None

    def _report_end(self, descriptor: int) -> None:
        pid, client = self._clients.pop(descriptor)
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        with contextlib.suppress(KeyError):
            self._selector.unregister(client)
        _send(client, {"status": os.waitstatus_to_exitcode(status)})
        client.close()

    def _close(self) -> None:
        """Close all descriptors of the server in a forked process."""
        self._selector.close()
        self._listener.close()
        os.close(self._lifeline)
        for descriptor, (_, client) in self._clients.items():
            os.close(descriptor)
            client.close()


def _send(client: socket.socket, message: dict[str, int]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(json.dumps(message).encode() + b"\n")


def become(request: dict[str, Any]) -> None:
    """Run the command in this process as a new interpreter would: `-m MODULE`, `-c CODE` or a script, and arguments."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # A new process has its own seeds. The random module reseeds itself after a fork.
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    util.spawnv_passfds = _fork_server_passing(util.spawnv_passfds)
    main = types.ModuleType("__main__")
    code = _code_of(request["argv"], main)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)  # noqa: S102


def _code_of(argv: Sequence[str], main: types.ModuleType) -> types.CodeType:
    if argv[0] == "-u":
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(write_through=True)
        argv = argv[1:]
    if argv[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *argv[2:]]
        return compile(argv[1], "<string>", "exec")
    if argv[0] == "-m":
        sys.path[0] = str(Path.cwd())
        spec = importlib.util.find_spec(argv[1])
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{argv[1]}.__main__")
        if spec is None or spec.origin is None:
            raise ImportError(f"No module named {argv[1]}")
        main.__spec__, main.__package__, main.__loader__, main.__file__ = spec, spec.parent, spec.loader, spec.origin
        sys.argv = [spec.origin, *argv[2:]]
        return compile(Path(spec.origin).read_bytes(), spec.origin, "exec")
    sys.path[0], sys.argv = str(Path(argv[0]).resolve().parent), list(argv)
    main.__file__ = argv[0]
    return compile(Path(argv[0]).read_bytes(), argv[0], "exec")


def _fork_server_passing(start: Callable[..., int]) -> Callable[..., int]:
    """Wrap `multiprocessing.util.spawnv_passfds`, so that Python's fork server is forked as well.

    The product's launcher starts that server and would wait for its imports. Like every fork server it must start
    before any thread, so the product starts it first.
    """

    def started(path: str, args: Sequence[str], descriptors: Sequence[int]) -> int:
        program = args[-1]
        if "multiprocessing.forkserver" not in program or threading.active_count() > 1:
            return start(path, args, descriptors)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _run_fork_server(program, descriptors)
        return pid

    return started


def _run_fork_server(program: str, descriptors: Sequence[int]) -> None:
    """Run the fork server and exit without returning, because the command's stack has cleanup of another process."""
    code = 1
    try:
        open_ones = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
        for descriptor in open_ones - {0, 1, 2, *descriptors}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Replace the locks and state that the fork took over from the parent, which may be held.
        forkserver._forkserver._lock = threading.Lock()
        resource_tracker._resource_tracker.__init__()
        # Workers read their main module from here.
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(program, sys.modules["__main__"].__dict__)  # noqa: S102
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    import_what_commands_need(sys.argv[3:])
    listener.listen()
    become(Server(listener, int(sys.argv[2])).serve())


if __name__ == "__main__":
    main()
