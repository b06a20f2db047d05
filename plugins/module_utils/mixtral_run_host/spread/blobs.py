"""A folder of files that are named by their hash. Files are copied with resumption, and verified before they get a name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections import namedtuple
from http.client import HTTPException, IncompleteRead

from ..folders import UnsafePath, open_file, open_folder

CHUNK = 1 << 20
RemoteFile = namedtuple("RemoteFile", "path size digest")


class CopyError(Exception):
    """Error that prevents a copy. `remedy` is the next step for the user."""

    def __init__(self, what, remedy):
        super().__init__(what)
        self.what, self.remedy = what, remedy


def copied(what, source, files, seconds):
    """Return what came from where and how fast, for the operator. files: lists of path, size and hash."""
    num_bytes = sum(size for _, size, _ in files)
    rate = num_bytes / max(seconds, 0.001)
    return "has {}: {:.1f} GB from {} in {:.0f} s ({:.0f} MB/s)".format(
        what, num_bytes / 1e9, source, seconds, rate / 1e6
    )


def _chunks(stream, what):
    """Yield the content of a stream in chunks. If it breaks off, yield the part that arrived, then raise CopyError."""
    while True:
        try:
            chunk = stream.read(CHUNK)
        except (OSError, HTTPException) as error:
            if isinstance(error, IncompleteRead):
                yield error.partial
            raise CopyError(
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


class Blobs:
    """The folder `blobs` in a folder.

    Root works in it while a user owns it, so its folders are opened without following that user's links.
    """

    def __init__(self, folder, uid=-1, gid=-1):
        self.folder = folder
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

    def fetch(self, source, file):
        """Fetch one file from another host; resume an interrupted copy. Raise CopyError for a wrong size or hash."""
        with self._open("blobs", make=True) as blobs, _partial(blobs, file) as out:
            start = os.fstat(out.fileno()).st_size
            if start > file.size:
                out.truncate(0)
                start = 0
            if start < file.size or not file.size:
                with source.open_file(file, start) as (answer, resumes):
                    if start and not resumes:
                        out.truncate(0)
                        start = 0
                    for chunk in _chunks(answer, file.path):
                        start += len(chunk)
                        if start > file.size:
                            os.unlink(_partial_name(file), dir_fd=blobs)
                            raise CopyError(
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
        """Verify a file and rename it to its blob name. Raise CopyError if it is short, or remove it and raise if wrong."""
        os.fsync(out.fileno())
        size = os.fstat(out.fileno()).st_size
        if size < file.size:
            raise CopyError(
                "{}: {} of {} bytes arrived".format(file.path, size, file.size), "run again: it goes on there"
            )
        found = _digest(out, file.digest)
        if size != file.size or found != file.digest:
            os.unlink(_partial_name(file), dir_fd=blobs)
            raise CopyError(
                "{}: expected {} bytes with hash {}; found {} bytes with {}".format(
                    file.path, file.size, file.digest, size, found
                ),
                "run again: the file is fetched anew",
            )
        os.fchown(out.fileno(), self._uid, self._gid)
        os.rename(_partial_name(file), file.digest, src_dir_fd=blobs, dst_dir_fd=blobs)

    def check(self, file):
        """Remove the file and raise CopyError if its content does not match the hash in its name."""
        with self._open("blobs") as blobs:
            handle = open_file(file.digest, blobs)
            if handle is None:
                found = "no regular file"
            else:
                with os.fdopen(handle, "rb") as blob:
                    found = _digest(blob, file.digest)
            if found != file.digest:
                os.unlink(file.digest, dir_fd=blobs)
                raise CopyError(
                    "{}: expected a file with hash {}; found {}".format(file.path, file.digest, found),
                    "run again: the file is fetched anew",
                )

    @contextlib.contextmanager
    def _open(self, *parts, make=False):
        """Open a folder of the cache for the time of a block."""
        path = os.path.join(self.folder, *parts)
        try:
            folder = open_folder(path, make=make)
        except (UnsafePath, NotADirectoryError) as error:
            raise CopyError(
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
        make_way(name, blobs, file.path)
        handle = open_file(name, blobs, flags | os.O_EXCL)
    return os.fdopen(handle, "a+b")


def make_way(name, folder, what):
    """Remove a file or a link if it exists."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError) as error:
        raise CopyError("{}: a folder named {} stands in its place".format(what, name), "remove it") from error
