"""Reserving space in a file, on disks with and without space."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from mixtral_run.weights.io import disk


def test_room_is_reserved_and_what_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    descriptor = os.open(path, os.O_RDWR)
    disk.allocate(descriptor, 4096, 100_000)
    disk.drop_from_cache(descriptor)
    assert os.pread(descriptor, 3, 0) == b"abc"
    assert os.fstat(descriptor).st_blocks * 512 >= 100_000
    os.close(descriptor)


@pytest.mark.parametrize(("number", "raises"), [(errno.ENOSPC, True), (errno.EOPNOTSUPP, False)])
def test_a_full_disk_raises_and_one_that_cannot_reserve_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    class Library:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(disk, "C_LIBRARY", Library)
    with (tmp_path / "file").open("wb") as file:
        if raises:
            with pytest.raises(OSError, match="No space left"):
                disk.allocate(file.fileno(), 0, 1)
        else:
            disk.allocate(file.fileno(), 0, 1)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")
    monkeypatch.setattr(disk, "_CGROUP_LIMITS", (limit,))
    assert disk.fits_in_memory(999_999)
    assert not disk.fits_in_memory(1_000_001)
    limit.write_text("max\n")
    assert disk.fits_in_memory(1_000_001)
