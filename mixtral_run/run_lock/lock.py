"""One run a folder: a lock that the process holds and that ends with it, with a note of who holds it.

The lock is `flock` on a file, which Linux passes on to the server of an NFS folder: there it also holds between hosts.
Where a file system has no locks, or keeps those of each host apart, the note counts: a process of this host that still
lives holds the folder, and so does one of another host that gives signs of life (signs.py). There a lock is taken by
creating its file, and what a dead holder left is removed before: its file is never written to again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mixtral_run.errors import ConfigError
from mixtral_run.run_lock.mounts import kind_of_lock, reaches_other_hosts
from mixtral_run.run_lock.note import TO_READ, Holder, Note, read_note
from mixtral_run.run_lock.signs import SETTLE_SECONDS, Doubt, OwnSigns, doubt_of, is_held, living, stop_signs

LOCK_NAME = ".mixtral-run.lock"
"""Name of the lock in a folder that a run writes to. It is removed at the end of the run."""

_ATTEMPTS, _ATTEMPT_SECONDS = 10, 0.1
"""Another process that only looks (`holder_of`) has the lock for an instant."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def lock_file_of(file: Path) -> Path:
    """Return the lock of a single file that a run writes to."""
    return file.with_name(f".{file.name}.lock")


def holder_of(lock: Path) -> Holder | None:
    """Return the process that holds a lock; None if nobody does.

    The lock of a host that gives no sign of life is removed, so that nobody waits for it again.
    """
    try:
        descriptor = _open_to_look(lock)
    except OSError:
        return None
    try:
        holder, doubt = _state(lock, descriptor)
    finally:
        # While this process waits for a sign of life it keeps nobody off.
        os.close(descriptor)
    if doubt is not None:
        with contextlib.suppress(OSError):
            return living([doubt]).get(lock)
    return holder


def _open_to_look(lock: Path) -> int:
    """Open a lock's file, for reading alone if it is another user's."""
    try:
        return os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except PermissionError:
        return os.open(lock, TO_READ)


def _state(lock: Path, descriptor: int) -> tuple[Holder | None, Doubt | None]:
    """Return who else holds an open lock, or who may on another host.

    If nobody does, this process holds it as far as the file system has locks.
    """
    if not _try(descriptor):
        return read_note(descriptor).holder, None
    return None, doubt_of(lock, descriptor)


def lock_problems(lock: Path, flag: str) -> list[str]:
    """Return a line if another run holds the lock. flag: the flag and the path that the lock protects.

    In a job of several processes only the first one looks. It is also the one that takes the lock, perhaps before the
    others, which torchrun started on this host or another, get here.
    """
    holder = holder_of(lock) if os.environ.get("RANK", "0") == "0" else None
    if holder is None:
        return []
    return [
        f"{flag}: expected no other run that writes there; found {holder} ({holder.how_to_end} asks it to "
        f"end{holder.if_lost})"
    ]


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
    alive = living(_doubts([lock for _, lock in locks]))
    with ExitStack() as held:
        problems = [f"{name}: {alive[lock]}{alive[lock].if_lost}" for name, lock in locks if lock in alive]
        for name, lock in locks:
            try:
                if lock not in alive:
                    held.enter_context(one_run(lock, command, Path(name)))
            except ConfigError as error:
                problems.append(f"{name}: {error.found}")
        if problems:
            raise ConfigError(what, problems=problems, next_command="wait for the other run to end")
        yield


def _doubts(locks: Sequence[Path]) -> list[Doubt]:
    """Return those of several locks that another host may hold, to wait for all of them together."""
    found = []
    for lock in locks:
        with contextlib.suppress(OSError):
            descriptor = _open_to_look(lock)
            try:
                _, doubt = _state(lock, descriptor)
            finally:
                os.close(descriptor)
            found += [doubt] if doubt is not None else []
    return found


def acquire(lock: Path, command: str, where: Path) -> int:
    """Take a lock and return its descriptor, which `release` wants. Raises ConfigError as `one_run` does."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_ATTEMPT_SECONDS)
        # A holder that ends may remove the folder of its work at any time.
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor, is_new = _open_or_create(lock)
        except (FileExistsError, FileNotFoundError):
            continue
        except PermissionError:
            if not _remove_anothers(lock):
                raise
            continue
        taken = False
        try:
            holder, doubt = _state(lock, descriptor)
            # The last holder may have removed the file between our open and our lock.
            if holder is None and _is_at(lock, descriptor) and (is_new or doubt is None):
                taken = _take(lock, descriptor, command, is_new=is_new)
            if taken:
                return descriptor
        finally:
            if not taken:
                os.close(descriptor)
        if doubt is not None and not is_new:
            holder = living([doubt]).get(lock)
        if holder is not None and (doubt is not None or attempt == _ATTEMPTS - 1):
            raise _is_held(holder, where)
    raise ConfigError("Other runs take and leave the same place all the time.", where=str(where))


def _open_or_create(lock: Path) -> tuple[int, bool]:
    """Open a lock's file. Return True next to it if this process created it, and not another host at the same time."""
    try:
        return os.open(lock, os.O_RDWR | os.O_NOFOLLOW), False
    except FileNotFoundError:
        return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), True


def _take(lock: Path, descriptor: int, command: str, *, is_new: bool) -> bool:
    """Write who holds a lock that nobody else holds. Return False if it is to be tried again.

    Where locks reach other hosts, it holds without a note on a full disk.
    """
    note = Note(Holder.this_process(command))
    signs = OwnSigns(lock, descriptor, note)
    if reaches_other_hosts(descriptor):
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            signs.write()
        return True
    if not is_new:
        # A dead process of this host left it. Another host may be looking at the file.
        lock.unlink(missing_ok=True)
        return False
    try:
        signs.write()
        time.sleep(SETTLE_SECONDS)
        if not signs.is_own():
            return False
    except OSError:
        if _is_at(lock, descriptor):
            lock.unlink(missing_ok=True)
        raise
    signs.start()
    return True


def _is_held(holder: Holder, where: Path) -> ConfigError:
    return ConfigError(
        "Another run writes to the same place.",
        where=str(where),
        found=str(holder),
        next_command=f"wait for it to end, or {holder.how_to_end}{holder.if_lost}",
    )


def _is_at(lock: Path, descriptor: int) -> bool:
    """Return True if an open file is still the lock's."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    return False


def _remove_anothers(lock: Path) -> bool:
    """Remove what a killed run of another user left, if the folder lets this user. Raises ConfigError if it is held."""
    try:
        descriptor = os.open(lock, TO_READ)
    except OSError:
        return False
    try:
        holder, doubt = _state(lock, descriptor)
        if holder is None and doubt is None and _is_at(lock, descriptor):
            lock.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    if doubt is not None:
        try:
            holder = living([doubt]).get(lock)
        except OSError:
            return False
    if holder is not None:
        raise _is_held(holder, lock.parent)
    return True


def release(lock: Path, descriptor: int) -> None:
    """Remove the lock's file and let it go.

    A folder that was renamed meanwhile has another lock at this place, and so has one that another run has taken.
    """
    is_own = is_held(descriptor)
    stop_signs(descriptor)
    if is_own and _is_at(lock, descriptor):
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)
    os.close(descriptor)


def _try(descriptor: int) -> bool:
    """Lock an open file if nobody else has; return True if this process has it now."""
    try:
        fcntl.flock(descriptor, kind_of_lock(descriptor) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _lives(read_note(descriptor))
    return True


def _lives(note: Note) -> bool:
    """Return True if the holder is another process of this host that still runs."""
    if not note.is_of_this_host or note.holder.pid in (0, os.getpid()):
        return False
    return Path(f"/proc/{note.holder.pid}").exists()
