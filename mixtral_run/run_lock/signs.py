"""Signs of life, where the locks of a file system do not reach other hosts.

A holder changes the counter of its note every few seconds, and reads it by its path before: another run that took it
for dead has put a note of its own there, and then the holder ends. A run that finds a foreign note waits for a change.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mixtral_run.errors import HostError, MixtralRunError
from mixtral_run.run_lock.mounts import cache_seconds_of, reaches_other_hosts
from mixtral_run.run_lock.note import LARGEST_NOTE, TO_READ, UNKNOWN, Holder, Note, removal_of

BEAT_SECONDS, SILENT_SECONDS, SETTLE_SECONDS = 10.0, 45.0, 1.0
"""Time between two signs of life; time without one after which a holder is dead; time for another's note to show."""
LOOK_SECONDS, QUICK_SECONDS = 1.0, 5.0
"""Time between two looks at a foreign note. Two looks count as silence only if this longer time covers both."""
MOST_SLOW_LOOKS = 10
"""A storage that answers slowly this often leaves it open whether a holder lives."""
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)

Watcher = Callable[[MixtralRunError], object]
_watched: dict[int, OwnSigns] = {}
"""The signs of life of each lock that needs them, by its descriptor."""
_report: list[Watcher] = []
_announced: set[tuple[Path, str]] = set()
"""Locks and the tokens of their notes, for which this process has printed that it waits."""


def report_loss_with(function: Watcher) -> None:
    """Call a function with the error, in the place of printing it, before a process ends that has lost its lock."""
    _report[:] = [function]


def _end(error: MixtralRunError) -> None:
    """End this process at once: whatever it still wrote would be in the folder of another run."""
    try:
        for report in _report or [lambda each: print(f"mixtral-run: {each}", file=sys.stderr, flush=True)]:
            report(error)
    finally:
        os._exit(error.exit_code)


class OwnSigns:
    """The note of a lock of this process, and the thread that changes its counter."""

    def __init__(self, lock: Path, descriptor: int, note: Note) -> None:
        self._lock, self._descriptor, self._note = lock, descriptor, note
        self._counter = 0
        self._over = threading.Event()
        self._writing = threading.Lock()

    def write(self) -> None:
        """Write the note with its next counter. Raises OSError."""
        self._counter += 1
        os.pwrite(self._descriptor, self._note.to_bytes(self._counter), 0)
        os.fsync(self._descriptor)

    def start(self) -> None:
        """Begin to give signs of life."""
        _watched[self._descriptor] = self
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def stop(self) -> None:
        """End the signs of life. The descriptor may be closed afterwards."""
        self._over.set()
        _watched.pop(self._descriptor, None)
        with self._writing:
            pass

    def is_own(self) -> bool:
        """Return True if the lock's file has the note of this process. Raises OSError if the storage does not say."""
        return self._found() is None

    def check(self) -> None:
        """Raise HostError if another run has the lock now, and OSError if the storage does not say."""
        found = self._found()
        if found is not None:
            raise HostError(
                "Another run has taken the place that this run writes to, so this run ends.",
                where=str(self._lock.parent),
                expected=f"the lock of {self._note.holder}",
                found=found,
                next_command="find out why this host gave no signs of life (it was suspended, or cut off from the "
                "storage), or who removed the lock; then the same command once no other run writes there",
            )

    def _found(self) -> str | None:
        """Return None if the note is this process's own, else what is in its place."""
        with self._writing:
            try:
                note = Note.from_bytes(read_by_path(self._lock))
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                return "no lock"
        return None if note.token == self._note.token else str(note.holder)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self.check()
                with self._writing:
                    if not self._over.is_set():
                        self.write()
            except HostError as error:
                if not self._over.is_set():
                    _end(error)
                return
            except OSError:
                # The storage is away. If another run takes the place meanwhile, a later look shows it.
                continue


def stop_signs(descriptor: int) -> None:
    """End the signs of life of a lock, before its folder is renamed or removed."""
    if descriptor in _watched:
        _watched[descriptor].stop()


def is_held(descriptor: int) -> bool:
    """Return False if another run has taken a lock of this process meanwhile, or the storage does not say."""
    with contextlib.suppress(OSError):
        return descriptor not in _watched or _watched[descriptor].is_own()
    return False


def check_held() -> None:
    """Raise HostError if another run has taken a lock of this process meanwhile.

    Call it just before a rename that gives a result its name. Costs nothing where locks reach other hosts.
    """
    for each in tuple(_watched.values()):
        each.check()


def read_by_path(lock: Path) -> bytes:
    """Return the content of a lock's file. NFS asks its server for it when a file is opened. Raises OSError."""
    return _look(lock)[2]


def _look(lock: Path) -> tuple[int, int, bytes]:
    """Return what changes with each sign of life: the file, its time, and its content. Raises OSError."""
    descriptor = os.open(lock, TO_READ)
    try:
        status = os.fstat(descriptor)
        return status.st_ino, status.st_mtime_ns, os.pread(descriptor, LARGEST_NOTE, 0)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Doubt:
    """A lock that another host may hold. seconds: silence that shows that it does not; None if none shows it."""

    lock: Path
    holder: Holder
    first: tuple[int, int, bytes]
    seconds: float | None


def doubt_of(lock: Path, descriptor: int) -> Doubt | None:
    """Return the holder on another host that the note of an open lock names, unless locks reach other hosts.

    An empty note is one that another host may be writing.
    """
    if reaches_other_hosts(descriptor):
        return None
    status = os.fstat(descriptor)
    first = (status.st_ino, status.st_mtime_ns, os.pread(descriptor, LARGEST_NOTE, 0))
    note = Note.from_bytes(first[2])
    if note.is_of_this_host and note.holder != UNKNOWN:
        return None
    cached = cache_seconds_of(descriptor)
    holder = replace(note.holder, remove=removal_of(lock))
    return Doubt(lock, holder, first, None if cached is None else SILENT_SECONDS + cached)


def living(doubts: Sequence[Doubt]) -> dict[Path, Holder]:
    """Return the holders that live or may live, at once if all do. Remove the locks of the others.

    All locks are looked at together. Only time between quick looks is silence of a holder: while the storage does not
    answer, or this process is suspended, no sign of life could be seen. Raises OSError if a lock cannot be removed.
    """
    waiting = {each.lock: each for each in doubts if each.seconds is not None}
    alive = {each.lock: each.holder for each in doubts if each.seconds is None}
    if waiting:
        _announce(tuple(waiting.values()))
    since = last = time.monotonic()
    slow = 0
    while waiting:
        time.sleep(min(LOOK_SECONDS, SILENT_SECONDS / 10))
        failed = _look_at_all(waiting, alive)
        now = time.monotonic()
        if failed or now - last > QUICK_SECONDS:
            since, slow = now, slow + 1
            if slow == MOST_SLOW_LOOKS:
                return alive | {lock: each.holder for lock, each in waiting.items()}
        last = now
        for lock, each in tuple(waiting.items()):
            if each.seconds is not None and now - since >= each.seconds:
                del waiting[lock]
                if not _removed(each):
                    alive[lock] = each.holder
    return alive


def _announce(doubts: Sequence[Doubt]) -> None:
    new = [each for each in doubts if (each.lock, Note.from_bytes(each.first[2]).token) not in _announced]
    _announced.update((each.lock, Note.from_bytes(each.first[2]).token) for each in doubts)
    if not new:
        return
    first = new[0]
    others = f", and {len(new) - 1} more locks by others" if len(new) > 1 else ""
    longest = max(each.seconds or 0.0 for each in new)
    print(
        f"mixtral-run: {first.lock.parent} may be in use by {first.holder}{others}; waiting up to {longest:.0f} s for "
        "a sign of life, as this file system has no locks between hosts",
        file=sys.stderr,
    )


def _look_at_all(waiting: dict[Path, Doubt], alive: dict[Path, Holder]) -> bool:
    """Take away the locks that are gone, and those with a sign of life. Return True if a look failed."""
    failed = False
    for lock, each in tuple(waiting.items()):
        try:
            changed = _look(lock) != each.first
        except FileNotFoundError:
            del waiting[lock]
        except OSError:
            failed = True
        else:
            if changed:
                del waiting[lock]
                alive[lock] = replace(each.holder, remove="")
    return failed


def _removed(doubt: Doubt) -> bool:
    """Remove the lock of a dead holder. Return False if it gave a sign of life at last."""
    try:
        if _look(doubt.lock) != doubt.first:
            return False
        doubt.lock.unlink()
    except FileNotFoundError:
        pass
    return True
