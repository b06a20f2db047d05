"""Calls of the system one by one: what they are asked, each of their answers, and numbers of the kernel's headers."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mixtral_run.errors import WeightsError
from mixtral_run.run_lock import LOCK_NAME
from mixtral_run.weights.io import cgroup, crc, disk, files, interrupts, mmap_writer, pace, pread
from mixtral_run.weights.io.atomic_folder import Staging
from mixtral_run.weights.io.pace import Pace, Workers


def library(monkeypatch: pytest.MonkeyPatch, name: str, answer: int, number: int = 0) -> list[tuple[Any, ...]]:
    """Play a function of the C library. Return what it is asked."""
    asked: list[tuple[Any, ...]] = []

    def function(*given: Any) -> int:
        asked.append(tuple(getattr(each, "value", each) for each in given))
        ctypes.set_errno(number)
        return answer

    monkeypatch.setattr(disk, "C_LIBRARY", SimpleNamespace(**{name: function}))
    return asked


@pytest.mark.parametrize("answer", [-1, 1])
@pytest.mark.parametrize(
    ("number", "raises"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False), (errno.EINTR, False)]
)
def test_space_that_cannot_be_reserved(monkeypatch: pytest.MonkeyPatch, answer: int, number: int, raises: bool) -> None:
    asked = library(monkeypatch, "fallocate", answer, number)
    if raises:
        with pytest.raises(OSError, match=os.strerror(number)):
            disk.allocate(7, 10, 20, keep_size=True)
    else:
        disk.allocate(7, 10, 20, keep_size=True)
    assert asked == [(7, 1, 10, 20)]


def test_space_is_reserved_with_or_without_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = library(monkeypatch, "fallocate", 0, errno.ENOSPC)
    disk.allocate(7, 2**33, 2**34)
    assert asked == [(7, 0, 2**33, 2**34)]
    library(monkeypatch, "other", 0)
    disk.allocate(7, 10, 20)


@pytest.mark.parametrize(("answer", "done"), [(0, True), (-1, False), (1, False)])
def test_two_folders_are_exchanged(monkeypatch: pytest.MonkeyPatch, answer: int, done: bool) -> None:
    asked = library(monkeypatch, "renameat2", answer)
    assert disk.exchange(Path("/a"), Path("/b")) is done
    # AT_FDCWD and RENAME_EXCHANGE.
    assert asked == [(-100, b"/a", -100, b"/b", 2)]
    library(monkeypatch, "other", 0)
    assert not disk.exchange(Path("/a"), Path("/b"))


def test_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In kB of 1,024 bytes; 0 where nothing is known, and at least 1 where something is."""
    monkeypatch.setattr(disk, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(disk, "free_in_cgroups", lambda: None)
    assert disk.available_bytes() == 0 and not disk.fits_in_memory(0)
    (tmp_path / "meminfo").write_text("MemFree: 9 kB\nMemAvailable:    3 kB\nOther: 1 kB\n")
    assert disk.available_bytes() == 3072
    assert [disk.fits_in_memory(each) for each in (3071, 3072)] == [True, False]
    for free, expected in ((5, 5), (0, 1), (4000, 3072)):
        monkeypatch.setattr(disk, "free_in_cgroups", lambda free=free: free)
        assert disk.available_bytes() == expected


def test_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_OWN", tmp_path / "own")
    assert cgroup._own_paths() == {}
    (tmp_path / "own").write_text("4:memory,hugetlb:/a:b\n0::/c\nodd:line\n")
    assert cgroup._own_paths() == {"memory": "/a:b", "hugetlb": "/a:b", "": "/c"}
    found = [str(each) for each in cgroup._up_to(Path("/r"), "/a//b")]
    assert found == ["/r/a/b", "/r/a", "/r"]
    for outside in (None, "", "/a/../b"):
        assert list(cgroup._up_to(Path("/r"), outside)) == [Path("/r")]
    for text, number in (("max", None), ("", None), ("-1", None), ("12\n", 12)):
        (tmp_path / "number").write_text(text)
        assert cgroup._number(tmp_path / "number") == number
    (tmp_path / "memory.max").write_text("100")
    assert cgroup._free_in(tmp_path, cgroup._V2) == 100
    for used, inactive, free in ((30, 0, 70), (30, 10, 80), (30, 40, 100), (100, 0, 0), (120, 0, 0)):
        (tmp_path / "memory.current").write_text(str(used))
        (tmp_path / "memory.stat").write_text(f"inactive_file {inactive}\ninactive_files 5\n")
        assert cgroup._free_in(tmp_path, cgroup._V2) == free


@pytest.mark.parametrize(
    ("number", "later", "ends"),
    [
        (signal.SIGINT, 0.31, True),
        (signal.SIGINT, 0.29, False),
        (signal.SIGTERM, 5.0, False),
    ],
)
def test_a_second_ctrl_c_ends_at_once_unless_it_is_the_first_again(
    monkeypatch: pytest.MonkeyPatch, number: int, later: float, ends: bool
) -> None:
    done: list[Any] = []
    now = [100.0]
    monkeypatch.setattr(interrupts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(interrupts.signal, "signal", lambda *given: done.append(given))
    monkeypatch.setattr(interrupts.os, "kill", lambda *given: done.append(given))
    found = interrupts.Interrupts()
    with pytest.raises(KeyboardInterrupt):
        found.hear(signal.SIGTERM, None)
    assert done == [] and found.seconds == 0.0
    now[0] += later
    assert found.seconds == pytest.approx(later)
    found.hear(number, None)
    assert done == ([(number, signal.SIG_DFL), (os.getpid(), number)] if ends else [])


@pytest.mark.parametrize(
    ("number", "outcome"),
    [(0, True), (errno.EINVAL, False), (errno.EFAULT, errno.ENOSPC), (errno.ENOMEM, errno.ENOMEM)],
)
def test_pages_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, number: int, outcome: Any) -> None:
    monkeypatch.setattr(mmap_writer, "WINDOW_BYTES", 4)
    chunk = object.__new__(mmap_writer._Chunk)
    chunk._bytes, chunk._window = np.zeros(10, np.uint8), slice(0, 4)
    asked: list[Any] = []

    def advise(advice: int) -> int:
        asked.append((advice, chunk._window))
        return number if advice == 23 else 0  # MADV_POPULATE_WRITE

    monkeypatch.setattr(chunk, "_advise", advise)
    if isinstance(outcome, bool):
        assert chunk._move(9) is outcome
    else:
        with pytest.raises(OSError, match=os.strerror(outcome)) as caught:
            chunk._move(9)
        assert caught.value.errno == outcome
    # MADV_DONTNEED for the window before; then the window around byte 9, which ends with the chunk.
    assert asked == [(4, slice(0, 4)), (23, slice(8, 10))]
    assert chunk._window == (slice(8, 10) if number == 0 else slice(0, 0))


def test_a_block_is_written_through_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap_writer, "WINDOW_BYTES", 4)
    chunk = object.__new__(mmap_writer._Chunk)
    chunk._bytes, chunk._window, chunk._first = np.zeros(10, np.uint8), slice(0, 0), 100
    moves: list[int] = []
    move = chunk._move
    monkeypatch.setattr(chunk, "_advise", lambda _: 0)
    monkeypatch.setattr(chunk, "_move", lambda first: (moves.append(first), move(first))[1])
    assert chunk.write(103, np.arange(1, 8, dtype=np.uint8))
    assert chunk._bytes.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7] and moves == [3, 4, 8]
    assert chunk.write(108, np.array([9], np.uint8)) and moves == [3, 4, 8]
    assert chunk.write(107, np.array([8], np.uint8)) and moves == [3, 4, 8, 7]
    assert chunk._bytes.tolist() == [0, 0, 0, 1, 2, 3, 4, 8, 9, 7]


def test_reads_that_are_short_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    content, asked = b"0123456789", []

    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        asked.append((descriptor, len(buffers[0]), position))
        count = min(3, len(buffers[0]), len(content) - position)
        buffers[0][:count] = content[position : position + count]
        return count

    monkeypatch.setattr(pread.os, "preadv", preadv)
    block = bytearray(7)
    pread.read_whole(5, memoryview(block), 2, Path("file"))
    assert block == b"2345678" and asked == [(5, 7, 2), (5, 4, 5), (5, 1, 8)]
    with pytest.raises(WeightsError, match="became shorter"):
        pread.read_whole(5, memoryview(block), 4, Path("file"))

    def broken(_: int, buffers: list[memoryview], position: int) -> int:
        if position > 1002:
            raise OSError(errno.EIO, "Input/output error")
        return 3

    monkeypatch.setattr(pread.os, "preadv", broken)
    with pytest.raises(WeightsError) as caught:
        pread.read_whole(5, memoryview(block), 1000, Path("file"))
    assert (caught.value.where, caught.value.found) == ("file, byte 1,003", "Input/output error")


def test_workers_above_the_number_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Pace(3)
    found.now = Workers(2)
    waited: list[float] = []
    stops = [False, False, True]
    monkeypatch.setattr(found._condition, "wait", waited.append)
    for worker, expected in ((0, []), (1, []), (2, [0.2, 0.2]), (5, [0.2, 0.2])):
        left = list(stops)
        found.wait_for_turn(worker, lambda left=left: left.pop(0))
        assert waited == expected
        waited.clear()
    assert (pace.WINDOW_SECONDS, pace.GAIN, pace.MOST_WORKERS) == (0.7, 1.05, 32)
    numbers = {cores: pace.candidates(cores) for cores in (1, 4, 7, 8, 15, 16, 200)}
    assert numbers == {
        1: [4, 8], 4: [4, 8], 7: [4, 8], 8: [4, 8, 16], 15: [4, 8, 16], 16: [4, 8, 16, 32], 200: [4, 8, 16, 32],
    }  # fmt: skip
    # One worker waits for nobody, so that mapping gains nothing.
    assert Pace(1, mappable=True).settled and not Pace(2, mappable=True).settled
    assert Pace(2, mappable=True)._left == [Workers(2, True)]


def test_a_work_folder_is_emptied_but_for_its_lock(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", "marker", "command")
    staging.folder.mkdir(parents=True)
    for name in ("!first", ".aaa", LOCK_NAME, ".zzz", "~last"):
        (staging.folder / name).write_text("")
    (staging.folder / "folder").mkdir()
    (staging.folder / "link").symlink_to(tmp_path)
    staging.clear()
    assert [each.name for each in staging.folder.iterdir()] == [LOCK_NAME] and tmp_path.is_dir()


def test_what_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    closed: list[int] = []
    close: Callable[[int], None] = os.close
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    monkeypatch.setattr(files.os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor))[1])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/inner").write_text("")
    (tmp_path / "a").write_text("")
    files.sync_folder_and_files(tmp_path)
    assert synced == [str(tmp_path / "a"), str(tmp_path)] and len(closed) == 2
    synced.clear()
    files.write_atomically(tmp_path / "b", "text")
    assert synced == [str(tmp_path / ".b.partial")] and (tmp_path / "b").read_text() == "text"
    assert files.how_to_restore(tmp_path / "c") is None
    (tmp_path / ".c.replaced").mkdir()
    assert str(files.how_to_restore(tmp_path / "c")).startswith(f"mv {tmp_path}/.c.replaced {tmp_path}/c, ")
    (tmp_path / "c").mkdir()
    assert files.how_to_restore(tmp_path / "c") is None


def test_pieces_in_which_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (crc._BLOCK_BYTES, mmap_writer.WINDOW_BYTES) == (1_048_576, 8_388_608)
    (tmp_path / "file").write_bytes(b"123456789")
    for size in (1, 4, 100):
        monkeypatch.setattr(crc, "_BLOCK_BYTES", size)
        assert crc.crc_of(tmp_path / "file") == 0xCBF43926  # the check value of CRC-32
