"""Functions that open folders and files which users of the host can change, without following the links of these users.

The kit's modules run as root in folders that another user owns. This user can replace any name in them by a link at any
time, so a path is opened step by step, and all later work uses the descriptor instead of the path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_LINKS = 40


class UnsafePath(OSError):
    """A path leads through a link that root does not own."""

    def __init__(self, path):
        super().__init__(errno.ELOOP, "a link on this path does not belong to root and is not followed", path)


@contextlib.contextmanager
def naming(path):
    """Name `path` in an OSError of the block: operations on descriptors name a part of it, or nothing."""
    try:
        yield
    except OSError as error:
        if not (isinstance(error.filename, str) and error.filename.startswith("/")):
            error.filename = path
        raise


def open_folder(path, make=False, mode=0o755):
    """Open a folder and return its descriptor. Raise UnsafePath if the path leads through a link of another user.

    make: create missing folders with `mode`, less the umask.
    """
    with naming(path):
        return _open_folder(path, make, mode)


def _open_folder(path, make, mode):
    here = os.open("/", _FOLDER)
    pending, links = os.path.abspath(path).split("/")[::-1], 0
    try:
        while pending:
            name = pending.pop()
            if name in ("", "."):
                continue
            try:
                found = os.open(name, _FOLDER, dir_fd=here)
            except FileNotFoundError:
                if not make:
                    raise
                with contextlib.suppress(FileExistsError):  # another process created it at the same time
                    os.mkdir(name, mode, dir_fd=here)
                pending.append(name)
                continue
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                target = _target(name, here, path)
                links += 1
                if target is None or links > _MOST_LINKS:
                    raise
                pending += target.split("/")[::-1]
                found = os.open("/" if target.startswith("/") else ".", _FOLDER, dir_fd=here)
            os.close(here)
            here = found
    except BaseException:
        os.close(here)
        raise
    return here


def _target(name, folder, path):
    """Return the target of a link that root owns, or None if `name` is no link."""
    link = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        now = os.fstat(link)
        if not stat.S_ISLNK(now.st_mode):
            return None
        # A hard link to a link of root keeps root as its owner.
        if now.st_uid not in (0, os.geteuid()) or now.st_nlink != 1:
            raise UnsafePath(path)
        return os.readlink("", dir_fd=link)
    finally:
        os.close(link)


def open_file(name, folder, flags=os.O_RDONLY):
    """Open a file of a folder's descriptor and return its descriptor, or None if it is no regular file.

    A file to write must have one name only, because another user's file can have its second name here.
    Raise FileNotFoundError if it does not exist.
    """
    try:
        handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            return None
        raise
    now = os.fstat(handle)
    if stat.S_ISREG(now.st_mode) and (now.st_nlink == 1 or not flags & (os.O_WRONLY | os.O_RDWR)):
        return handle
    os.close(handle)
    return None
