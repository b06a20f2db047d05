"""Writing into files that lie in memory, where several workers write into one.

Linux lets one writer at a time into a file, whatever part of it is written. On a disk that costs nothing; in memory
(tmpfs) it is the limit: 0.6 GB/s a file, in memory that the machine had not touched before. What is mapped into the
process needs no such turn: each worker fills pages of its own.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_BYTES = 8 * 2**20
"""Mapped at once for each chunk that a worker writes: as much counts as the process's memory meanwhile."""

_MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14


@dataclass(frozen=True)
class _Window:
    first: int
    bytes: NDArray[np.uint8]

    def holds(self, position: int) -> bool:
        return self.first <= position < self.first + len(self.bytes)


class MappedWriter:
    """One worker's windows into the files. Their parts that it writes must have been allocated before."""

    def __init__(self) -> None:
        self._windows: dict[tuple[int, int], _Window] = {}

    def write(self, descriptor: int, limits: tuple[int, int], position: int, block: memoryview | bytes) -> bool:
        """Put a block of bytes at a position of a file opened for reading and writing; False where it cannot be mapped.

        limits: where the allocated stretch of the file begins and ends in which the block lies, the worker's own.
        """
        data = np.frombuffer(block, np.uint8)
        while len(data):
            try:
                window = self._window(descriptor, limits, position)
            except (OSError, ValueError):  # no room for mappings; or the file is shorter, as nothing could be allocated
                return False
            target = window.bytes[position - window.first :][: len(data)]
            # numpy lets go of the interpreter's lock meanwhile; a slice assignment of mmap's own would not.
            np.copyto(target, data[: len(target)])
            data = data[len(target) :]
            position += len(target)
        return True

    def release(self) -> None:
        """Unmap all windows."""
        self._windows.clear()

    def _window(self, descriptor: int, limits: tuple[int, int], position: int) -> _Window:
        start, stop = limits
        kept = self._windows.pop((descriptor, start), None)
        if kept is None or not kept.holds(position):
            page = mmap.ALLOCATIONGRANULARITY
            begin = position // WINDOW_BYTES * WINDOW_BYTES
            first = max(begin, start // page * page)
            mapped = mmap.mmap(descriptor, min(begin + WINDOW_BYTES, stop) - first, offset=first)
            _fill(mapped)
            kept = _Window(first, np.frombuffer(mapped, np.uint8))
        self._windows[descriptor, start] = kept
        return kept


def _fill(mapped: mmap.mmap) -> None:
    """Give it its pages at once, not one by one as they are touched, where the kernel knows how."""
    try:
        mapped.madvise(_MADV_POPULATE_WRITE)
    except OSError:
        return
