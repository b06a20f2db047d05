"""Talking to a host over the system's ssh. Argument lists are built by pure functions; only `_start` starts processes.

Host keys are kept in a file of the kit's own: accepted at first contact, refused when they change. The user's
~/.ssh/config holds for everything else (users, ports, jump hosts, keys), and ~/.ssh/known_hosts is read, never written.
"""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import shlex
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.ssh.problems import connection_error, is_dropped, last_line
from mixtral_run.fleet.state import state_folder

CONNECT_SECONDS = 10
MAX_PARALLEL = 64
RETRY_SECONDS = (1.0, 2.0, 4.0)
"""About how long to wait before each further try, where a connection was dropped before anything ran over it."""
T = TypeVar("T")


def known_hosts_file() -> Path:
    return state_folder() / "known_hosts"


def connection_options(known_hosts: Path, *, batch: bool = True, user_known_hosts: bool = True) -> list[str]:
    """ssh's options for every connection of the kit, Ansible's included."""
    files = f'"{known_hosts}"' + (f' "{Path.home() / ".ssh" / "known_hosts"}"' if user_known_hosts else "")
    found = [
        "-o", "StrictHostKeyChecking=accept-new",
        "-o", f"UserKnownHostsFile={files}",
        # Names in the clear: `--accept-new-host-key` finds them, and the file is this user's alone.
        "-o", "HashKnownHosts=no",
        "-o", "UpdateHostKeys=no",
        "-o", f"ConnectTimeout={CONNECT_SECONDS}",
        "-o", "ServerAliveInterval=15",
        "-o", "ServerAliveCountMax=4",
        "-o", "LogLevel=ERROR",
    ]  # fmt: skip
    return ["-o", "BatchMode=yes", *found] if batch else found


def destination(host: Host) -> list[str]:
    """The words that say whom to connect to."""
    found = list(host.ssh_options)
    if host.port:
        found += ["-p", str(host.port)]
    if host.user:
        found += ["-l", host.user]
    if host.identity_file:
        found += ["-i", host.identity_file]
    return [*found, "--", host.address]


def ssh_argv(host: Host, command: Sequence[str], known_hosts: Path, *, batch: bool = True) -> list[str]:
    """`ssh … -- ADDRESS COMMAND`. sshd gives the command to a shell: every word is quoted, so that words stay words."""
    options = connection_options(known_hosts, batch=batch)
    return ["ssh", *options, *destination(host), shlex.join(command)]


def resolve_argv(host: Host) -> list[str]:
    """Print ssh's settings for a host after ~/.ssh/config; connects to nobody."""
    return ["ssh", "-G", *destination(host)]


def forget_key_argv(known_hosts: Path, entry: str) -> list[str]:
    return ["ssh-keygen", "-q", "-f", str(known_hosts), "-R", entry]


@dataclass(frozen=True)
class Answer:
    """What a command on a host came back with."""

    exit_code: int
    output: str
    errors: str


class Ssh:
    """Connections to hosts of a fleet. Safe to use from several threads."""

    def __init__(self, known_hosts: Path | None = None) -> None:
        self.known_hosts = known_hosts or known_hosts_file()

    def run(
        self,
        host: Host,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout_seconds: float | None = 60,
        environment: dict[str, str] | None = None,
        batch: bool = True,
    ) -> Answer:
        """Run a command on a host and wait. A connection that fails has exit code 255, a time-out 124.

        Tried again where sshd dropped the connection before the command could run.
        """
        argv = ssh_argv(host, command, self.known_hosts, batch=batch)
        return _patiently(lambda: self._run_once(argv, stdin, timeout_seconds, environment))

    @staticmethod
    def _run_once(
        argv: Sequence[str], stdin: bytes | None, timeout_seconds: float | None, environment: dict[str, str] | None
    ) -> Answer:
        process = _start(argv, stdin=stdin is not None, environment=environment, own_session=environment is not None)
        try:
            output, errors = process.communicate(stdin, timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Answer(124, "", f"no answer within {timeout_seconds:g} s")
        except BaseException:
            process.kill()
            raise
        return Answer(process.returncode, output.decode(errors="replace"), errors.decode(errors="replace"))

    def check(
        self, host: Host, command: Sequence[str], *, stdin: bytes | None = None, timeout_seconds: float | None = 60
    ) -> str:
        """What a command printed. Raises HostError with its last words where it fails."""
        answer = self.run(host, command, stdin=stdin, timeout_seconds=timeout_seconds)
        if answer.exit_code == 255:
            raise connection_error(host, answer.errors)
        if answer.exit_code:
            raise HostError(
                f"A command failed on {host.name}.",
                where=shlex.join(command)[:300],
                expected="exit code 0",
                found=f"exit code {answer.exit_code}: {last_line(answer.errors or answer.output)}",
            )
        return answer.output

    def send(self, host: Host, command: Sequence[str], file: Path) -> None:
        """Run a command on a host with a file of this machine as its input. Raises HostError where it fails."""
        argv = ssh_argv(host, command, self.known_hosts)
        with file.open("rb") as stream:
            process = _start(argv, stdin_file=stream)
            _, errors = process.communicate()
        if process.returncode:
            raise HostError(
                f"{file} could not be sent to {host.name}.", found=last_line(errors.decode(errors="replace"))
            )

    @contextlib.contextmanager
    def receive(self, host: Host, command: Sequence[str]) -> Iterator[IO[bytes]]:
        """What a command on a host prints, as a stream. Raises HostError at the end where the command failed."""
        process = _start(ssh_argv(host, command, self.known_hosts))
        assert process.stdout is not None
        assert process.stderr is not None
        problem: BaseException | None = None
        try:
            yield process.stdout
        except HostError as error:
            problem = error
        except BaseException:
            process.kill()
            raise
        while process.stdout.read(1 << 16):
            pass
        errors = process.stderr.read().decode(errors="replace")
        if process.wait():
            raise HostError(f"{host.name} did not send what was asked for.", found=last_line(errors)) from problem
        if problem is not None:
            raise problem

    def stream(
        self,
        host: Host,
        command: Sequence[str],
        on_line: Callable[[str], None],
        stop: threading.Event | None = None,
        on_error_line: Callable[[str], None] | None = None,
    ) -> int:
        """Run a command and hand over its lines as they come; returns the exit code. `stop` ends the connection.

        Without `on_error_line` both outputs go to `on_line`, in the order in which ssh has them; with it, that of lines
        of the one between lines of the other is not kept.
        """
        argv = ssh_argv(host, command, self.known_hosts)
        # Ctrl-C in a terminal goes to its whole process group: ssh gets a session of its own, so that we decide.
        process = _start(argv, merge_errors=on_error_line is None, own_session=True)
        watcher = threading.Thread(target=_kill_when, args=(process, stop), daemon=True)
        if stop is not None:
            watcher.start()
        handlers = {
            pipe: to for pipe, to in ((process.stdout, on_line), (process.stderr, on_error_line)) if pipe and to
        }
        try:
            for pipe, line in _lines(handlers):
                handlers[pipe](line)
            return process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pipe in handlers:
                pipe.close()

    def each(self, hosts: Sequence[Host], work: Callable[[Host], T]) -> list[T]:
        """Call `work` for every host side by side; results in the hosts' order."""
        if not hosts:
            return []
        with ThreadPoolExecutor(max_workers=min(MAX_PARALLEL, len(hosts))) as pool:
            return list(pool.map(work, hosts))

    def accept_new_key(self, host: Host) -> None:
        """Forget a host's recorded key and record the one it shows now. Raises HostError where it shows none."""
        entry = self.forget_key(host)
        # Without the user's own known_hosts, whose old key would refuse the new one; from then on ours is found first.
        options = connection_options(self.known_hosts, user_known_hosts=False)
        answer = _patiently(lambda: _call(["ssh", *options, *destination(host), "true"]))
        if not self.known_hosts.exists() or entry not in self.known_hosts.read_text(encoding="utf-8"):
            raise connection_error(host, answer.errors)

    def forget_key(self, host: Host) -> str:
        """Forget a host's recorded key; returns the name that it is recorded under."""
        entry = self._known_hosts_entry(host)
        if self.known_hosts.exists():
            _call(forget_key_argv(self.known_hosts, entry))
            # ssh-keygen keeps the old file beside it.
            self.known_hosts.with_name(self.known_hosts.name + ".old").unlink(missing_ok=True)
        return entry

    def _known_hosts_entry(self, host: Host) -> str:
        settings = dict(line.split(" ", 1) for line in _call(resolve_argv(host)).output.splitlines() if " " in line)
        name = settings.get("hostkeyalias") or settings.get("hostname") or host.address
        port = settings.get("port", "22")
        return name if port == "22" or "hostkeyalias" in settings else f"[{name}]:{port}"

    def install_key(self, host: Host, password: str) -> None:
        """Put this user's public key into the host's authorized_keys, getting in with a password this once."""
        key = self.public_key(host)
        script = (
            "umask 077; mkdir -p ~/.ssh && touch ~/.ssh/authorized_keys && key=$(cat) && "
            '{ grep -qxF "$key" ~/.ssh/authorized_keys || echo "$key" >> ~/.ssh/authorized_keys; }'
        )
        with _askpass(password) as environment:
            answer = self.run(host, ["sh", "-c", script], stdin=key.encode(), environment=environment, batch=False)
        if answer.exit_code:
            raise connection_error(host, answer.errors)

    def public_key(self, host: Host) -> str:
        """The first public key that ssh would offer this host, of a file or an agent. HostError where there is none."""
        lines = _call(resolve_argv(host)).output.splitlines()
        files = [line.split(" ", 1)[1] for line in lines if line.startswith("identityfile ")]
        for file in files:
            public = Path(file + ".pub").expanduser()
            if public.is_file():
                return public.read_text(encoding="utf-8").strip()
        offered = _call(["ssh-add", "-L"])
        if offered.exit_code == 0 and offered.output.startswith(("ssh-", "ecdsa-", "sk-")):
            return offered.output.splitlines()[0]
        raise HostError(
            f"There is no SSH key to put on {host.name}.",
            expected=f"one of {', '.join(file + '.pub' for file in files)}",
            found="none of them, and no key in an agent",
            next_command="ssh-keygen -t ed25519",
        )


def _patiently(connect: Callable[[], Answer]) -> Answer:
    """The answer of the first connection that is not dropped at its start, as a jump host's MaxStartups does."""
    for seconds in RETRY_SECONDS:
        answer = connect()
        if answer.exit_code != 255 or not is_dropped(answer.errors):
            return answer
        # Not all at once again: they were too many.
        time.sleep(seconds * random.uniform(0.5, 1.5))
    return connect()


@contextlib.contextmanager
def _askpass(password: str) -> Iterator[dict[str, str]]:
    """An environment in which ssh reads `password` from a file of ours: not from argv, not from its environment."""
    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        secret, program = Path(folder, "password"), Path(folder, "askpass")
        secret.touch(mode=0o600)
        secret.write_text(password + "\n", encoding="utf-8")
        program.write_text(f"#!/bin/sh\nexec cat {shlex.quote(str(secret))}\n", encoding="utf-8")
        program.chmod(stat.S_IRWXU)
        yield {
            "SSH_ASKPASS": str(program),
            "SSH_ASKPASS_REQUIRE": "force",
            # ssh before 8.4 asks the program only where a display is named.
            "DISPLAY": os.environ.get("DISPLAY", ":0"),
        }


def _start(
    argv: Sequence[str],
    *,
    stdin: bool = False,
    stdin_file: IO[bytes] | None = None,
    merge_errors: bool = False,
    own_session: bool = False,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            stdin=stdin_file or (subprocess.PIPE if stdin else subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge_errors else subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=own_session,
        )
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed here.", next_command="apt-get install openssh-client") from error


def _call(argv: Sequence[str]) -> Answer:
    process = _start(argv)
    output, errors = process.communicate()
    return Answer(process.returncode, output.decode(errors="replace"), errors.decode(errors="replace"))


def program_answers(*argv: str) -> bool:
    """Whether a program of this machine ends with 0; a missing one does not."""
    try:
        return subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def _lines(pipes: Iterable[IO[bytes]]) -> Iterator[tuple[IO[bytes], str]]:
    """The lines of all pipes as they come, each with its pipe."""
    begun: dict[IO[bytes], bytes] = {}
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ, pipe)
        while selector.get_map():
            for key, _ in selector.select():
                pipe = key.data
                data = os.read(key.fd, 1 << 16)
                *lines, rest = (begun.pop(pipe, b"") + data).split(b"\n")
                if data:
                    begun[pipe] = rest
                else:
                    selector.unregister(pipe)
                    lines += [rest] if rest else []
                for line in lines:
                    yield pipe, line.decode(errors="replace").rstrip("\r")


def _kill_when(process: subprocess.Popen[bytes], stop: threading.Event | None) -> None:
    assert stop is not None
    while process.poll() is None:
        if stop.wait(0.2):
            process.kill()
            return
