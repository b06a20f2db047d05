"""Connections to hosts through the installed ssh client. Pure functions build the argument lists; only `_start` starts
processes.

Host keys are recorded in the kit's own known_hosts file: accepted at first contact, refused when they change. The
user's ~/.ssh/config applies to everything else (users, ports, jump hosts, keys). ~/.ssh/known_hosts is only read.

All output of hosts is returned without terminal control sequences (`untrusted.printable`).
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from mixtral_run.config.home_folder import expanded
from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.ssh.problems import connection_error, is_dropped, last_line
from mixtral_run.fleet.ssh.streams import AnswerTooLongError, LastBytes, communicate, drained, lines, text_of
from mixtral_run.fleet.state import state_folder

CONNECT_SECONDS = 10
MAX_PARALLEL = 64
RETRY_SECONDS = (1.0, 2.0, 4.0)
"""Approximate wait before each retry of a connection that was dropped before a command ran."""
T = TypeVar("T")


def known_hosts_file() -> Path:
    """Return the kit's own file of host keys."""
    return state_folder() / "known_hosts"


def connection_options(known_hosts: Path, *, batch: bool = True, user_known_hosts: bool = True) -> list[str]:
    """Return the ssh options for every connection of the kit, including those of Ansible."""
    files = f'"{known_hosts}"' + (f' "{Path.home() / ".ssh" / "known_hosts"}"' if user_known_hosts else "")
    found = [
        "-o", "StrictHostKeyChecking=accept-new",
        "-o", f"UserKnownHostsFile={files}",
        # `--accept-new-host-key` searches the file by name, and only this user can read the file.
        "-o", "HashKnownHosts=no",
        "-o", "UpdateHostKeys=no",
        "-o", f"ConnectTimeout={CONNECT_SECONDS}",
        "-o", "ServerAliveInterval=15",
        "-o", "ServerAliveCountMax=4",
        "-o", "LogLevel=ERROR",
    ]  # fmt: skip
    return ["-o", "BatchMode=yes", *found] if batch else found


def destination(host: Host) -> list[str]:
    """Return the ssh arguments that select the host, user, port and key."""
    return host.ssh_arguments


def ssh_argv(host: Host, command: Sequence[str], known_hosts: Path, *, batch: bool = True) -> list[str]:
    """Return `ssh … -- ADDRESS COMMAND`. sshd passes the command to a shell, so every word is quoted."""
    options = connection_options(known_hosts, batch=batch)
    return ["ssh", *options, *destination(host), shlex.join(command)]


def terminal_argv(host: Host, command: Sequence[str], known_hosts: Path, *, terminal: bool) -> list[str]:
    """Return `ssh_argv` for a command that reads this process's standard input. terminal: there is one to lend it."""
    program, *words = ssh_argv(host, command, known_hosts)
    return [program, "-t" if terminal else "-T", *words]


def resolve_argv(host: Host) -> list[str]:
    """Return the command that prints ssh's settings for a host after ~/.ssh/config. It opens no connection."""
    return ["ssh", "-G", *destination(host)]


def forget_key_argv(known_hosts: Path, entry: str) -> list[str]:
    """Return the command that removes an entry from a file of host keys."""
    return ["ssh-keygen", "-q", "-f", str(known_hosts), "-R", entry]


@dataclass(frozen=True)
class Answer:
    """Result of a command on a host. Both outputs are text without terminal control sequences."""

    exit_code: int
    output: str
    errors: str


class Ssh:
    """Connections to the hosts of a fleet. Safe to use from several threads."""

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
        """Run a command on a host and wait for its end.

        A failed connection gives exit code 255, a timeout 124. The connection is retried if sshd dropped it before the
        command could run.
        """
        argv = ssh_argv(host, command, self.known_hosts, batch=batch)
        return _patiently(lambda: self._run_once(argv, stdin, timeout_seconds, environment))

    @staticmethod
    def _run_once(
        argv: Sequence[str], stdin: bytes | None, timeout_seconds: float | None, environment: dict[str, str] | None
    ) -> Answer:
        process = _start(argv, stdin=stdin is not None, environment=environment, own_session=environment is not None)
        try:
            output, errors = communicate(process, stdin, timeout_seconds)
        except (subprocess.TimeoutExpired, AnswerTooLongError) as error:
            process.kill()
            process.wait()
            if isinstance(error, AnswerTooLongError):
                return Answer(1, "", str(error))
            return Answer(124, "", f"no answer within {timeout_seconds:g} s")
        except BaseException:
            process.kill()
            raise
        return Answer(process.returncode, text_of(output), text_of(errors))

    def check(
        self, host: Host, command: Sequence[str], *, stdin: bytes | None = None, timeout_seconds: float | None = 60
    ) -> str:
        """Run a command on a host and return its standard output. Raises HostError with its last line if it fails."""
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
        """Run a command on a host with a local file as its standard input. Raises HostError if the command fails."""
        argv = ssh_argv(host, command, self.known_hosts)
        with file.open("rb") as stream:
            process = _start(argv, stdin_file=stream)
            _, errors = process.communicate()
        if process.returncode:
            raise HostError(f"{file} could not be sent to {host.name}.", found=last_line(text_of(errors)))

    @contextlib.contextmanager
    def receive(self, host: Host, command: Sequence[str]) -> Iterator[IO[bytes]]:
        """Run a command on a host and yield its standard output as a stream.

        Raises:
            HostError: at the end of the context, if the command failed. Its last line explains a HostError that the
                context raised, and takes its place. A host that goes on sending after the context has ended is cut off.
        """
        process = _start(ssh_argv(host, command, self.known_hosts))
        assert process.stdout is not None
        assert process.stderr is not None
        # Read meanwhile: a command that fills the pipe of its standard error would wait without end.
        errors = LastBytes(process.stderr)
        problem: HostError | None = None
        try:
            yield process.stdout
        except HostError as error:
            problem = error
        except BaseException:
            process.kill()
            raise
        if not drained(process.stdout):
            process.kill()
            process.wait()
            raise problem or HostError(f"{host.name} sent more than was asked for.", where=host.target)
        if code := process.wait():
            if code == 255:
                raise connection_error(host, errors.text()) from problem
            found = last_line(errors.text())
            raise HostError(
                f"{host.name} did not send what was asked for.",
                where=host.target,
                found=found,
                next_command=f"{host.ssh_command()}, and look whether it is there and this user may read it",
            ) from problem
        if problem is not None:
            raise problem

    def start(self, host: Host, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command on a host, with pipes for its input and its two outputs, and return at once.

        Ctrl-C in a terminal does not reach it. Its output is not checked and holds what the host sends.
        """
        return _start(ssh_argv(host, command, self.known_hosts), stdin=True, own_session=True)

    def stream(
        self,
        host: Host,
        command: Sequence[str],
        on_line: Callable[[str], None],
        stop: threading.Event | None = None,
        on_error_line: Callable[[str], None] | None = None,
    ) -> int:
        """Run a command, pass each line of its output to `on_line` as it arrives, and return the exit code.

        A line that the host redrew with carriage returns arrives as one text with newlines.

        Args:
            stop: ends the connection when it is set.
            on_error_line: receives the lines of standard error. The order between the two outputs is then lost.
                Without it `on_line` receives both outputs, in the order in which ssh writes them.
        """
        argv = ssh_argv(host, command, self.known_hosts)
        # Ctrl-C in a terminal signals its whole process group. ssh gets its own session, so that this process decides.
        process = _start(argv, merge_errors=on_error_line is None, own_session=True)
        watcher = threading.Thread(target=_kill_when, args=(process, stop), daemon=True)
        if stop is not None:
            watcher.start()
        handlers = {
            pipe: to for pipe, to in ((process.stdout, on_line), (process.stderr, on_error_line)) if pipe and to
        }
        try:
            for pipe, line in lines(handlers):
                handlers[pipe](line)
            return process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pipe in handlers:
                pipe.close()

    def each(self, hosts: Sequence[Host], work: Callable[[Host], T]) -> list[T]:
        """Call `work` for all hosts in parallel and return the results in the order of the hosts."""
        if not hosts:
            return []
        with ThreadPoolExecutor(max_workers=min(MAX_PARALLEL, len(hosts))) as pool:
            return list(pool.map(work, hosts))

    def accept_new_key(self, host: Host) -> None:
        """Replace a host's recorded key with its current key. Raises HostError if the host presents no key."""
        entry = self.forget_key(host)
        # ~/.ssh/known_hosts is left out: an old key in it would refuse the new one. Later connections find the new key
        # first, because the kit's file is listed first.
        options = connection_options(self.known_hosts, user_known_hosts=False)
        answer = _patiently(lambda: _call(["ssh", *options, *destination(host), "true"]))
        if not self.known_hosts.exists() or entry not in self.known_hosts.read_text(encoding="utf-8"):
            raise connection_error(host, answer.errors)

    def forget_key(self, host: Host) -> str:
        """Remove a host's recorded key and return the name under which keys of the host are recorded."""
        entry = self._known_hosts_entry(host)
        if self.known_hosts.exists():
            _call(forget_key_argv(self.known_hosts, entry))
            # ssh-keygen leaves the previous file next to the new one.
            self.known_hosts.with_name(self.known_hosts.name + ".old").unlink(missing_ok=True)
        return entry

    def _known_hosts_entry(self, host: Host) -> str:
        settings = dict(line.split(" ", 1) for line in _call(resolve_argv(host)).output.splitlines() if " " in line)
        name = settings.get("hostkeyalias") or settings.get("hostname") or host.address
        port = settings.get("port", "22")
        return name if port == "22" or "hostkeyalias" in settings else f"[{name}]:{port}"

    def install_key(self, host: Host, password: str) -> None:
        """Add this user's public key to the host's authorized_keys over one connection with a password."""
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
        """Return the first public key that ssh would offer the host, from a file or an agent.

        Raises HostError if there is none.
        """
        lines = _call(resolve_argv(host)).output.splitlines()
        files = [line.split(" ", 1)[1] for line in lines if line.startswith("identityfile ")]
        for file in files:
            public = expanded(file + ".pub")
            if public.is_file():
                return public.read_text(encoding="utf-8").strip()
        offered = _call(["ssh-add", "-L"])
        if offered.exit_code == 0 and offered.output.startswith(("ssh-", "ecdsa-", "sk-")):
            return offered.output.splitlines()[0]
        raise HostError(
            f"There is no SSH key to install on {host.name}.",
            expected=f"one of {', '.join(file + '.pub' for file in files)}",
            found="none of them, and no key in an agent",
            next_command="ssh-keygen -t ed25519",
        )


def _patiently(connect: Callable[[], Answer]) -> Answer:
    """Connect, again if sshd drops the connection at its start (MaxStartups), and return the last answer."""
    for seconds in RETRY_SECONDS:
        answer = connect()
        if answer.exit_code != 255 or not is_dropped(answer.errors):
            return answer
        # Spread in time: too many connections at once were the reason.
        time.sleep(seconds * random.uniform(0.5, 1.5))
    return connect()


@contextlib.contextmanager
def _askpass(password: str) -> Iterator[dict[str, str]]:
    """Yield an environment in which ssh reads `password` from a private file, not from argv or a variable."""
    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        secret, program = Path(folder, "password"), Path(folder, "askpass")
        secret.touch(mode=0o600)
        secret.write_text(password + "\n", encoding="utf-8")
        program.write_text(f"#!/bin/sh\nexec cat {shlex.quote(str(secret))}\n", encoding="utf-8")
        program.chmod(stat.S_IRWXU)
        yield {
            "SSH_ASKPASS": str(program),
            "SSH_ASKPASS_REQUIRE": "force",
            # ssh before 8.4 calls the program only if DISPLAY is set.
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
    return Answer(process.returncode, text_of(output), text_of(errors))


def program_answers(*argv: str) -> bool:
    """Return True if a local program exits with code 0 within a minute. A missing program gives False."""
    try:
        return subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def _kill_when(process: subprocess.Popen[bytes], stop: threading.Event | None) -> None:
    assert stop is not None
    while process.poll() is None:
        if stop.wait(0.2):
            process.kill()
            return
