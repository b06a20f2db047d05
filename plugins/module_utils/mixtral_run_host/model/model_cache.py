"""One model in the HF cache. Files are copied with resumption, verified by size and hash, and published last.

Layout (huggingface_hub, file_download.py): models--ORG--NAME/{blobs/HASH, refs/REVISION, snapshots/COMMIT/FILE → blob}.
The blob of a large file is named by its SHA-256, that of a small file by its git hash, so a cache can verify itself.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import stat

from ..files import replace_in
from ..folders import open_file
from ..spread.blobs import Blobs, CopyError, RemoteFile, make_way

_SIZE_LIMIT = 1 << 50
"""Bytes. No file of a model is nearly as large."""


def checked_files(listed, source):
    """Return the files that another machine lists, as RemoteFile. Raise CopyError if a path would leave the cache.

    listed: the machine's answer, a list of [path, size, hash]. Root writes files by these values, so the machine is not
    trusted: a path must be relative, without `..` and control characters; a hash must be hexadecimal digits; a size
    must be a number of bytes below 1 PiB; and no path may be a file and a folder at the same time.
    """
    if not isinstance(listed, list):
        raise CopyError("{}: the answer is no list of files".format(source), _UNTRUSTED)
    files = []
    for each in listed:
        path, size, digest = each if isinstance(each, list) and len(each) == 3 else (None, None, None)
        if not (_is_relative(path) and isinstance(size, int) and 0 <= size < _SIZE_LIMIT and _is_digest(digest)):
            raise CopyError("{}: it lists {!a:.200}".format(source, each), _UNTRUSTED)
        files.append(RemoteFile(path, size, digest))
    folders = {path for file in files for path in _parents(file.path)}
    inside = sorted(folders & {file.path for file in files})
    if inside:
        raise CopyError("{}: it lists {!a} as a file and as a folder".format(source, inside[0]), _UNTRUSTED)
    return files


def checked_commit(value, source):
    """Return the commit that another machine names, which becomes a folder's name. Raise CopyError if it is no hash."""
    if not _is_digest(value):
        raise CopyError("{}: it names the commit {!a:.200}".format(source, value), _UNTRUSTED)
    return value


def matching(files, patterns):
    """Return the files whose path matches one of the patterns."""
    return [file for file in files if any(fnmatch.fnmatchcase(file.path, pattern) for pattern in patterns)]


def listing_digest(files):
    """Return the digest of paths and hashes of a model, whatever the name of the commit that has them."""
    lines = "".join("{} {}\n".format(digest, path) for path, _, digest in sorted(files))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


_UNTRUSTED = "nothing was written; this machine is not what it should be: check hf_cache_peer and hf_cache_endpoint"


def _is_relative(path):
    if not isinstance(path, str) or len(path) > 1000:
        return False
    return re.match(r"[^\x00-\x1f\x7f\\]+\Z", path) is not None and not {"", ".", ".."} & set(path.split("/"))


def _is_digest(value):
    return isinstance(value, str) and re.match(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\Z", value) is not None


def _parents(path):
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


class ModelCache(Blobs):
    """Folder of one model in an HF cache."""

    def __init__(self, home, model, uid=-1, gid=-1):
        super().__init__(os.path.join(home, "hub", "models--" + model.replace("/", "--")), uid, gid)

    def snapshot(self, revision, patterns):
        """Return commit and files of a revision in the cache, in the form of a record; None if it is not all there."""
        blobs, commit = os.path.dirname(self.blob("x")), revision
        if os.path.isdir(blobs) and any(name.endswith(".incomplete") for name in os.listdir(blobs)):
            return None
        with contextlib.suppress(OSError), open(os.path.join(self.folder, "refs", revision), encoding="utf-8") as file:
            commit = file.read(100).strip()
        folder = os.path.join(self.folder, "snapshots", commit)
        if not _is_digest(commit) or not os.path.isdir(folder):
            return None
        found = []
        for parent, _, names in os.walk(folder):
            for path in (os.path.join(parent, name) for name in names):
                # Every file of the hub is a link into blobs/; the quantized cache that finetune writes next to it is not.
                if os.path.islink(path) and os.path.isfile(path):
                    digest = os.path.basename(os.readlink(path))
                    found.append([os.path.relpath(path, folder), os.path.getsize(path), digest])
        files = matching(checked_files(sorted(found), self.folder), patterns)
        return {"commit": commit, "files": [list(file) for file in files], "patterns": patterns} if files else None

    def publish(self, revision, commit, files):
        """Publish the snapshot: create its links first and the revision's reference last. Return True on a change."""
        changed = False
        snapshot = os.path.join(self.folder, "snapshots", commit)
        for file in files:
            parent, name = os.path.split(file.path)
            target = os.path.relpath(self.blob(file.digest), os.path.join(snapshot, parent))
            with self._open("snapshots", commit, parent, make=True) as folder:
                if _target(name, folder) == target:
                    continue
                make_way(name, folder, file.path)
                os.symlink(target, name, dir_fd=folder)
            changed = True
        parent, name = os.path.split(revision)
        with self._open("refs", parent, make=True) as folder:
            if _text(name, folder) != commit:
                replace_in(folder, name, commit)
                changed = True
        if changed:
            self._own_all()
        return changed

    def _own_all(self):
        """Give the folder with its contents to the owner of the cache.

        A file with several names stays as it is: another user's file can have one of its names here.
        """
        with self._open() as top:
            os.fchown(top, self._uid, self._gid)
            for _, folders, names, here in os.fwalk(".", dir_fd=top):
                for name in folders + names:
                    with contextlib.suppress(FileNotFoundError):  # a job removed it in the meantime
                        now = os.stat(name, dir_fd=here, follow_symlinks=False)
                        if stat.S_ISDIR(now.st_mode) or now.st_nlink == 1:
                            os.chown(name, self._uid, self._gid, dir_fd=here, follow_symlinks=False)


def _target(name, folder):
    """Return the target of a link, or None if `name` is no link or does not exist."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        return None


def _text(name, folder):
    """Return the first 100 characters of a file, or None if it is no regular file or does not exist."""
    try:
        handle = open_file(name, folder)
    except FileNotFoundError:
        return None
    if handle is None:
        return None
    with os.fdopen(handle, "rb") as file:
        return file.read(100).decode("ascii", "replace")
