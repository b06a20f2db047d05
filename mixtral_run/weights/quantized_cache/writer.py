"""Begin and end the cache that layout.py describes: a complete folder is renamed into place.

Each rank writes its experts into the files with a Writer (write_experts.py).

No failure to write a cache ends a training run: it is raised as CacheNotWritten, with the reason for the warning.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mixtral_run.run_lock import reaches_other_hosts
from mixtral_run.weights.io.atomic_folder import GIB, free_bytes
from mixtral_run.weights.io.disk import allocate, is_in_memory
from mixtral_run.weights.io.files import sync_path
from mixtral_run.weights.manifest.manifest import is_kind, write_manifest
from mixtral_run.weights.quantized_cache.layout import KIND, Files, cache_folder


class CacheNotWritten(Exception):
    """Raised if no cache can be written. expected: another run writes it, or has written it; no warning is due."""

    def __init__(self, why: str, *, expected: bool = False) -> None:
        super().__init__(why)
        self.expected = expected


class CacheBuilder:
    """A cache that is being written. One process of a job begins and ends it; all write into `files` with a Writer.

    If several jobs on a host, or on hosts that share the disk, want the same cache, the holder of the lock writes it.
    """

    def __init__(self, final: Path, files: Files, lock: int, lock_file: Path) -> None:
        self.final = final
        self.files = files
        self._lock = lock
        self._lock_file = lock_file

    def commit(self, checksums: Mapping[str, int], **values: Any) -> None:
        """Write the manifest and rename the folder into place. Raises OSError; the caller then calls `abandon`."""
        # `begin` removed an unusable cache: the name is free, unless somebody else's folder took it meanwhile.
        write_manifest(
            self.files.folder, KIND, **values, tensors={name: f"{crc:08x}" for name, crc in checksums.items()}
        )
        sync_path(self.files.folder)
        self.files.folder.rename(self.final)
        sync_path(self.final.parent)
        self._release()

    def abandon(self) -> None:
        """Remove the unfinished folder and release the lock."""
        shutil.rmtree(self.files.folder, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            _unlock(self._lock, self._lock_file)
            self._lock = -1


def begin(base: Path, wanted: Files, reserve_bytes: int, is_there: Callable[[], bool]) -> CacheBuilder:
    """Take the lock, remove leftovers of earlier runs, and create the files with headers and reserved disk space.

    wanted: the files in their final folder, where no usable cache was found. is_there: True if there is one by now.
    reserve_bytes: disk space that the run itself will need. Raises CacheNotWritten.
    """
    final = cache_folder(base, wanted.precision)
    lock_file = base / f".{final.name}.lock"
    lock = _take_lock(lock_file)
    work = base / f".{final.name}.unfinished-{uuid.uuid4().hex[:12]}"
    try:
        if is_there():
            raise CacheNotWritten("another run has written them meanwhile", expected=True)
        # While the lock is held, no other run has an unfinished folder of this name.
        for left in base.glob(f".{final.name}.unfinished-*") if reaches_other_hosts(lock) else ():
            shutil.rmtree(left, ignore_errors=True)
        _clear(final)
        _check_disk_space(base, wanted.num_bytes, reserve_bytes)
        files = Files(work, wanted.architecture, wanted.precision)
        work.mkdir()
        # On tmpfs that would fill all of the memory with zeros before anything is read.
        reserve = not is_in_memory(base)
        for layer in range(files.architecture.num_layers):
            _begin_file(files, layer, reserve=reserve)
        return CacheBuilder(final, files, lock, lock_file)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        _unlock(lock, lock_file)
        if isinstance(error, OSError):
            raise CacheNotWritten(os_error_text(error)) from error
        raise


def os_error_text(error: OSError) -> str:
    """Return the file and the reason of an OSError in one line."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _clear(final: Path) -> None:
    """Remove a cache that was found to be unusable. Raises CacheNotWritten if the kit did not write the folder."""
    if not final.exists():
        return
    if not is_kind(final, KIND):
        raise CacheNotWritten(f"{final} was not written by mixtral-run, or is damaged: it can be removed by hand")
    shutil.rmtree(final)


def _check_disk_space(base: Path, needed: int, reserve_bytes: int) -> None:
    # A quarter more, because others write to the disk too: a full disk would stop them all.
    margin = max(GIB, needed // 4) + reserve_bytes
    free = free_bytes(base)
    if free < needed + margin:
        raise CacheNotWritten(
            f"expected {(needed + margin) / GIB:,.1f} GiB free, {margin / GIB:,.1f} of them to remain free; "
            f"found {free / GIB:,.1f}"
        )


def _begin_file(files: Files, layer: int, *, reserve: bool) -> None:
    descriptor = os.open(files.file(layer), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        size = files.file_bytes(layer)
        if reserve:
            allocate(descriptor, 0, size)
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, files.header(layer), 0)
    finally:
        os.close(descriptor)


def _take_lock(lock_file: Path) -> int:
    """Return an open, locked descriptor.

    The file is removed together with the lock, so the name is checked again once the lock is held.
    """
    while True:
        try:
            descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CacheNotWritten(os_error_text(error)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock_file.exists() and os.path.samestat(os.fstat(descriptor), lock_file.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise CacheNotWritten("another run is writing them", expected=True) from None
        except OSError as error:
            os.close(descriptor)
            # Without locks a run could not tell another run's unfinished folder from a leftover.
            raise CacheNotWritten(f"{lock_file.parent} cannot be locked: {error.strerror}") from error
        os.close(descriptor)


def _unlock(descriptor: int, lock_file: Path) -> None:
    with suppress(OSError):
        lock_file.unlink(missing_ok=True)
    os.close(descriptor)
