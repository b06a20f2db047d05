"""The lines of authorized_keys that let other hosts read files of this host for a limited time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import inspect
import os
import pwd
import re
import stat
import tempfile
import time

from ..commands import last_lines, run
from ..files import RECORD_FOLDER, read_text, remove, replace_in, write_text
from ..folders import naming, open_file, open_folder
from . import serve
from .peer import forget_keys

PROGRAMS = os.path.join(RECORD_FOLDER, "serve-files")
"""One program for each line: without it, the line allows nothing."""
PREFIX = "mixtral-run-copy-for-"
"""A mark is this, the name of the run that created the key, `+`, and the host that the key is for."""
_NAME = "authorized_keys"


class UnsafeKeys(OSError):
    """The authorized_keys of a user are none that root may write."""

    def __init__(self, path, why):
        super().__init__(errno.EPERM, why, path)


class Doors:
    """The lines of the kit in the authorized_keys of one user. Raise KeyError if there is no such user.

    name: user. run: this run of Ansible. Only the run that created a key takes the key back while it can be in use: with
    the strategies free and host_pinned, a source may look for keys of killed runs while another host is about to copy.
    The user owns the folder and can put links into it, so root follows none: it would give its target to the user.
    """

    def __init__(self, name, run=""):
        self._run = _plain(run)
        self.name = name or os.environ.get("SUDO_USER") or "root"
        self._user = pwd.getpwnam(self.name)
        self._folder = os.path.join(self._user.pw_dir, ".ssh")
        self._path = os.path.join(self._folder, _NAME)
        self.gid = self._user.pw_gid

    def open(self, asker, folder, rate, hours, most):
        """Let `asker` read the files of `folder`. Return its private key, and the reason if it gets none.

        rate: bytes per second, 0 for no limit. most: hosts that may read at once; beyond that, `asker` is refused.
        """
        mark = self._mark(asker)
        program = _program(mark)
        private, public = _key_pair(mark)
        if private is None:
            return None, public
        write_text(program, program_text(folder, rate), mode=0o755)
        # Only words that the kit chose: sshd, and then the user's shell, take it apart.
        command = "/usr/bin/env python3 " + program
        until = _clock(time.time() + hours * 3600)
        line = 'restrict,expiry-time="{}",command="{}" {}\n'.format(until, command, public)
        try:
            # A host is in one run at a time, because of its lock: older keys of it are those of a killed run.
            busy = self._rewrite(lambda text: _without(text, lambda _, name: name == _plain(asker)), line, most)
        except OSError as error:
            remove(program)
            return None, "{}: {}".format(error.filename or self._path, error.strerror)
        if busy:
            remove(program)
            return None, "it serves {} already: {}".format(len(busy), ", ".join(busy))
        return private, None

    def close(self, asker):
        """Take back the key that this run created for `asker`. Return True if there was one."""
        mark = self._mark(asker)
        removed = remove(_program(mark))
        return self._changes(lambda text: _without(text, lambda run, name: _joined(run, name) == mark)) or removed

    def close_all(self):
        """Take back all keys. Return True if there was one."""
        removed = _remove_programs(lambda _: True)
        with contextlib.suppress(OSError):
            os.rmdir(PROGRAMS)
        return self._changes(_without_any) or removed

    def close_left(self, askers):
        """Take back the keys that have expired, and those that killed runs left for `askers`. Return True if there was one.

        The keys of this run stay, and those of other hosts: another play may use them at this moment.
        """
        names = {_plain(asker) for asker in askers}

        def is_left(run, name):
            return run != self._run and name in names

        removed = _remove_programs(lambda mark: is_left(*_parts(mark)))
        return self._changes(lambda text: _without(text, is_left)) or removed

    def open_for(self):
        """Return the names of the hosts that can read now."""
        return _askers(self._read() or "")

    def _changes(self, edit):
        before = self._read()
        # Nothing of another user's is locked or written for a line that is not there.
        if before is None or edit(before) == before:
            return False
        self._rewrite(edit)
        return True

    def _read(self):
        """Return the text of the file, or None if there is none that the kit would have written to."""
        try:
            folder = self._open_folder()
        except OSError:
            return None
        try:
            return self._text(folder)[0]
        except UnsafeKeys:
            return None
        finally:
            os.close(folder)

    def _rewrite(self, edit, line="", most=None):
        """Replace the text of the file by edit(text) and `line`, unless `most` others can read: then return them.

        Several hosts may ask at the same time, in separate processes. A lock on the folder makes them wait.
        """
        folder = self._open_folder(make=True)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            text, mode, owner, attributes = self._text(folder)
            kept = edit(text or "")
            busy = _askers(kept)
            if most is not None and len(busy) >= most:
                return busy
            if line and kept and not kept.endswith("\n"):
                kept += "\n"
            if kept + line != (text or ""):
                # sshd reads the file as this user, at any time.
                with naming(self._path):
                    replace_in(folder, _NAME, kept + line, mode, owner, attributes)
            gone = set(_marks(text or "")) - set(_marks(kept + line))
            _remove_programs(lambda mark: mark in gone)
            return []
        finally:
            os.close(folder)

    def _mark(self, asker):
        return _joined(self._run, _plain(asker))

    def _open_folder(self, make=False):
        """Open the folder of the keys; create it for its user if it is missing. Raise OSError without a home."""
        try:
            folder = open_folder(self._folder)
        except FileNotFoundError:
            if not make:
                raise
            home = open_folder(self._user.pw_dir)
            try:
                with naming(self._folder):
                    with contextlib.suppress(FileExistsError):  # another process created it at the same time
                        os.mkdir(os.path.basename(self._folder), mode=0o700, dir_fd=home)
                    # The user can replace the new folder by a link before it gets its owner.
                    folder = os.open(".ssh", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=home)
            finally:
                os.close(home)
            if os.listdir(folder) == []:
                os.fchown(folder, self._user.pw_uid, self._user.pw_gid)
        if os.fstat(folder).st_uid not in (0, self._user.pw_uid):
            os.close(folder)
            raise UnsafeKeys(self._folder, "it belongs to another user than {}".format(self.name))
        return folder

    def _text(self, folder):
        """Return text, mode, owner and extended attributes of the file; None and those of a new one if it is missing."""
        try:
            handle = open_file(_NAME, folder)
        except FileNotFoundError:
            return None, 0o600, (self._user.pw_uid, self._user.pw_gid), {}
        if handle is None:
            raise UnsafeKeys(
                self._path, "it is a link or no regular file, and root writes only a file; replace the link"
            )
        with os.fdopen(handle, "rb") as file:
            now = os.fstat(handle)
            if now.st_uid not in (0, self._user.pw_uid) or now.st_nlink != 1:
                raise UnsafeKeys(self._path, "it has a second name, or belongs to another user than " + self.name)
            attributes = {}
            with contextlib.suppress(OSError):  # the file system may have none
                attributes = {name: os.getxattr(handle, name) for name in os.listxattr(handle)}
            try:
                text = file.read().decode()
            except UnicodeDecodeError as error:
                raise UnsafeKeys(self._path, "it is not in UTF-8") from error
            return text, stat.S_IMODE(now.st_mode), (now.st_uid, now.st_gid), attributes


def program_text(folder, rate):
    """Return the program that serves the files of one folder. rate: bytes per second, 0 for no limit."""
    before = 'SERVED = ("", 0)\n'
    source = inspect.getsource(serve)
    assert before in source
    return source.replace(before, "SERVED = ({!a}, {:d})\n".format(folder, rate), 1)


def forget_copies(user, run, askers):
    """Take back what a killed run left on this host: keys, also its private key of a copy. Return True if there was any.

    run: this run, whose keys stay. askers: hosts of this play, whose locks it holds, so that no other play copies for
    them.
    """
    forget_keys()
    try:
        return Doors(user, run).close_left(askers)
    except KeyError:
        return False


def host_keys():
    """Return the public SSH host keys of this host: type and key."""
    found = (read_text(path) for path in sorted(glob.glob("/etc/ssh/ssh_host_*_key.pub")))
    return [" ".join(text.split()[:2]) for text in found]


def _plain(name):
    """Return a name in letters that no shell and no sshd takes for its own, and that do not end a part of a mark."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)


def _joined(run, name):
    return "{}{}+{}".format(PREFIX, run, name)


def _parts(mark):
    """Return the run and the host of a mark. An older kit named no run."""
    run, plus, name = mark[len(PREFIX) :].partition("+")
    return (run, name) if plus else ("", run)


def _program(mark):
    return os.path.join(PROGRAMS, mark + ".py")


def _remove_programs(is_gone):
    """Remove the programs whose marks are gone. Return True if there was one."""
    found = glob.glob(os.path.join(PROGRAMS, PREFIX + "*.py"))
    found = [path for path in found if is_gone(os.path.basename(path)[:-3])]
    for path in found:
        remove(path)
    return bool(found)


def _is_ours(line):
    return (line.split() or [""])[-1].startswith(PREFIX)


def _marks(text):
    return [line.split()[-1] for line in text.splitlines() if _is_ours(line)]


def _without_any(text):
    return "".join(line for line in text.splitlines(True) if not _is_ours(line))


def _without(text, is_gone):
    """Return the text without the lines for which is_gone(run, host) is true, and without those that have expired."""
    live = {mark for mark in _live(text) if not is_gone(*_parts(mark))}
    return "".join(line for line in text.splitlines(True) if not _is_ours(line) or line.split()[-1] in live)


def _clock(seconds):
    """Return a time as sshd reads it: the local time of the host. Before OpenSSH 9.1 it takes no other, such as UTC.

    sshd has no TZ of a user's session.
    """
    before = os.environ.pop("TZ", None)
    time.tzset()
    try:
        return time.strftime("%Y%m%d%H%M", time.localtime(seconds))
    finally:
        if before is not None:
            os.environ["TZ"] = before
        time.tzset()


def _askers(text):
    """Return the hosts whose lines have not expired."""
    return [_parts(mark)[1] for mark in _live(text)]


def _live(text):
    """Return the marks of the lines that have not expired."""
    now = _clock(time.time())
    found = re.findall(r'^restrict,expiry-time="(\d{12})",command=.* (' + PREFIX + r"\S+)$", text, re.MULTILINE)
    return [mark for until, mark in found if until > now]


def _key_pair(mark):
    """Return the private and the public half of a new key, or None and the error message."""
    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        path = os.path.join(folder, "key")
        made = run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", mark, "-f", path])
        if made.code:
            return None, "ssh-keygen: " + last_lines(made, 3)
        return read_text(path), read_text(path + ".pub").strip()
