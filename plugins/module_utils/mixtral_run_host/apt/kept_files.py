"""Configuration files of somebody that a removal of packages would delete: kept in the record, and put back."""

from __future__ import annotations

import base64
import hashlib
import os
import stat

from ..commands import run
from ..files import write_text

# `dpkg --purge` deletes these copies next to a configuration file too. Those of dpkg itself (.dpkg-dist) may go.
COPIES = ("~", ".bak", "%", ".dpkg-old")


def conffiles(names):
    """Return {path: MD5 of the content that the package ships} for the configuration files of packages."""
    if not names:
        return {}
    answer = run(["dpkg-query", "--show", "--showformat", "${Conffiles}\n"] + sorted(names))
    rows = [line.split() for line in answer.out.splitlines() if line.startswith(" /")]
    return {row[0]: row[1] for row in rows if len(row) > 1}


class KeptFiles:
    """Files of a section of the record with content, mode, owner and link, so that they survive a removal.

    The record is readable by root only, as the files may be.
    """

    def __init__(self, record, section):
        self._record, self._key = record, section + "_files"

    @property
    def paths(self):
        """Return the paths of the files that are kept."""
        return sorted(self._record.values.get(self._key, {}))

    def note(self, paths):
        """Keep files as they are now. The caller saves the record before it changes packages."""
        found = {path: _read(path) for path in paths}
        found = {path: kept for path, kept in found.items() if kept}
        if found:
            self._record.values.setdefault(self._key, {}).update(found)

    def note_changed(self, names):
        """Keep the configuration files of packages that are not as the packages ship them: somebody wrote them."""
        for path, shipped in sorted(conffiles(names).items()):
            copies = [path + ending for ending in COPIES if os.path.lexists(path + ending)]
            self.note(copies + ([path] if _digest(path) not in (None, shipped) else []))

    def restore(self):
        """Write the kept files that are missing. Return their paths. A file that exists stays as it is."""
        restored = []
        for path, kept in sorted(self._record.values.get(self._key, {}).items()):
            if kept["data"] is not None and not os.path.lexists(kept["real"]):
                content = base64.b64decode(kept["data"])
                write_text(kept["real"], content, kept["mode"], (kept["uid"], kept["gid"]))
                restored.append(path)
            if kept["link"] is not None and not os.path.lexists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.symlink(kept["link"], path)
        return restored

    def forget(self):
        """Take the files out of the record."""
        self._record.values.pop(self._key, None)


def _read(path):
    """Return what restores a file, or None if there is none. A link is kept with its target and the target's content."""
    try:
        link = os.readlink(path) if stat.S_ISLNK(os.lstat(path).st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    kept = {"link": link, "real": os.path.realpath(path), "data": None}
    try:
        with open(path, "rb") as file:
            now = os.fstat(file.fileno())
            kept["data"] = base64.b64encode(file.read()).decode()
    except (FileNotFoundError, IsADirectoryError):
        return kept if link is not None else None
    kept.update(mode=stat.S_IMODE(now.st_mode), uid=now.st_uid, gid=now.st_gid)
    return kept


def _digest(path):
    """Return the MD5 of a file, with which dpkg compares, or None if there is no file."""
    try:
        with open(path, "rb") as file:
            return _md5(file.read())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _md5(content):
    try:
        return hashlib.md5(content, usedforsecurity=False).hexdigest()
    except TypeError:  # Python 3.8 has no such word
        return hashlib.md5(content).hexdigest()
