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
from collections import namedtuple
from http.client import HTTPException, IncompleteRead

from ..files import replace_in
from ..folders import UnsafePath, open_file, open_folder

CHUNK = 1 << 20
_SIZE_LIMIT = 1 << 50
"""Bytes. No file of a model is nearly as large."""
RemoteFile = namedtuple("RemoteFile", "path size digest")


class ModelError(Exception):
    """Error that prevents a model from being put into the cache. `remedy` is the next step for the user."""

    def __init__(self, what, remedy):
        super().__init__(what)
        self.what, self.remedy = what, remedy


def checked_files(listed, source):
    """Return the files that another machine lists, as RemoteFile. Raise ModelError if a path would leave the cache.

    listed: the machine's answer, a list of [path, size, hash]. Root writes files by these values, so the machine is not
    trusted: a path must be relative, without `..` and control characters; a hash must be hexadecimal digits; a size
    must be a number of bytes below 1 PiB; and no path may be a file and a folder at the same time.
    """
    if not isinstance(listed, list):
        raise ModelError("{}: the answer is no list of files".format(source), _UNTRUSTED)
    files = []
    for each in listed:
        path, size, digest = each if isinstance(each, list) and len(each) == 3 else (None, None, None)
        if not (_is_relative(path) and isinstance(size, int) and 0 <= size < _SIZE_LIMIT and _is_digest(digest)):
            raise ModelError("{}: it lists {!a:.200}".format(source, each), _UNTRUSTED)
        files.append(RemoteFile(path, size, digest))
    folders = {path for file in files for path in _parents(file.path)}
    inside = sorted(folders & {file.path for file in files})
    if inside:
        raise ModelError("{}: it lists {!a} as a file and as a folder".format(source, inside[0]), _UNTRUSTED)
    return files


def checked_commit(value, source):
    """Return the commit that another machine names, which becomes a folder's name. Raise ModelError if it is no hash."""
    if not _is_digest(value):
        raise ModelError("{}: it names the commit {!a:.200}".format(source, value), _UNTRUSTED)
    return value


def matching(files, patterns):
    """Return the files whose path matches one of the patterns."""
    return [file for file in files if any(fnmatch.fnmatchcase(file.path, pattern) for pattern in patterns)]


_UNTRUSTED = "nothing was written; this machine is not what it should be: check hf_cache_peer"


def _is_relative(path):
    if not isinstance(path, str) or len(path) > 1000:
        return False
    return re.match(r"[^\x00-\x1f\x7f\\]+\Z", path) is not None and not {"", ".", ".."} & set(path.split("/"))


def _is_digest(value):
    return isinstance(value, str) and re.match(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\Z", value) is not None


def _parents(path):
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _chunks(stream, what):
    """Yield the content of a stream in chunks. If it breaks off, yield the part that arrived, then raise ModelError."""
    while True:
        try:
            chunk = stream.read(CHUNK)
        except (OSError, HTTPException) as error:
            if isinstance(error, IncompleteRead):
                yield error.partial
            raise ModelError(
                "{}: the connection broke off: {}".format(what, error), "run again: it goes on there"
            ) from error
        if not chunk:
            return
        yield chunk


def digest_of(path, like):
    """Return the hash of a file, of the same kind as `like`: SHA-256 for 64 digits, git's SHA-1 of a blob for 40."""
    with open(path, "rb") as file:
        return _digest(file, like)


def _digest(file, like):
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size)
    file.seek(0)
    for chunk in iter(lambda: file.read(CHUNK), b""):
        digest.update(chunk)
    return digest.hexdigest()


class ModelCache:
    """Folder of one model in an HF cache.

    Root works in it while a user owns it, so its folders are opened without following that user's links.
    """

    def __init__(self, home, model, uid=-1, gid=-1):
        self.folder = os.path.join(home, "hub", "models--" + model.replace("/", "--"))
        self._uid, self._gid = uid, gid

    def blob(self, digest):
        return os.path.join(self.folder, "blobs", digest)

    def has(self, file):
        """Return True if the blob exists with the right size. Its hash was verified before it got its name."""
        try:
            now = os.lstat(self.blob(file.digest))
        except OSError:
            return False
        return stat.S_ISREG(now.st_mode) and now.st_size == file.size

    def fetch(self, source, commit, file):
        """Fetch one file from another host; resume an interrupted copy. Raise ModelError for a wrong size or hash."""
        with self._open("blobs", make=True) as blobs, _partial(blobs, file) as out:
            start = os.fstat(out.fileno()).st_size
            if start > file.size:
                out.truncate(0)
                start = 0
            if start < file.size or not file.size:
                with source.open_file(commit, file, start) as (answer, resumes):
                    if start and not resumes:
                        out.truncate(0)
                        start = 0
                    for chunk in _chunks(answer, file.path):
                        start += len(chunk)
                        if start > file.size:
                            os.unlink(_partial_name(file), dir_fd=blobs)
                            raise ModelError(
                                "{}: more than the {} bytes that were listed arrived".format(file.path, file.size),
                                "run again: the file is fetched anew",
                            )
                        out.write(chunk)
                out.flush()
            self._settle(blobs, out, file)

    def take(self, origin, file):
        """Copy one file from a path of this host."""
        with self._open("blobs", make=True) as blobs, _partial(blobs, file) as out:
            out.truncate(0)
            with open(origin, "rb") as data:
                for chunk in _chunks(data, file.path):
                    out.write(chunk)
            out.flush()
            self._settle(blobs, out, file)

    def _settle(self, blobs, out, file):
        """Verify a file and rename it to its blob name. Raise ModelError if it is short, or remove it and raise if wrong."""
        os.fsync(out.fileno())
        size = os.fstat(out.fileno()).st_size
        if size < file.size:
            raise ModelError(
                "{}: {} of {} bytes arrived".format(file.path, size, file.size), "run again: it goes on there"
            )
        found = _digest(out, file.digest)
        if size != file.size or found != file.digest:
            os.unlink(_partial_name(file), dir_fd=blobs)
            raise ModelError(
                "{}: expected {} bytes with hash {}; found {} bytes with {}".format(
                    file.path, file.size, file.digest, size, found
                ),
                "run again: the file is fetched anew",
            )
        os.fchown(out.fileno(), self._uid, self._gid)
        os.rename(_partial_name(file), file.digest, src_dir_fd=blobs, dst_dir_fd=blobs)

    def check(self, file):
        """Remove the file and raise ModelError if its content does not match the hash in its name."""
        with self._open("blobs") as blobs:
            handle = open_file(file.digest, blobs)
            if handle is None:
                found = "no regular file"
            else:
                with os.fdopen(handle, "rb") as blob:
                    found = _digest(blob, file.digest)
            if found != file.digest:
                os.unlink(file.digest, dir_fd=blobs)
                raise ModelError(
                    "{}: expected a file with hash {}; found {}".format(file.path, file.digest, found),
                    "run again: the file is fetched anew",
                )

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
                _make_way(name, folder, file.path)
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

    @contextlib.contextmanager
    def _open(self, *parts, make=False):
        """Open a folder of the cache for the time of a block."""
        path = os.path.join(self.folder, *parts)
        try:
            folder = open_folder(path, make=make)
        except (UnsafePath, NotADirectoryError) as error:
            raise ModelError(
                "{}: {}".format(path, error.strerror), "remove what stands in the folder's place, or create it as root"
            ) from error
        try:
            yield folder
        finally:
            os.close(folder)


def _partial_name(file):
    return file.digest + ".incomplete"


def _partial(blobs, file):
    """Open the part of a file that arrived, to be read and appended to. Replace a link or a file with several names."""
    name = _partial_name(file)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    handle = open_file(name, blobs, flags)
    if handle is None:
        _make_way(name, blobs, file.path)
        handle = open_file(name, blobs, flags | os.O_EXCL)
    return os.fdopen(handle, "a+b")


def _make_way(name, folder, what):
    """Remove a file or a link if it exists."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError) as error:
        raise ModelError("{}: a folder named {} stands in its place".format(what, name), "remove it") from error


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
