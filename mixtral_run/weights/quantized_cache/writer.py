"""Writing the folder of layout.py: under another name, every rank its experts, renamed once all of it is on the disk.

Nothing here may end a training: what keeps the folder from being made is a `CannotKeep` with the reason in words.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isal.isal_zlib import crc32

from mixtral_run.weights.hf.safetensors_files import TensorEntry
from mixtral_run.weights.io.atomic_folder import GIB, free_bytes
from mixtral_run.weights.io.disk import allocate
from mixtral_run.weights.io.files import sync_path
from mixtral_run.weights.manifest.manifest import is_kind, write_manifest
from mixtral_run.weights.quantized_cache.layout import KIND, Files, kept_folder, tensor_name

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 8 * 2**20


class CannotKeep(Exception):
    """Why experts are not kept. `expected`: another run sees to it, or has; nobody need be warned."""

    def __init__(self, why: str, *, expected: bool = False) -> None:
        super().__init__(why)
        self.expected = expected


class Keeping:
    """A folder in the making. Made and ended by one process of a job; the others write into `files` with a Writer.

    Of several jobs on a host, or on hosts that share the disk, one holds the lock and makes the folder.
    """

    def __init__(self, final: Path, files: Files, lock: int, lock_file: Path) -> None:
        self.final = final
        self.files = files
        self._lock = lock
        self._lock_file = lock_file

    def commit(self, checksums: Mapping[str, int], **values: Any) -> None:
        """Write the record and put the folder in its place. Raises OSError; then `abandon`."""
        # What is of no use any more went when this began: the place is free, unless someone else's folder took it.
        write_manifest(
            self.files.folder, KIND, **values, tensors={name: f"{crc:08x}" for name, crc in checksums.items()}
        )
        sync_path(self.files.folder)
        self.files.folder.rename(self.final)
        sync_path(self.final.parent)
        self._release()

    def abandon(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.files.folder, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            _unlock(self._lock, self._lock_file)
            self._lock = -1


def begin(base: Path, wanted: Files, reserve_bytes: int, is_there: Callable[[], bool]) -> Keeping:
    """Take the lock, clear what earlier runs left, and make the files with their headers, room for the rest reserved.

    wanted: the files in their final folder, where nothing usable was found; is_there: whether something is by now.
    reserve_bytes: what the run itself will write to that disk. Raises CannotKeep.
    """
    final = kept_folder(base, wanted.precision)
    lock_file = base / f".{final.name}.lock"
    lock = _take_lock(lock_file)
    work = base / f".{final.name}.unfinished-{uuid.uuid4().hex[:12]}"
    try:
        if is_there():
            raise CannotKeep("another run has kept them meanwhile", expected=True)
        # While the lock is held no other run's work has such a name.
        for left in base.glob(f".{final.name}.unfinished-*"):
            shutil.rmtree(left, ignore_errors=True)
        _clear(final)
        _check_room(base, wanted.num_bytes, reserve_bytes)
        files = Files(work, wanted.architecture, wanted.precision)
        work.mkdir()
        for layer in range(files.architecture.num_layers):
            _begin_file(files, layer)
        return Keeping(final, files, lock, lock_file)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        _unlock(lock, lock_file)
        if isinstance(error, OSError):
            raise CannotKeep(in_words(error)) from error
        raise


def in_words(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _clear(final: Path) -> None:
    """Make the place free: a folder of ours was found to be of no use."""
    if not final.exists():
        return
    if not is_kind(final, KIND):
        raise CannotKeep(f"{final} is none of this kit's, or damaged: it can be removed by hand")
    shutil.rmtree(final)


def _check_room(base: Path, needed: int, reserve_bytes: int) -> None:
    # A quarter more, as others write to the disk too: a full one would stop them all.
    margin = max(GIB, needed // 4) + reserve_bytes
    free = free_bytes(base)
    if free < needed + margin:
        raise CannotKeep(
            f"expected {(needed + margin) / GIB:,.1f} GiB free, {margin / GIB:,.1f} of them to be left; "
            f"found {free / GIB:,.1f}"
        )


def _begin_file(files: Files, layer: int) -> None:
    descriptor = os.open(files.file(layer), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        size = files.file_bytes(layer)
        allocate(descriptor, 0, size)
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, files.header(layer), 0)
    finally:
        os.close(descriptor)


def _take_lock(lock_file: Path) -> int:
    """An open, locked descriptor. The file is removed with the lock: whoever opened it before has to look again."""
    while True:
        try:
            descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CannotKeep(in_words(error)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock_file.exists() and os.path.samestat(os.fstat(descriptor), lock_file.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise CannotKeep("another run is keeping them", expected=True) from None
        except OSError as error:
            os.close(descriptor)
            # Without locks a run could not tell another's work from what was left behind.
            raise CannotKeep(f"{lock_file.parent} cannot be locked: {error.strerror}") from error
        os.close(descriptor)


def _unlock(descriptor: int, lock_file: Path) -> None:
    with suppress(OSError):
        lock_file.unlink(missing_ok=True)
    os.close(descriptor)


class Writer:
    """One rank's part of the writing: beside the work, in a thread, at most a layer's experts behind.

    first_expert: the number of the first that this rank holds. What fails is kept as `failure`, and nothing more is
    written.
    """

    def __init__(self, files: Files, first_expert: int) -> None:
        self._files = files
        self._first = first_expert
        self._pool = ThreadPoolExecutor(1, "keep")
        self._pending: Future[None] | None = None
        self.checksums: dict[str, int] = {}
        self.failure: str | None = None

    def add(self, layer: int, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        """A layer's experts: (linear, part) → [local experts, …], which must stay as they are.

        Returns once the layer before is written.
        """
        mesh = {key: tensor.cpu() for key, tensor in tensors.items()} if self.failure is None else {}
        self._wait()
        if self.failure is None:
            self._pending = self._pool.submit(self._write, layer, mesh)

    def finish(self) -> None:
        """Until everything added is on the disk, or has failed."""
        self._wait()
        self._pool.shutdown()

    def _wait(self) -> None:
        if self._pending is None:
            return
        error = self._pending.exception()
        self._pending = None
        if isinstance(error, OSError):
            self.failure = in_words(error)
        elif error is not None:
            raise error

    def _write(self, layer: int, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        entries = self._files.entries(layer)
        descriptor = os.open(self._files.file(layer), os.O_WRONLY)
        try:
            for (linear, part), stacked in tensors.items():
                for index, tensor in enumerate(stacked.unbind(0)):
                    name = tensor_name(layer, self._first + index, linear, part)
                    self.checksums[name] = _write_tensor(descriptor, entries[name], tensor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_tensor(descriptor: int, entry: TensorEntry, tensor: Tensor) -> int:
    """CRC-32 of what was written."""
    import torch

    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data.cast("B")
    assert len(data) == entry.num_bytes, f"{entry.name}: {len(data)} bytes for {entry.num_bytes}"
    crc, done = 0, 0
    while done < len(data):
        block = data[done : done + BLOCK_BYTES]
        written = os.pwrite(descriptor, block, entry.start + done)
        crc = crc32(block[:written], crc)
        done += written
    return crc
