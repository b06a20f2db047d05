"""Facts from the mount of a lock's file: whether its lock holds on other hosts, and how late their writes show here."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_LOCKS_OF_ONE_HOST = ("9p", "afs", "beegfs", "fhgfs", "virtiofs")
"""Shared file systems whose locks may be those of one host; the mount tells it of others."""
_FUSE_THAT_ASKS = ("ceph-fuse", "glusterfs", "juicefs", "mfs", "sshfs")
"""FUSE file systems that ask their server again after at most a minute, unless they were told otherwise."""
_LONGEST_DEFAULT_CACHE = 60.0
"""Seconds. acregmax and acdirmax of NFS, and more than the defaults of the FUSE file systems above and of virtiofs."""
_CACHE_OPTIONS = ("acregmax", "acdirmax", "actimeo", "closetimeo")


def kind_of_lock(descriptor: int) -> int:
    """Return LOCK_EX, or LOCK_SH for a file that is open for reading: NFS wants to write where a lock excludes all."""
    is_written = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    return fcntl.LOCK_EX if is_written else fcntl.LOCK_SH


def reaches_other_hosts(descriptor: int) -> bool:
    """Return True if the lock of an open file holds on all hosts that see the file."""
    try:
        fcntl.flock(descriptor, kind_of_lock(descriptor) | fcntl.LOCK_NB)
    except OSError:
        return False
    mounts = _mountinfo()
    return mounts is None or locks_reach_other_hosts(mounts, _device(descriptor))


def cache_seconds_of(descriptor: int) -> float | None:
    """Return what `cache_seconds` does, for an open file."""
    mounts = _mountinfo()
    return _LONGEST_DEFAULT_CACHE if mounts is None else cache_seconds(mounts, _device(descriptor))


def _mountinfo() -> str | None:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _device(descriptor: int) -> str:
    device = os.fstat(descriptor).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def _mount_of(mountinfo: str, device: str) -> tuple[str, set[str]] | None:
    """Return kind and options of the file system of a device; None if no line has it."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        words, rest = before.split(), after.split()
        if len(words) > 2 and words[2] == device and len(rest) > 2:
            return rest[0], set(rest[2].split(","))
    return None


def locks_reach_other_hosts(mountinfo: str, device: str) -> bool:
    """Return False for a file system of several hosts whose locks are those of one host, by its mount.

    mountinfo: as in /proc/self/mountinfo. device: MAJOR:MINOR of a file.
    """
    mount = _mount_of(mountinfo, device)
    if mount is None:
        return True
    kind, options = mount
    if kind in ("nfs", "nfs4"):
        return not options & {"nolock", "local_lock=flock", "local_lock=all"}
    if kind == "lustre":
        return "flock" in options
    if kind in ("cifs", "smb3"):
        return "nobrl" not in options
    is_fuse = kind.partition(".")[0] == "fuse" and kind != "fuse.fuse-overlayfs"
    return not is_fuse and kind not in _LOCKS_OF_ONE_HOST


def cache_seconds(mountinfo: str, device: str) -> float | None:
    """Return how late another host's write to a small file may show when the file is opened and read here.

    None: any time, as with most FUSE file systems, those of object stores among them. Arguments as above.
    """
    mount = _mount_of(mountinfo, device)
    if mount is None:
        return 0.0
    kind, options = mount
    family, _, name = kind.partition(".")
    if family == "fuse":
        return _LONGEST_DEFAULT_CACHE if name in _FUSE_THAT_ASKS else None
    values = dict(each.partition("=")[::2] for each in options)
    if kind == "9p":
        return 0.0 if values.get("cache", "none") in ("none", "mmap") else None
    if kind == "virtiofs":
        return _LONGEST_DEFAULT_CACHE
    given = [float(values[name]) for name in _CACHE_OPTIONS if values.get(name, "").isdecimal()]
    # NFS asks its server whenever a file is opened, but not with nocto. It shows the times that are not its defaults.
    return max([*given, _LONGEST_DEFAULT_CACHE if "nocto" in options else 0.0])
