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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.ssh.problems import connection_error, last_line
from mixtral_run.fleet.ssh.streams import text_of
from mixtral_run.fleet.untrusted import one_line, parse_json
from mixtral_run.run_lock import Holder

FOLDER = "/run/lock"
"""Every user of a host may create files here, and nobody may remove those of others."""
SIGN_SECONDS, SILENT_SECONDS = 15, 60
ANSWER_SECONDS = 45
MAX_NOTE_BYTES = 4096
SCRIPT = r"""
file="${MIXTRAL_RUN_LOCK_FOLDER:-$2}/mixtral-run-setup.lock"
command -v flock >/dev/null || { echo "without flock is not installed"; exit 0; }
[ -e "$file" ] || (umask 0; set -C; : > "$file") 2>/dev/null
if [ -L "$file" ] || [ ! -f "$file" ] || [ ! -r "$file" ]; then echo "without $file cannot be opened"; exit 0; fi
exec 9<"$file"
note="$(head -c 4096 "$file" | tr '\n' ' ')"
flock -n 9 || { echo "busy $note"; exit 0; }
write() { dd of="$file" conv=nocreat oflag=nofollow status=none 2>/dev/null; }
printf '%s' "$1" | write
trap : HUP TERM INT PIPE
echo "held $note"
while [ -n "$(timeout "$3" dd bs=64 count=1 status=none)" ]; do :; done
write </dev/null
"""
"""$1: the note of the new holder. $2: the folder of the lock. $3: seconds without a sign of life after which it ends.
"""


@dataclass
class Held:
    """The locks of some hosts.

    problems: why a host is not to be set up now. notes: what the user should know of a host, whose lock is held or
    cannot be.
    """

    problems: dict[Host, HostError] = field(default_factory=dict)
    notes: dict[Host, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)


@contextlib.contextmanager
def hold_locks(ssh: Ssh, hosts: Sequence[Host], command: str) -> Iterator[Held]:
    """Hold the lock of each host while the block runs. command: such as `mixtral-run bootstrap`.

    A host whose lock another operator holds is in `problems`. One that has no locks is in `notes` and stays unlocked.
    """
    held = Held()
    over = threading.Event()
    signs = threading.Thread(target=_give_signs, args=(held.processes, over), daemon=True)
    note = _note(command)
    try:
        for host, (process, kind, text) in zip(
            hosts, ssh.each(hosts, lambda host: _take(ssh, host, note)), strict=True
        ):
            held.processes.append(process)
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


def _take(ssh: Ssh, host: Host, note: str) -> tuple[subprocess.Popen[bytes], str, str]:
    """Start the process on the host that takes the lock. Return it, the first word of its answer, and the rest."""
    argv = ["sh", "-c", SCRIPT, "lock", note, FOLDER, str(SILENT_SECONDS)]
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
    elif kind == "without":
        held.notes[host] = f"Two operators are not kept apart here: {one_line(text)}"
    elif kind == "odd":
        held.notes[host] = f"Two operators are not kept apart here: {one_line(last_line(text)) or 'no answer'}"
    elif text.strip():
        held.notes[host] = f"An earlier run was cut off before it had ended: {holder_text(text)}"


def holder_text(note: str) -> str:
    """Return who holds a lock, in words. Any user of the host may have written the note."""
    try:
        values = parse_json(note)
        words = [one_line(values[name], 80) for name in ("command", "user", "host", "since")]
        pid = values["pid"]
        if type(pid) is not int or not all(words):
            raise ValueError(note)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "a holder that does not name itself"
    return f"{words[0]} by {words[1]}@{words[2]}, process {pid}, since {words[3]}"


def _give_signs(processes: Sequence[subprocess.Popen[bytes]], over: threading.Event) -> None:
    while not over.wait(SIGN_SECONDS):
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(b".")
                process.stdin.flush()


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
