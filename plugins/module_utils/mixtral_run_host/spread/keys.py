"""The lines of authorized_keys that let other hosts read files of this host for a limited time."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import inspect
import os
import pwd
import re
import tempfile
import time

from ..commands import last_lines, run
from ..files import RECORD_FOLDER, read_text, remove, write_text
from . import serve
from .peer import forget_keys

PROGRAMS = os.path.join(RECORD_FOLDER, "serve-files")
"""One program for each line: without it, the line allows nothing."""
PREFIX = "mixtral-run-copy-for-"


class Doors:
    """The lines of the kit in the authorized_keys of one user. Raise KeyError if there is no such user."""

    def __init__(self, name):
        self.name = name or os.environ.get("SUDO_USER") or "root"
        self._user = pwd.getpwnam(self.name)
        self._file = os.path.join(self._user.pw_dir, ".ssh", "authorized_keys")
        self.gid = self._user.pw_gid

    def open(self, asker, folder, rate, hours, most):
        """Let `asker` read the files of `folder`. Return its private key, and the reason if it gets none.

        rate: bytes per second, 0 for no limit. most: hosts that may read at once; beyond that, `asker` is refused.
        """
        program = _program(asker)
        write_text(program, inspect.getsource(serve), mode=0o755)
        private, public = _key_pair(_mark(asker))
        if private is None:
            return None, public
        until = time.strftime("%Y%m%d%H%MZ", time.gmtime(time.time() + hours * 3600))
        command = "/usr/bin/env python3 {} {} {}".format(program, folder, rate)
        line = 'restrict,expiry-time="{}",command="{}" {}\n'.format(until, command, public)
        busy = self._rewrite(lambda text: _without(text, _mark(asker)), line, most)
        if busy:
            remove(program)
            return None, "it serves {} already: {}".format(len(busy), ", ".join(busy))
        return private, None

    def close(self, asker):
        """Take the key of `asker` back. Return True if there was one."""
        removed = remove(_program(asker))
        return self._changes(lambda text: _without(text, _mark(asker))) or removed

    def close_all(self):
        """Take back all keys that a killed run left. Return True if there was one."""
        programs = glob.glob(os.path.join(PROGRAMS, PREFIX + "*.py"))
        for program in programs:
            remove(program)
        with contextlib.suppress(OSError):
            os.rmdir(PROGRAMS)
        return self._changes(lambda text: _without(text)) or bool(programs)

    def open_for(self):
        """Return the names of the hosts that can read now."""
        return _askers(read_text(self._file) or "")

    def _changes(self, edit):
        before = read_text(self._file)
        # Nothing of another user's is locked or written for a line that is not there.
        if before is None or edit(before) == before:
            return False
        self._rewrite(edit)
        return True

    def _rewrite(self, edit, line="", most=None):
        """Replace the text of the file by edit(text) and `line`, unless `most` others can read: then return them.

        Several hosts may ask at the same time, in separate processes. A lock on the folder makes them wait.
        """
        folder = os.path.dirname(self._file)
        missing = not os.path.isdir(folder)
        if missing:
            os.makedirs(folder, mode=0o700, exist_ok=True)
        # The user can replace the new folder by a link before it gets its owner.
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (os.O_NOFOLLOW if missing else 0))
        try:
            if missing:
                os.fchown(lock, self._user.pw_uid, self._user.pw_gid)
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = read_text(self._file) or ""
            kept = edit(text)
            busy = _askers(kept)
            if most is not None and len(busy) >= most:
                return busy
            if line and kept and not kept.endswith("\n"):
                kept += "\n"
            if kept + line != text:
                owner = (self._user.pw_uid, self._user.pw_gid)  # sshd reads the file as this user, at any time
                write_text(os.path.realpath(self._file), kept + line, mode=0o600, owner=owner)
            return []
        finally:
            os.close(lock)


def forget_copies(user):
    """Take back the keys that a killed run left on this host, also its private key of a copy. Return True if there were any."""
    forget_keys()
    try:
        return Doors(user).close_all()
    except KeyError:
        return False


def host_keys():
    """Return the public SSH host keys of this host: type and key."""
    found = (read_text(path) for path in sorted(glob.glob("/etc/ssh/ssh_host_*_key.pub")))
    return [" ".join(text.split()[:2]) for text in found]


def _mark(asker):
    return PREFIX + re.sub(r"[^\w.-]", "-", asker)


def _program(asker):
    return os.path.join(PROGRAMS, _mark(asker) + ".py")


def _without(text, mark=None):
    """Return the text without the line of one mark; without a mark, without all lines of the kit."""

    def is_ours(line):
        last = (line.split() or [""])[-1]
        return last == mark if mark else last.startswith(PREFIX)

    return "".join(line for line in text.splitlines(True) if not is_ours(line))


def _askers(text):
    """Return the hosts whose lines have not expired."""
    now = time.strftime("%Y%m%d%H%MZ", time.gmtime())
    found = re.findall(r'^restrict,expiry-time="(\d{12}Z)",command=.* ' + PREFIX + r"(\S+)$", text, re.MULTILINE)
    return [name for until, name in found if until > now]


def _key_pair(mark):
    """Return the private and the public half of a new key, or None and the error message."""
    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        path = os.path.join(folder, "key")
        made = run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", mark, "-f", path])
        if made.code:
            return None, "ssh-keygen: " + last_lines(made, 3)
        return read_text(path), read_text(path + ".pub").strip()
