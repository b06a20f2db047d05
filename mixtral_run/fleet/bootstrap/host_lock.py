"""A lock on each host for the time of a bootstrap or teardown, so that two operators never change a host at once.

A process on the host holds it with `flock`, over an SSH connection that stays open. It ends with the connection, with
this process, and, if the network fails, when no sign of life has come for a minute. A file names the holder.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.plays.provisioning import collection_folder
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.ssh.problems import connection_error
from mixtral_run.fleet.ssh.streams import text_of
from mixtral_run.fleet.untrusted import one_line, parse_json
from mixtral_run.run_lock import Holder

FOLDER = "/run/mixtral-run"
"""Belongs to root, as the lock in it does: any user who can open a lock can hold it."""
SIGN_SECONDS, SILENT_SECONDS = 15, 60
ANSWER_SECONDS = 45
MAX_NOTE_BYTES = 4096
Taken = tuple["subprocess.Popen[bytes]", str, str]


def _script() -> str:
    """Return the program that takes the lock on a host. A play that runs without this process sends it as well."""
    return (collection_folder() / "plugins/plugin_utils/setup_lock.sh").read_text(encoding="utf-8")


@dataclass
class Held:
    """The locks of some hosts.

    problems: why a host is not to be set up now. notes: what the user should know of a host whose lock is held.
    locked: the hosts whose lock is held. lost: hosts whose lock another operator took in the meantime, after the
    network had failed.
    """

    problems: dict[Host, HostError] = field(default_factory=dict)
    notes: dict[Host, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    lost: dict[Host, HostError] = field(default_factory=dict)
    locked: list[Host] = field(default_factory=list)

    @property
    def variables(self) -> dict[str, list[str]]:
        """Return the variable of a play that names the hosts whose lock this process holds.

        The play takes the locks of all others. It alone knows how Ansible becomes root there, and with which password.
        """
        return {"mixtral_locked_hosts": [host.inventory_name for host in self.locked]}


@contextlib.contextmanager
def hold_locks(ssh: Ssh, hosts: Sequence[Host], command: str) -> Iterator[Held]:
    """Hold the lock of each host while the block runs.

    command: such as `mixtral-run bootstrap`. A host whose lock another operator holds is in `problems`. One whose lock
    cannot be taken without a password, or at all, is not in `locked`: the play takes it, or warns that it cannot.
    """
    held = Held()
    over = threading.Event()
    note = _note(command)
    mine: dict[int, Host] = {}
    take = partial(_take, ssh, note=note)
    signs = threading.Thread(target=_give_signs, args=(take, held, mine, over), daemon=True)
    try:
        for host, (process, kind, text) in zip(hosts, ssh.each(hosts, take), strict=True):
            held.processes.append(process)
            if kind == "held":
                mine[len(held.processes) - 1] = host
                held.locked.append(host)
            _sort(held, host, kind, text)
        signs.start()
        yield held
    finally:
        over.set()
        for process in held.processes:
            _close(process)
        for process in held.processes:
            _end(process)


def _note(command: str) -> str:
    holder = Holder.this_process(command)
    values = {"command": command, "user": getpass.getuser(), "host": holder.host, "pid": holder.pid}
    return json.dumps({**values, "since": holder.since})


def _take(ssh: Ssh, host: Host, note: str) -> Taken:
    """Start the process on the host that takes the lock. Return it, the first word of its answer, and the rest."""
    argv = ["sh", "-c", _script(), "lock", note, FOLDER, str(SILENT_SECONDS)]
    process = ssh.start(host, argv)
    assert process.stdout is not None
    late = threading.Timer(ANSWER_SECONDS, process.kill)
    late.start()
    try:
        answer = text_of(process.stdout.readline(MAX_NOTE_BYTES + 64)).strip()
    finally:
        late.cancel()
    kind, _, text = answer.partition(" ")
    if kind in ("held", "busy", "without"):
        return process, kind, text
    _end(process)
    assert process.stderr is not None
    return process, "failed" if process.returncode == 255 else "odd", text_of(process.stderr.read(1 << 16)) or answer


def _sort(held: Held, host: Host, kind: str, text: str) -> None:
    if kind == "busy":
        held.problems[host] = HostError(
            f"Another operator changes {host.name} now.",
            where=host.target,
            found=holder_text(text),
            next_command="wait for it to end, then the same command",
        )
    elif kind == "failed":
        held.problems[host] = connection_error(host, text)
    elif kind == "held" and text.strip():
        held.notes[host] = f"An earlier run was cut off before it had ended: {holder_text(text)}"


def holder_text(note: str) -> str:
    """Return who holds a lock, in words. The note comes from the host, which is not trusted."""
    try:
        values = parse_json(note)
        words = [one_line(values[name], 80) for name in ("command", "user", "host", "since")]
        pid = values["pid"]
        if type(pid) is not int or not all(words):
            raise ValueError(note)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "a holder that does not name itself"
    return f"{words[0]} by {words[1]}@{words[2]}, process {pid}, since {words[3]}"


def _give_signs(take: Callable[[Host], Taken], held: Held, mine: Mapping[int, Host], over: threading.Event) -> None:
    """Write a sign of life to each process, until `over`. mine: the host of each process that holds a lock.

    A lock whose connection ended, because its host rebooted or the network failed, is taken again.
    """
    taking: dict[int, threading.Thread] = {}
    while not over.wait(SIGN_SECONDS):
        for index, process in enumerate(held.processes):
            if index in mine and process.poll() is not None:
                if index not in taking or not taking[index].is_alive():
                    words = (take, mine[index], held, index, over)
                    taking[index] = threading.Thread(target=_take_again, args=words, daemon=True)
                    taking[index].start()
                continue
            assert process.stdin is not None
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(b".")
                process.stdin.flush()


def _take_again(take: Callable[[Host], Taken], host: Host, held: Held, index: int, over: threading.Event) -> None:
    process, kind, text = take(host)
    if kind == "held":
        held.processes[index] = process
    if kind == "busy" and host not in held.lost:
        held.lost[host] = HostError(
            f"Another operator took the lock of {host.name} while this run changed it.",
            where=host.target,
            expected="a connection that stays open; the host frees the lock a minute after it was cut",
            found=holder_text(text),
            next_command="wait for it to end, then the same command, because both runs may have changed the host",
        )
    if kind != "held" or over.is_set():
        _end(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    """Close the input of the process on the host, which then gives the lock back and ends."""
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):
        process.stdin.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    _close(process)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
