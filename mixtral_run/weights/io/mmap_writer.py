"""Write into files in memory (tmpfs) from several workers at once.

Linux admits one writer at a time to a file, whichever part is written or reserved. On a disk that costs nothing; on
tmpfs it limits the speed to 0.6 GB/s for each file in memory that was not touched before. Memory that is mapped into
the process needs no such lock: each worker populates and fills pages of its own.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from mixtral_run.weights.io.disk import C_LIBRARY

WINDOW_BYTES = 8 * 2**20
"""Mapped bytes in use at once for each chunk that a worker writes; they count as the process's memory meanwhile."""

_MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14


class MappedWriter:
    """One worker's chunks, mapped into the process. The files must have their final lengths."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[int, int], _Chunk] = {}

    def write(self, descriptor: int, limits: tuple[int, int], position: int, block: memoryview | bytes) -> bool:
        """Write a block at a position of a file opened for reading and writing; return False if it cannot be mapped.

        limits: first and last byte of the worker's own stretch of the file, which contains the block. Raises OSError if
        there is no memory left.
        """
        chunk = self._chunks.get((descriptor, limits[0]))
        if chunk is None:
            try:
                chunk = _Chunk(descriptor, limits)
            except (OSError, ValueError):  # no room for mappings; or the file is shorter
                return False
            self._chunks[descriptor, limits[0]] = chunk
        return chunk.write(position, np.frombuffer(block, np.uint8))

    def release(self) -> None:
        """Unmap all chunks."""
        self._chunks.clear()


class _Chunk:
    """A mapped stretch of a file, of which one window at a time has pages in the process."""

    def __init__(self, descriptor: int, limits: tuple[int, int]) -> None:
        self._first = limits[0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(descriptor, limits[1] - self._first, offset=self._first)
        self._bytes: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8)
        self._window = slice(0, 0)

    def write(self, position: int, data: NDArray[np.uint8]) -> bool:
        """Copy data to a position of the file; return False if the kernel cannot populate pages."""
        first = position - self._first
        while len(data):
            if not self._window.start <= first < self._window.stop and not self._move(first):
                return False
            target = self._bytes[first : self._window.stop][: len(data)]
            # numpy releases the interpreter's lock meanwhile; a slice assignment to the mmap would not.
            np.copyto(target, data[: len(target)])
            data = data[len(target) :]
            first += len(target)
        return True

    def _move(self, first: int) -> bool:
        """Populate the pages around a byte, and release the others.

        Without MADV_POPULATE_WRITE a page that finds no memory would kill the process when it is touched.
        """
        self._advise(mmap.MADV_DONTNEED)
        begin = first // WINDOW_BYTES * WINDOW_BYTES
        self._window = slice(begin, min(begin + WINDOW_BYTES, len(self._bytes)))
        number = self._advise(_MADV_POPULATE_WRITE)
        if number == 0:
            return True
        self._window = slice(0, 0)
        if number == errno.EINVAL:
            return False
        # Writing to the page would be a bus error: a full file system says no more than that here.
        number = errno.ENOSPC if number == errno.EFAULT else number
        raise OSError(number, os.strerror(number))

    def _advise(self, advice: int) -> int:
        """Call madvise; return the errno, 0 on success. The mmap's method would hold the interpreter's lock."""
        part = self._bytes[self._window]
        madvise = getattr(C_LIBRARY, "madvise", None)
        if madvise is None:
            return errno.EINVAL
        address, length = ctypes.c_void_p(part.ctypes.data), ctypes.c_size_t(part.nbytes)
        return 0 if not part.nbytes or madvise(address, length, advice) == 0 else ctypes.get_errno()
