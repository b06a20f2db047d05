"""Atomic file writes, the kit's records of its changes to a host, and the form of its error messages."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import uuid

from .folders import naming, open_folder

RECORD_FOLDER = "/var/lib/mixtral-run"
"""Records of the kit's changes to this host, one JSON file per module. `state: absent` reverts only these changes."""


def read_text(path, default=None):
    """Return the text of a file, or `default` if it does not exist."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return default


def write_text(path, text, mode=0o644, owner=None):
    """Replace a file atomically: readers see the old or the new text, also after a crash. `owner`: (uid, gid).

    Raise UnsafePath if the path of its folder leads through a link of a user other than root.
    """
    folder = open_folder(os.path.dirname(path), make=True, mode=0o755)
    try:
        with naming(path):
            replace_in(folder, os.path.basename(path), text, mode, owner)
    finally:
        os.close(folder)


def rewrite(path, text, mode=0o644):
    """Replace the text of somebody's file and keep everything else: link, mode, owner, group and extended attributes.

    Extended attributes hold the context of SELinux and access lists. A file that does not exist gets `mode`.
    """
    real = os.path.realpath(path)
    try:
        now = os.stat(real)
    except FileNotFoundError:
        write_text(real, text, mode)
        return
    attributes = {}
    with contextlib.suppress(OSError):  # the file system may have none
        attributes = {name: os.getxattr(real, name) for name in os.listxattr(real)}
    # The folder of the path as given is opened too: a link of another user than root is refused.
    os.close(open_folder(os.path.dirname(path)))
    folder = open_folder(os.path.dirname(real))
    try:
        owner = (now.st_uid, now.st_gid)
        with naming(real):
            replace_in(folder, os.path.basename(real), text, stat.S_IMODE(now.st_mode), owner, attributes)
    finally:
        os.close(folder)


def replace_in(folder, name, text, mode=0o644, owner=None, attributes=None):
    """Replace a file in the folder of a descriptor, as write_text does. attributes: extended attributes by name.

    text: as text, or as bytes.
    """
    temporary = ".mixtral-run-" + uuid.uuid4().hex
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
            file.flush()
            os.fsync(file.fileno())
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            for attribute, value in (attributes or {}).items():
                os.setxattr(file.fileno(), attribute, value)
            os.fchmod(file.fileno(), mode)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise


def remove(path):
    """Remove a file. Return True if it existed."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


class Record:
    """JSON object in RECORD_FOLDER. Callers change `values` in place; `save()` writes it, except in check mode.

    mode: only root reads a record by default, because settings as found on the host may hold passwords. A record
    without secrets that `mixtral-run status` shows has 0644: status also reads hosts whose sudo asks for a password.
    """

    def __init__(self, name, folder=RECORD_FOLDER, check_mode=False, mode=0o600):
        self.path = os.path.join(folder, name + ".json")
        self._mode = mode
        self._check_mode = check_mode
        try:
            self.values = json.loads(read_text(self.path, "{}"))
        except ValueError:
            # An unreadable record counts as empty: `absent` then removes nothing, which is safe.
            self.values = {}

    def save(self):
        if self._check_mode:
            return
        if self.values:
            text = json.dumps(self.values, indent=2, sort_keys=True) + "\n"
            if text != read_text(self.path):
                write_text(self.path, text, mode=self._mode)
            elif stat.S_IMODE(os.stat(self.path).st_mode) != self._mode:  # an older version wrote it
                os.chmod(self.path, self._mode)
        else:
            remove(self.path)
            with contextlib.suppress(OSError):  # it holds other records, or models
                os.rmdir(os.path.dirname(self.path))


def explain(what, **parts):
    """Return an error message in the kit's form: what failed, then where, expected, found and next, one per line."""
    labels = (("where", "where"), ("expected", "expected"), ("found", "found"), ("next", "next_step"))
    lines = ["  {:<9} {}".format(label + ":", parts[key]) for label, key in labels if parts.get(key)]
    return "\n".join([what] + lines)
