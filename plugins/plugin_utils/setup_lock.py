"""The lock of a host for a play that `ansible-playbook` runs: one task takes it, another gives it back.

Each task runs in a process that ends with it, so a shell of its own keeps the lock, over a connection that multiplexes
with the play's. It gives the host a sign of life every 5 s while Ansible's main process lives, and takes the lock
again after a reboot. The file with its process id is in the folder that Ansible removes at its end.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("setup_lock.sh")
FOLDER = "/run/mixtral-run"
SILENT_SECONDS = 60
ANSWER_SECONDS, RELEASE_SECONDS = 45, 5
MAX_NOTE_BYTES = 4096
DEAD_SECONDS = 15
"""How long to wait for the lock of a run of this machine that was killed: until its next sign of life would be due."""
KEEPER = r"""
trap '' PIPE
main=$1 file=$2; shift 2
IFS= read -r password
signs='echo $$ >"$2"; while kill -0 "$1" 2>/dev/null; do echo . || exit; sleep 5 >/dev/null; done'
secret() { [ -z "$password" ] || printf '%s\n' "$password"; }
hold() { { secret; exec sh -c "$signs" signs "$main" "$file"; } | "$@"; rm -f "$file"; }
hold "$@"
while sleep 10 >/dev/null; [ -e "$file.wanted" ] && kill -0 "$main" 2>/dev/null; do
    note="$(hold "$@" 2>/dev/null | sed -n 's/^busy //p' | head -c 4096)"
    [ -z "$note" ] || [ -e "$file.lost" ] || printf '%s' "$note" >"$file.lost"
done
"""
"""$1: Ansible's main process. $2: the file for the id of the process whose end gives the lock back. Then the command
that runs SCRIPT on the host. The only line of standard input is the password for sudo, or empty. `sleep` must not hold
the pipe open when its parent is killed. The shell reports that kill
to a reader that has ended long ago, and must not end by it. FILE.lost gets the note of another operator who took the
lock while the connection was cut."""


def operator():
    """Return the user and the machine from which this play runs."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return user, socket.gethostname()


def take(connection, file, command):
    """Take the lock of a host. Return (why it is refused, what to warn of), of which at most one is not empty.

    connection: Ansible's, after it was used once. file: where to keep who holds it here. command: for the note.
    """
    user, machine = operator()
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    main = os.getppid()
    note = json.dumps({"command": command, "user": user, "host": machine, "pid": main, "since": since})
    words = ["sh", "-c", SCRIPT.read_text(encoding="utf-8"), "lock", note, FOLDER, str(SILENT_SECONDS)]
    password = _password(connection)
    words += ["password"] if password else []
    argv = _argv(connection, words)
    if argv is None:
        return "", f"Two operators are not kept apart here: connection {connection.transport} has no lock"
    until = time.monotonic() + DEAD_SECONDS
    while True:
        Path(f"{file}.wanted").touch()
        answer = _answer(["sh", "-c", KEEPER, "keeper", str(main), str(file), *argv], password)
        kind, _, text = answer.partition(" ")
        if kind != "held":
            give_back(file)
        if kind != "busy" or not _is_dead(text) or time.monotonic() > until:
            break
        time.sleep(1)
    if kind == "busy":
        return holder(text), ""
    if kind == "held":
        return "", f"An earlier run was cut off before it had ended: {holder(text)}" if text.strip() else ""
    why, method = plain(text if kind == "without" else answer) or "no answer", _method(connection)
    if method not in ("", "sudo"):
        why = f"become method {method} has no lock; without its password: {why}"
    return "", f"Two operators are not kept apart here: {why}"


def give_back(file):
    """Give a lock back that `take` took, and wait until the host has it back."""
    Path(f"{file}.wanted").unlink(missing_ok=True)
    with contextlib.suppress(OSError, ValueError):
        # Ansible's workers ignore SIGTERM, and so do the processes that they start.
        os.kill(int(file.read_text(encoding="ascii")), signal.SIGKILL)
        until = time.monotonic() + RELEASE_SECONDS
        while file.exists() and time.monotonic() < until:
            time.sleep(0.02)


def lost_to(file):
    """Return who took the lock in the meantime, after the connection had been cut; None if it was not lost."""
    try:
        return holder(Path(f"{file}.lost").read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None


def holder(note):
    """Return who holds a lock, in words. The note comes from the host, which is not trusted."""
    try:
        values = json.loads(note)
        command, user, host, since = (plain(values[name]) for name in ("command", "user", "host", "since"))
        pid = int(values["pid"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "a holder that does not name itself"
    return f"{command} by {user}@{host}, process {pid}, since {since}"


def _is_dead(note):
    """Return True if the holder was a process of this machine that no longer lives."""
    try:
        values = json.loads(note)
        if values["host"] != socket.gethostname():
            return False
        os.kill(int(values["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return False
    return False


def plain(text):
    """Return a text of a host on one line, short, and without control characters."""
    if not isinstance(text, str):
        raise TypeError(text)
    return "".join(letter for letter in text if letter.isprintable())[:120].strip()


def _argv(connection, words):
    """Return the local command that runs words on the host; None for a connection that is neither SSH nor local."""
    transport = str(connection.transport).rpartition(".")[2]
    if transport == "local":
        return words
    if transport != "ssh" or not hasattr(connection, "_build_command"):
        return None
    client, host = connection.get_option("ssh_executable"), connection.get_option("host")
    argv = connection._build_command(client, "ssh", "-o", "BatchMode=yes", host, shlex.join(words))
    argv = [os.fsdecode(each) for each in argv]
    # The connection of the play has been opened already, with its password.
    return argv[2:] if argv[0] == "sshpass" else argv


def _method(connection):
    """Return how the play becomes root, such as sudo or su; an empty text if it logs in as root."""
    become = getattr(connection, "become", None)
    return str(become.name).rpartition(".")[2] if become else ""


def _password(connection):
    """Return the password of the play for sudo, or an empty text. Root holds the lock, so sudo may ask for it.

    The password of another method, such as that of root for su, must not reach sudo.
    """
    return str(connection.become.get_option("become_pass") or "") if _method(connection) == "sudo" else ""


def _answer(argv, password=""):
    """Start a process that outlives this one, and return the line of its output that answers; the last one without it.

    ssh may print warnings before it. password: the first line of the input of the process.
    """
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(f"{password}\n".encode())
    found, until = b"", time.monotonic() + ANSWER_SECONDS
    while len(found) < 4 * MAX_NOTE_BYTES:
        if not select.select([process.stdout], [], [], max(0, until - time.monotonic()))[0]:
            os.killpg(process.pid, signal.SIGKILL)
            return f"no answer within {ANSWER_SECONDS} s"
        data = os.read(process.stdout.fileno(), MAX_NOTE_BYTES)
        found += data
        lines = found.decode(errors="replace").split("\n")
        for line in lines[:-1]:
            if line.partition(" ")[0] in ("held", "busy", "without"):
                return line.strip()
        if not data:
            break
    return found.decode(errors="replace").strip().rpartition("\n")[2]
