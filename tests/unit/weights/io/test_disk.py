"""Reserving space in a file, on disks with and without space."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from mixtral_run.weights.io import cgroup, disk


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


GIB = 2**30
POD = "/kubepods.slice/pod-1/container"


def group(folder: Path, limit: str, used: int, inactive: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"active_file 5\n{names[2]} {inactive}\ninactive_anon 7\n")


@pytest.mark.parametrize(
    ("lines", "root", "names"),
    [
        ("0::{}\n", ".", ("memory.max", "memory.current", "inactive_file")),
        (
            "9:cpu,cpuacct:/other\n4:hugetlb,memory:{}\n0::/init.scope\n",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_what_a_container_uses_already_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, root: str, names: tuple[str, str, str]
) -> None:
    """A pod of 900 GiB whose training holds 530 GiB has no place for a copy of 609 GiB."""
    own = tmp_path / "own"
    monkeypatch.setattr(cgroup, "_OWN", own)
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path)
    (tmp_path / "meminfo").write_text(f"MemAvailable: {1500 * GIB // 1024} kB\n")
    monkeypatch.setattr(disk, "_MEMORY", tmp_path / "meminfo")
    assert disk.available_bytes() == 1500 * GIB
    top = tmp_path / root
    # The container sees its own group as the root, and in /proc/self/cgroup perhaps a path of the host.
    group(top, str(900 * GIB), 550 * GIB, 20 * GIB, names)
    for path in ("/", POD, "/../other"):
        own.write_text(lines.format(path))
        assert disk.available_bytes() == 370 * GIB
    # On the host all groups of the path count, and the unlimited root does not.
    group(top, "max", 0, 0, names)
    own.write_text(lines.format(POD))
    assert disk.available_bytes() == 1500 * GIB
    group(top / POD[1:], "max", 9, 0, names)
    group((top / POD[1:]).parent, str(100 * GIB), 40 * GIB, 0, names)
    assert disk.available_bytes() == 60 * GIB
    # A group that is full is not one that says nothing.
    group(top / POD[1:], str(GIB), GIB, 0, names)
    assert disk.available_bytes() == 1
