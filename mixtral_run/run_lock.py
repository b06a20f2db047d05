"""One run a folder: a lock that the process holds and that ends with it, with a note of who holds it.

The lock is `flock` on a file, which Linux passes on to the server of an NFS folder: there it also holds between hosts.
Where a file system has no locks, the note alone counts: a process of this host that still lives holds the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
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
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return None if _try(descriptor) else _read_note(descriptor)
    finally:
        os.close(descriptor)


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
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            if _try(descriptor):
                # The last holder may have removed the file between our open and our lock.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), lock.stat()):
                        _write_note(descriptor, Holder.this_process(command))
                        return descriptor
            elif attempt == _ATTEMPTS - 1:
                holder = _read_note(descriptor)
                raise ConfigError(
                    "Another run writes to the same place.",
                    where=str(where),
                    found=str(holder),
                    next_command=f"wait for it to end, or {holder.how_to_end}",
                )
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_ATTEMPT_SECONDS)
    raise ConfigError("Other runs take and leave the same place all the time.", where=str(where))


def release(lock: Path, descriptor: int) -> None:
    """Remove the lock's file and let it go. A folder that was renamed meanwhile has another lock at this place."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), lock.stat()):
            lock.unlink(missing_ok=True)
    os.close(descriptor)


def _try(descriptor: int) -> bool:
    """Lock an open file if nobody else has; return True if this process has it now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _lives(_read_note(descriptor))
    return True


def _lives(holder: Holder) -> bool:
    """Return True if the holder is another process of this host that still runs."""
    if holder.host != socket.gethostname() or holder.pid in (0, os.getpid()):
        return False
    return Path(f"/proc/{holder.pid}").exists()


def _write_note(descriptor: int, holder: Holder) -> None:
    """Write who holds the lock; on a full disk the lock holds without a note."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)


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
