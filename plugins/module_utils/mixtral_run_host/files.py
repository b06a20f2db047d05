"""Atomic file writes, the kit's records of its changes to a host, and the form of its error messages."""

from __future__ import annotations

import json
import os
import tempfile

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
    """Replace a file atomically: readers see the old or the new text, also after a crash. `owner`: (uid, gid)."""
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
    """Remove a file. Return True if it existed."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


class Record:
    """JSON object in RECORD_FOLDER. Callers change `values` in place; `save()` writes it, except in check mode."""

    def __init__(self, name, folder=RECORD_FOLDER, check_mode=False):
        self.path = os.path.join(folder, name + ".json")
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
                write_text(self.path, text, mode=0o600)
        else:
            remove(self.path)


def explain(what, **parts):
    """Return an error message in the kit's form: what failed, then where, expected, found and next, one per line."""
    labels = (("where", "where"), ("expected", "expected"), ("found", "found"), ("next", "next_step"))
    lines = ["  {:<9} {}".format(label + ":", parts[key]) for label, key in labels if parts.get(key)]
    return "\n".join([what] + lines)
