"""Copy single files to a store and back, in blocks, with a checksum of every byte.

A file is the unit that is resumed on the way there: a store shows no object before it is complete. On the way back a
file continues within itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from isal.isal_zlib import crc32

from mixtral_run.errors import WeightsError
from mixtral_run.weights.io.atomic_folder import GIB, free_bytes
from mixtral_run.weights.io.daemon_threads import map_in_daemons
from mixtral_run.weights.store.folder import BLOCK_BYTES, MOST_PARTS, StoredObject, StoreFolder
from mixtral_run.weights.store.marker import FileRecord
from mixtral_run.weights.store.problems import LocalFileError, repeated

THREADS = 4
"""Files that are copied at the same time; each holds a few blocks in memory."""
PARTIAL = ".partial"

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Gate = Callable[[], object]
"""Called before each block; raises to end the copy."""
Advance = Callable[[int], object]
"""Called with the bytes that were copied."""


def _nothing(num_bytes: int = 0) -> None:
    del num_bytes


def send(store: StoreFolder, name: str, file: Path, gate: Gate = _nothing) -> tuple[FileRecord, StoredObject]:
    """Copy a file to the object `name`. Return its size and checksum, and what the store lists.

    Raises LocalFileError if the file cannot be read, else what the store's client raises.
    """
    return repeated(lambda: _send_once(store, name, file, gate))


def _send_once(store: StoreFolder, name: str, file: Path, gate: Gate) -> tuple[FileRecord, StoredObject]:
    gate()
    with _of_this_machine(file):
        source = file.open("rb")
        block_bytes = max(BLOCK_BYTES, -(-os.fstat(source.fileno()).st_size // MOST_PARTS))
    crc = size = 0
    with source:
        # Not as a context: its end would complete the object after an error, too.
        target = store.fs.open(store.path(name), "wb", block_size=block_bytes)
        try:
            while block := _read(source, file, block_bytes):
                gate()
                crc, size = crc32(block, crc), size + len(block)
                target.write(block)
            target.close()
        except BaseException:
            _abandon(target)
            raise
    found = store.look(name)
    if found is None or found.size != size:
        raise OSError(f"{name}: {size:,} bytes were sent, and the store lists {found.size if found else 'no'} bytes")
    return FileRecord(size, f"{crc:08x}"), found


@contextmanager
def _of_this_machine(file: Path) -> Iterator[None]:
    """Raise LocalFileError for an OSError of a file of this machine, which is none of the store."""
    try:
        yield
    except OSError as error:
        raise LocalFileError(f"{file}: {error.strerror}") from error


def _read(source: Any, file: Path, num_bytes: int) -> bytes:
    with _of_this_machine(file):
        content: bytes = source.read(num_bytes)
    return content


def _abandon(target: Any) -> None:
    """Give up an object that is being written, so that nothing appears in the store. Its errors do not count."""
    with contextlib.suppress(Exception):
        target.discard()
    with contextlib.suppress(Exception):
        target.closed = True


def check_space(folder: Path, num_bytes: int, url: str) -> None:
    """Raise WeightsError if so many bytes do not fit on the disk of a folder."""
    free = free_bytes(folder)
    if num_bytes > free:
        raise WeightsError(
            "There is no space for the copy.",
            where=f"{url} to {folder}",
            expected=f"{num_bytes / GIB:,.2f} GiB free ({num_bytes:,} bytes)",
            found=f"{free / GIB:,.2f} GiB ({free:,} bytes)",
            next_command="MIXTRAL_RUN_STORE_CACHE=/a/larger/disk in the environment, then the same command",
        )


def receive(store: StoreFolder, name: str, file: Path, record: FileRecord | int, advance: Advance = _nothing) -> str:
    """Copy an object to a file, and return its CRC-32. A part that an earlier call left is continued.

    record: size and checksum, or the size alone. The file appears when it is complete. Raises WeightsError if the
    object is not what the record says.
    """
    size = record if isinstance(record, int) else record.size
    with _of_this_machine(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + PARTIAL)
    for attempt in (1, 2):
        crc = _receive_once(store, name, partial, size, advance)
        if isinstance(record, int) or crc == record.crc32:
            break
        # A part of an earlier object of this name may have been continued.
        partial.unlink()
        if attempt == 2:
            raise WeightsError(
                "A file in the store is damaged.",
                where=f"{store.url}/{name}",
                expected=f"{size:,} bytes with checksum {record.crc32}",
                found=f"checksum {crc}",
            )
    partial.rename(file)
    return crc


def _receive_once(store: StoreFolder, name: str, partial: Path, size: int, advance: Advance) -> str:
    crc = done = 0
    with _of_this_machine(partial):
        target = partial.open("a+b")
    with target:
        with _of_this_machine(partial):
            if target.tell() > size:
                target.truncate(0)
            target.seek(0)
        while block := _read(target, partial, BLOCK_BYTES):
            crc, done = crc32(block, crc), done + len(block)
        advance(done)
        while done < size:
            block = store.read_range(name, done, min(done + BLOCK_BYTES, size))
            if not block:
                raise WeightsError(
                    "A file in the store is too short.",
                    where=f"{store.url}/{name}",
                    expected=f"{size:,} bytes",
                    found=f"{done:,} bytes",
                )
            with _of_this_machine(partial):
                target.write(block)
            crc, done = crc32(block, crc), done + len(block)
            advance(len(block))
        with _of_this_machine(partial):
            target.flush()
            os.fsync(target.fileno())
    return f"{crc:08x}"


def receive_all(
    store: StoreFolder, files: Mapping[str, FileRecord | int], folder: Path, advance: Advance = _nothing
) -> dict[str, str]:
    """Copy objects into a folder, several at a time. Return their checksums by name. Raises as `receive` does."""

    def one(item: tuple[str, FileRecord | int]) -> tuple[str, str]:
        return item[0], receive(store, item[0], folder / item[0], item[1], advance)

    return dict(side_by_side(one, list(files.items())))


def side_by_side(work: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
    """Return the results of `work` for each item, from a few threads. The first error ends what has not begun."""
    # A run's mirror calls this in a daemon thread: a store that does not answer must not keep the process.
    return map_in_daemons(work, items, THREADS, "store")
