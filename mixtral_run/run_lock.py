"""One run a folder: a lock that the process holds and that ends with it, with a note of who holds it.

The lock is `flock` on a file, which Linux passes on to the server of an NFS folder: there it also holds between hosts.
Where a file system has no locks, or keeps those of each host apart, the note counts: a process of this host that still
lives holds the folder, and so does one of another host that gives signs of life, which are the file's times.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mixtral_run.errors import ConfigError

LOCK_NAME = ".mixtral-run.lock"
"""Name of the lock in a folder that a run writes to. It is removed at the end of the run."""

_ATTEMPTS, _ATTEMPT_SECONDS = 10, 0.1
"""Another process that only looks (`holder_of`) has the lock for an instant."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_LARGEST_NOTE = 4096
_BEAT_SECONDS, _SILENT_SECONDS, _SETTLE_SECONDS = 10.0, 45.0, 1.0
"""Time between two signs of life; time without one after which a holder is dead; time for another's note to show."""
_LOCKS_OF_ONE_HOST = ("9p", "afs", "beegfs", "fhgfs", "virtiofs")
"""Shared file systems whose locks may be those of one host; _reaches_other_hosts has those that their mount tells."""
_beating: dict[int, threading.Event] = {}
"""What ends the signs of life of each lock that needs them, by its descriptor."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock. since: UTC, ISO 8601."""

    command: str
    host: str
    pid: int
    since: str

    @classmethod
    def this_process(cls, command: str) -> Holder:
        """Describe this process. command: such as `mixtral-run finetune`."""
        return cls(command, socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def __str__(self) -> str:
        return f"{self.command}, process {self.pid} on {self.host}, since {self.since}"

    @property
    def how_to_end(self) -> str:
        """Return the command that asks the holder to end."""
        kill = f"kill {self.pid}"
        return kill if self.host == socket.gethostname() else f"{kill} on {self.host}"


UNKNOWN = Holder("another process", "an unknown host", 0, "an unknown time")


def lock_file_of(file: Path) -> Path:
    """Return the lock of a single file that a run writes to."""
    return file.with_name(f".{file.name}.lock")


def holder_of(lock: Path) -> Holder | None:
    """Return the process that holds a lock; None if nobody does."""
    try:
        descriptor = _open_to_look(lock)
    except OSError:
        return None
    try:
        return _holder(lock, descriptor)
    finally:
        os.close(descriptor)


def _open_to_look(lock: Path) -> int:
    """Open a lock's file, for reading alone if it is another user's."""
    try:
        return os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except PermissionError:
        return os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)


def _holder(lock: Path, descriptor: int) -> Holder | None:
    """Return who else holds an open lock. If nobody does, this process holds it as far as the file system has locks."""
    if not _try(descriptor):
        return _read_note(descriptor)
    note = _read_note(descriptor)
    foreign = note is not UNKNOWN and note.host != socket.gethostname()
    return note if foreign and not _reaches_other_hosts(descriptor) and _gives_signs_of_life(lock, note) else None


def lock_problems(lock: Path, flag: str) -> list[str]:
    """Return a line if another run holds the lock. flag: the flag and the path that the lock protects.

    In a job of several processes only the first one looks. It is also the one that takes the lock, perhaps before the
    others, which torchrun started on this host or another, get here.
    """
    holder = holder_of(lock) if os.environ.get("RANK", "0") == "0" else None
    if holder is None:
        return []
    return [f"{flag}: expected no other run that writes there; found {holder} ({holder.how_to_end} asks it to end)"]


@contextmanager
def one_run(lock: Path, command: str, where: Path) -> Iterator[None]:
    """Hold a lock while the block runs. Raises ConfigError with its holder if another process has it.

    lock: the lock's file; its folder is created. where: the folder or file that it protects.
    """
    descriptor = acquire(lock, command, where)
    try:
        yield
    finally:
        release(lock, descriptor)


@contextmanager
def all_of(locks: Sequence[tuple[str, Path]], command: str, what: str) -> Iterator[None]:
    """Hold several locks, each with its name, while the block runs.

    Raises ConfigError, whose text begins with `what`, with the holders of all locks that other processes have.
    """
    with ExitStack() as held:
        problems = []
        for name, lock in locks:
            try:
                held.enter_context(one_run(lock, command, Path(name)))
            except ConfigError as error:
                problems.append(f"{name}: {error.found}")
        if problems:
            raise ConfigError(what, problems=problems, next_command="wait for the other run to end")
        yield


def acquire(lock: Path, command: str, where: Path) -> int:
    """Take a lock and return its descriptor, which `release` wants. Raises ConfigError as `one_run` does."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except PermissionError:
            if not _remove_anothers(lock):
                raise
            continue
        try:
            holder = _holder(lock, descriptor)
            # The last holder may have removed the file between our open and our lock.
            if holder is None and _is_at(lock, descriptor) and _write_note(descriptor, lock, command):
                return descriptor
            if holder is not None and attempt == _ATTEMPTS - 1:
                raise _is_held(holder, where)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_ATTEMPT_SECONDS)
    raise ConfigError("Other runs take and leave the same place all the time.", where=str(where))


def _is_held(holder: Holder, where: Path) -> ConfigError:
    return ConfigError(
        "Another run writes to the same place.",
        where=str(where),
        found=str(holder),
        next_command=f"wait for it to end, or {holder.how_to_end}",
    )


def _is_at(lock: Path, descriptor: int) -> bool:
    """Return True if an open file is still the lock's."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    return False


def _remove_anothers(lock: Path) -> bool:
    """Remove what a killed run of another user left, if the folder lets this user. Raises ConfigError if it is held."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        holder = _holder(lock, descriptor)
        if holder is not None:
            raise _is_held(holder, lock.parent)
        if _is_at(lock, descriptor):
            lock.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def release(lock: Path, descriptor: int) -> None:
    """Remove the lock's file and let it go. A folder that was renamed meanwhile has another lock at this place."""
    if descriptor in _beating:
        _beating.pop(descriptor).set()
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), lock.stat()):
            lock.unlink(missing_ok=True)
    os.close(descriptor)


def _try(descriptor: int) -> bool:
    """Lock an open file if nobody else has; return True if this process has it now."""
    try:
        fcntl.flock(descriptor, _kind_of_lock(descriptor) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _lives(_read_note(descriptor))
    return True


def _kind_of_lock(descriptor: int) -> int:
    """Return LOCK_EX, or LOCK_SH for a file that is open for reading: NFS wants to write where a lock excludes all."""
    is_written = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    return fcntl.LOCK_EX if is_written else fcntl.LOCK_SH


def _lives(holder: Holder) -> bool:
    """Return True if the holder is another process of this host that still runs."""
    if holder.host != socket.gethostname() or holder.pid in (0, os.getpid()):
        return False
    return Path(f"/proc/{holder.pid}").exists()


def _reaches_other_hosts(descriptor: int) -> bool:
    """Return True if the lock of an open file holds on all hosts that see the file."""
    try:
        fcntl.flock(descriptor, _kind_of_lock(descriptor) | fcntl.LOCK_NB)
    except OSError:
        return False
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    device = os.fstat(descriptor).st_dev
    return locks_reach_other_hosts(mounts, f"{os.major(device)}:{os.minor(device)}")


def locks_reach_other_hosts(mountinfo: str, device: str) -> bool:
    """Return False for a file system of several hosts whose locks are those of one host, by its mount.

    mountinfo: as in /proc/self/mountinfo. device: MAJOR:MINOR of a file.
    """
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        words, rest = before.split(), after.split()
        if len(words) > 2 and words[2] == device and len(rest) > 2:
            kind, options = rest[0], set(rest[2].split(","))
            break
    else:
        return True
    if kind in ("nfs", "nfs4"):
        return not options & {"nolock", "local_lock=flock", "local_lock=all"}
    if kind == "lustre":
        return "flock" in options
    if kind in ("cifs", "smb3"):
        return "nobrl" not in options
    is_fuse = kind.partition(".")[0] == "fuse" and kind != "fuse.fuse-overlayfs"
    return not is_fuse and kind not in _LOCKS_OF_ONE_HOST


def _gives_signs_of_life(lock: Path, holder: Holder) -> bool:
    """Return True as soon as a holder on another host has changed the times of its lock."""
    print(
        f"mixtral-run: {lock.parent} may be in use by {holder}; waiting up to {_SILENT_SECONDS:.0f} s for a sign of "
        "life, as this file system has no locks between hosts",
        file=sys.stderr,
    )
    first, until = _times(lock), time.monotonic() + _SILENT_SECONDS
    while first is not None and time.monotonic() < until:
        time.sleep(min(1.0, _SILENT_SECONDS / 10))
        now = _times(lock)
        if now != first:
            return now is not None
    return False


def _times(lock: Path) -> int | None:
    """Return when a lock's file was changed; None if it is gone. NFS asks its server for it when a file is opened."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _write_note(descriptor: int, lock: Path, command: str) -> bool:
    """Write who holds the lock; on a full disk the lock holds without a note.

    Returns False if another host, which this file system's locks do not reach, has written its own at the same time.
    """
    text = json.dumps(asdict(Holder.this_process(command))).encode()
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
        os.fsync(descriptor)
    if _reaches_other_hosts(descriptor):
        return True
    time.sleep(_SETTLE_SECONDS)
    with contextlib.suppress(OSError):
        if lock.read_bytes() != text:
            return False
    over = _beating[descriptor] = threading.Event()
    threading.Thread(target=_beat, args=(descriptor, over), name="lock", daemon=True).start()
    return True


def _beat(descriptor: int, over: threading.Event) -> None:
    while not over.wait(_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _read_note(descriptor: int) -> Holder:
    """Return the holder that a lock's note names. Anybody may have written it."""
    try:
        values = json.loads(os.pread(descriptor, _LARGEST_NOTE, 0))
        texts = [values[name] for name in ("command", "host", "since")]
        if not all(isinstance(each, str) and each.isprintable() and len(each) < 200 for each in texts):
            return UNKNOWN
        pid = values["pid"]
        return Holder(texts[0], texts[1], pid, texts[2]) if type(pid) is int and pid > 0 else UNKNOWN
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return UNKNOWN
