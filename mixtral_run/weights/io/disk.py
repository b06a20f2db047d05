"""Calls to the file system and the page cache other than reading and writing."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from mixtral_run.weights.io.cgroup import free_in_cgroups

C_LIBRARY = ctypes.CDLL(None, use_errno=True)
_MEMORY = Path("/proc/meminfo")
_MOUNTS = Path("/proc/self/mountinfo")


_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE, linux/falloc.h
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


def allocate(descriptor: int, start: int, num_bytes: int, *, keep_size: bool = False) -> None:
    """Reserve space in a file, so that the disk can lay it out in one piece; do nothing if the file system cannot.

    keep_size: leave the file's length as it is; space after its end is reserved all the same.

    Raises OSError when the disk is full. Not os.posix_fallocate, which writes into every block where the file system
    has no call for it, as over NFS.
    """
    fallocate = getattr(C_LIBRARY, "fallocate", None)
    if fallocate is None:
        return
    if fallocate(descriptor, _KEEP_SIZE * keep_size, ctypes.c_longlong(start), ctypes.c_longlong(num_bytes)) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT):  # others mean that it cannot
            raise OSError(number, os.strerror(number))


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders of one file system atomically, so that both names exist at every moment.

    Returns False, with nothing done, if the system or the file system cannot: NFS has no call for it.
    """
    renameat2 = getattr(C_LIBRARY, "renameat2", None)
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0


def drop_from_cache(descriptor: int, start: int = 0, num_bytes: int = 0) -> None:
    """Drop a file's pages from the page cache, except those not on the disk yet. num_bytes 0: to its end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, num_bytes, os.POSIX_FADV_DONTNEED)


def is_in_memory(folder: Path) -> bool:
    """Return True if a folder's files are only in RAM, as those of /dev/shm are."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    # Fields before " - ": the third is the device. After it: the file system's type. man 5 proc_pid_mountinfo
    return any(
        before.split()[2] == number and after.split()[0] == "tmpfs"
        for before, _, after in (line.partition(" - ") for line in mounts)
    )


def fits_in_memory(num_bytes: int) -> bool:
    """Return True if so many bytes fit into the page cache without displacing other memory."""
    return num_bytes < available_bytes()


def available_bytes() -> int:
    """Return the available bytes of RAM, within the limits of this process's control groups; 0 if unknown.

    What the groups use already is not available. At least 1 where it is known: a full group is no unknown one.
    """
    found = [free_in_cgroups()]
    if _MEMORY.is_file():
        lines = _MEMORY.read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    known = [each for each in found if each is not None]
    return max(1, min(known)) if known else 0
