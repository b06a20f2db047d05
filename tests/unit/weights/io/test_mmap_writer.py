"""Bytes written through mappings are in their places, whatever the windows, chunks and pages are."""

from __future__ import annotations

import itertools
import os
import random
import threading
from pathlib import Path

import pytest

from mixtral_run.weights.io import mmap_writer
from mixtral_run.weights.io.disk import is_in_memory
from mixtral_run.weights.io.mmap_writer import MappedWriter


@pytest.mark.parametrize("in_memory", [False, True])
def test_neighbors_write_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    monkeypatch.setattr(mmap_writer, "WINDOW_BYTES", 64 * 1024)
    file = (Path("/dev/shm") if in_memory else tmp_path) / f"mixtral-run-test-{os.getpid()}"
    source = random.Random(1).randbytes(1_000_003)
    ends = [0, 1, 4095, 4097, 200_000, 200_001, 700_000, len(source)]
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, len(source))

        def write(start: int, stop: int) -> None:
            writer = MappedWriter()
            for first in range(start, stop, 9_973):
                block = memoryview(source)[first : min(first + 9_973, stop)]
                assert writer.write(descriptor, (start, stop), first, block)
            writer.release()

        threads = [threading.Thread(target=write, args=limits) for limits in itertools.pairwise(ends)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert file.read_bytes() == source
    finally:
        os.close(descriptor)
        file.unlink()


def test_little_is_in_use_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    size = 5 * mmap_writer.WINDOW_BYTES
    with file.open("wb+") as stream:
        os.ftruncate(stream.fileno(), size)
        writer = MappedWriter()
        for first in range(0, size, 2**20):
            writer.write(stream.fileno(), (0, size), first, b"\1" * 2**20)
            assert resident(file) == mmap_writer.WINDOW_BYTES
        writer.release()
        assert str(file) not in Path("/proc/self/maps").read_text()
    assert file.read_bytes() == b"\1" * size


def resident(file: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    _, _, behind = Path("/proc/self/smaps").read_text().partition(str(file))
    return next(1024 * int(line.split()[1]) for line in behind.splitlines() if line.startswith("Rss:"))


def test_what_is_shorter_is_left_to_the_caller(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as stream:
        assert not MappedWriter().write(stream.fileno(), (0, 100), 0, b"\1" * 100)
    assert (tmp_path / "file").read_bytes() == b""


def test_a_kernel_that_makes_no_pages_is_left_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap_writer, "_MADV_POPULATE_WRITE", 9999)
    writer = MappedWriter()
    with (tmp_path / "file").open("wb+") as stream:
        os.ftruncate(stream.fileno(), 100)
        # Not the second time either, when the chunk is mapped already.
        assert not writer.write(stream.fileno(), (0, 100), 0, b"\1" * 50)
        assert not writer.write(stream.fileno(), (0, 100), 50, b"\1" * 50)


def test_which_files_lie_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_in_memory(Path("/dev/shm"))
    assert not is_in_memory(Path("/proc"))
    monkeypatch.setattr("mixtral_run.weights.io.disk._MOUNTS", tmp_path / "missing")
    assert not is_in_memory(Path("/dev/shm"))
