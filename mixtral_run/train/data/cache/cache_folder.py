"""The folder of token caches: where it is, who may write, and what is removed so that its size is bounded."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.errors import ConfigError, TrainingError
from mixtral_run.run_lock import reaches_other_hosts
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.cache.token_cache import (
    DESCRIPTION,
    FORMAT,
    CacheWriter,
    DamagedCacheError,
    Make,
    TokenCache,
    folder_bytes,
    open_cache,
)
from mixtral_run.weights.io.atomic_folder import writing_problems
from mixtral_run.weights.io.files import sync_path

NAME = ".mixtral-run-tokens"
NUM_LOCKS = 64
POLL_SECONDS = 0.2
NAME_LENGTH = 32


def default_folder(save: Path | None) -> Path:
    """Return the folder of token caches if none is given: next to SAVE, which is on a disk with space for results.

    If that cannot be written, as where SAVE itself is a mount point, the HF cache has it, else the folder for temporary
    files. Every process of a machine finds the same.
    """
    places = [save.absolute().parent / NAME] if save is not None else []
    if home := os.environ.get("HF_HOME"):
        places.append(Path(home) / NAME)
    for place in places:
        if not writing_problems(place, ""):
            return place
    return _own_temporary_folder(Path(tempfile.gettempdir()) / f"{NAME[1:]}-{os.getuid()}")


def _own_temporary_folder(path: Path) -> Path:
    """Create a folder for this user alone. Raises ConfigError if another user may have put something there."""
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700)
    try:
        found = path.lstat()
    except OSError as error:
        raise _unwritable(path, error) from error
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return path
    raise ConfigError(
        "The folder for token caches may have been filled by another user.",
        where=str(path),
        expected="a folder of this user, which no other user may write to",
        found=f"{stat.filemode(found.st_mode)}, owner {found.st_uid}",
        next_command="--data-cache FOLDER, a folder of your own",
    )


@dataclass(frozen=True)
class CacheFolder:
    """A folder of token caches, each named after a hash of its key.

    Attributes:
        path: the folder; created when it is needed.
        most_bytes: if the caches take more, those that were not used for the longest time are removed.
        patience_seconds: time without progress after which waiting for another process ends.
    """

    path: Path
    most_bytes: int
    patience_seconds: float

    def open_or_make(self, key: Mapping[str, Any], make: Make, report: Report, *, verify: bool) -> TokenCache:
        """Return the cache of a key; make it if it is missing or damaged.

        Of all processes that need it, on this machine and on others that share the folder, one makes it and the others
        wait. If that one ends early, another takes its place.

        Args:
            key: everything that determines the content, as JSON values.
            make: adds the examples.
            report: of this process; it also shows the progress of the process that is waited for.
            verify: compare the content of an existing cache with its checksums.

        Raises:
            ConfigError: the folder cannot be written.
            TrainingError: the process that makes the cache does not get on.
        """
        name = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()[:NAME_LENGTH]
        folder = self.path / name
        with contextlib.suppress(DamagedCacheError):
            if folder.is_dir():
                return open_cache(folder, verify=verify)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self._locked(name, report) as note:
                return self._make(folder, key, make, report, note)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _make(self, folder: Path, key: Mapping[str, Any], make: Make, report: Report, note: _Note) -> TokenCache:
        if folder.is_dir():
            # Another process made it meanwhile, or it is damaged.
            try:
                return open_cache(folder, verify=True)
            except DamagedCacheError as error:
                report.warn(f"The token cache {folder} is damaged and is made again ({error.found})")
                _remove(folder)
        if note.is_held:
            for left in self.path.glob(f".{folder.name}.*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        partial = self.path / f".{folder.name}.{socket.gethostname()}-{os.getpid()}.partial"
        partial.mkdir()
        try:
            writer = CacheWriter(partial)
            try:
                notes = make(writer, note.progress)
            finally:
                writer.close()
            writer.finish(key, notes)
            with contextlib.suppress(FileExistsError):
                _rename(partial, folder)
            sync_path(self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        cache = open_cache(folder, verify=False)
        self._make_space(folder, report)
        return cache

    def _make_space(self, newest: Path, report: Report) -> None:
        """Remove the caches that were not used for the longest time, and what dead processes left; report sizes."""
        for left in self.path.glob(".*.partial"):
            if left.is_dir() and left.name[1 : NAME_LENGTH + 1] != newest.name:
                self._remove_if_nobody_makes_it(left)
        sizes = {each: folder_bytes(each) for each in self._caches()}
        by_use = sorted(sizes, key=lambda each: (each == newest, _last_use(each)))
        removed = 0
        for each in by_use[:-1]:
            if sum(sizes.values()) <= self.most_bytes:
                break
            if _remove_unless_used(each):
                removed += sizes.pop(each)
        total = sum(sizes.values())
        report.say(
            f"Token cache: {_size(sizes.get(newest, 0))} in {newest}; all {len(sizes)} there take {_size(total)} of at "
            f"most {_size(self.most_bytes)} (--data-cache-gib); `rm -r {shlex.quote(str(self.path))}` removes all"
        )
        if removed:
            report.say(f"  {_size(removed)} of caches that were not used for the longest time were removed")
        if total > self.most_bytes:
            report.warn(f"The token caches in {self.path} take more than --data-cache-gib, and are in use")

    def _caches(self) -> list[Path]:
        return [each for each in self.path.iterdir() if len(each.name) == NAME_LENGTH and (each / DESCRIPTION).exists()]

    def _remove_if_nobody_makes_it(self, partial: Path) -> None:
        descriptor = os.open(self._lock_file(partial.name[1:]), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if reaches_other_hosts(descriptor):
                shutil.rmtree(partial, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(descriptor)

    def _lock_file(self, name: str) -> Path:
        """Return the lock file of a cache. A few files serve all, so that none need ever be removed."""
        try:
            number = int(name[:4], 16) % NUM_LOCKS
        except ValueError:
            number = 0
        return self.path / f".lock-{number:02d}"

    @contextmanager
    def _locked(self, name: str, report: Report) -> Iterator[_Note]:
        """Wait until no other process makes the cache. The end of a process, however it ends, ends its lock too."""
        file = self._lock_file(name)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        note = _Note(descriptor)
        seen, changed, told = "", time.monotonic(), time.monotonic()
        try:
            while not note.take():
                now, text = time.monotonic(), note.read()
                if text != seen:
                    seen, changed = text, now
                if now - changed > self.patience_seconds:
                    raise _stuck(file, seen, self.patience_seconds)
                if now - told > 5.0:
                    told = now
                    report.say(f"  waiting for another process that tokenizes the data: {seen or 'it has just begun'}")
                time.sleep(POLL_SECONDS)
            yield note
        finally:
            os.close(descriptor)


class _Note:
    """The content of a lock file: who holds the lock, and how far it is."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.is_held = False
        self._written = 0.0

    def take(self) -> bool:
        """Take the lock. Return False if another process has it, True as well where the file system has no locks.

        is_held: no process of any host makes the cache, so that what is there of it is a leftover.
        """
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_held = reaches_other_hosts(self._descriptor)
        except BlockingIOError:
            return False
        except OSError:
            pass
        self.progress("it has just begun", at_once=True)
        return True

    def read(self) -> str:
        with contextlib.suppress(OSError):
            return os.pread(self._descriptor, 300, 0).decode("utf-8", "replace").strip("\x00\n ")
        return ""

    def progress(self, text: str, *, at_once: bool = False) -> None:
        """Write for the processes that wait how far this one is, every two seconds."""
        if not at_once and time.monotonic() - self._written < 2.0:
            return
        self._written = time.monotonic()
        data = f"process {os.getpid()} on {socket.gethostname()}: {text}\n".encode()[:300]
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, data.ljust(300), 0)


def _stuck(file: Path, seen: str, seconds: float) -> TrainingError:
    return TrainingError(
        "Another process was to tokenize the data, and does not get on.",
        where=str(file),
        expected="progress",
        found=f"none for {seconds / 60:.0f} minutes ({seen or 'no word of it'})",
        next_command="end that process; or --data-cache with another folder",
    )


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    where = str(error.filename or folder)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(
            "The disk is full: the tokens of the data have no space.",
            where=where,
            expected="4 bytes for each token, which together are about as many bytes as the data file has",
            found=error.strerror,
            next_command="--data-cache FOLDER, on another disk",
        )
    return ConfigError(
        "The token cache cannot be written.",
        where=where,
        found=error.strerror or str(error),
        next_command="--data-cache FOLDER, which this user may write",
    )


def _rename(partial: Path, folder: Path) -> None:
    """Rename. Raises FileExistsError if another process was earlier, as may be without locks."""
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(*error.args) from error
        raise


def _last_use(folder: Path) -> float:
    try:
        return (folder / DESCRIPTION).stat().st_mtime
    except OSError:
        return 0.0


def _remove_unless_used(folder: Path) -> bool:
    """Remove a cache unless a process has it open. Return True if it was removed."""
    try:
        with (folder / DESCRIPTION).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
    except OSError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Take a cache out of use by a rename, then remove it."""
    aside = folder.parent / f".{folder.name}.removed-{os.getpid()}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
