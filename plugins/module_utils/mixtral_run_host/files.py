"""Whole-file writes, and the records of what the kit put on a host."""

from __future__ import annotations

import json
import os
import tempfile

RECORD_FOLDER = "/var/lib/mixtral-run"
"""What the kit did to this host, one JSON file a module; `state: absent` takes back what is written here, no more."""


def read_text(path, default=None):
    """The text of a file; `default` where it does not exist."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return default


def write_text(path, text, mode=0o644, owner=None):
    """Replace a file in one step: a reader, or a crash, sees the old text or the new one. `owner`: (uid, gid)."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".mixtral-run-", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if owner is not None:
            os.chown(temporary, *owner)
        os.chmod(temporary, mode)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def remove(path):
    """Remove a file; returns whether there was one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


class Record:
    """A JSON object in RECORD_FOLDER. `values` is changed in place and written by `save()`, but not in check mode."""

    def __init__(self, name, folder=RECORD_FOLDER, check_mode=False):
        self.path = os.path.join(folder, name + ".json")
        self._check_mode = check_mode
        try:
            self.values = json.loads(read_text(self.path, "{}"))
        except ValueError:
            # A record that cannot be read is as good as none: nothing is taken back then, which harms nobody.
            self.values = {}

    def save(self):
        if self._check_mode:
            return
        if self.values:
            text = json.dumps(self.values, indent=2, sort_keys=True) + "\n"
            if text != read_text(self.path):
                write_text(self.path, text, mode=0o600)
        else:
            remove(self.path)


def explain(what, **parts):
    """One message of the kit's form: what failed, then where, expected, found, next, each on its line."""
    labels = (("where", "where"), ("expected", "expected"), ("found", "found"), ("next", "next_step"))
    lines = ["  {:<9} {}".format(label + ":", parts[key]) for label, key in labels if parts.get(key)]
    return "\n".join([what] + lines)
