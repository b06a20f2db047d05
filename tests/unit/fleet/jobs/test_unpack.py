"""Nothing that a host sends for `fetch` is written outside of the folder, independent of the checks of tarfile."""

from __future__ import annotations

import io
import os
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from mixtral_run.fleet.jobs import unpack as module
from mixtral_run.fleet.jobs.unpack import RefusedError, free_bytes, size_text, unpack
from tests.unit.fleet.hostile_tar import CASES, FILE, FOLDER, HARD, LINK, PEFT, Entry, stream

GIB = 2**30


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """The folder to unpack into, three levels deep, so that `../..` has somewhere to go."""
    folder = tmp_path / "home/work/new"
    folder.mkdir(parents=True)
    return folder


def received(data: bytes, new: Path, limit_bytes: int = GIB) -> str:
    return str(unpack(io.BytesIO(data), new, "peft", limit_bytes=limit_bytes))


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_archive_is_refused_and_reaches_nothing(case: str, new: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        received(stream(CASES[case]), new)
    assert str(caught.value).isprintable()
    assert [path for path in everything(tmp_path) if not path.is_relative_to(new) and path not in new.parents] == []
    assert not any(path.name == "escaped" for path in everything(tmp_path))
    assert not any(path.is_symlink() for path in everything(new))


def with_size(entry: bytes, size: bytes) -> bytes:
    """Return the entry with another size field and a valid checksum."""
    header = bytearray(entry[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + entry[512:]


LONG_HEADER = with_size(stream([("peft/" + "a" * 5000, FILE, b"x")]), b"%011o\0" % (1 << 32))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no tar at all" * 100, stream([PEFT, ("peft/a", FILE, b"x")])[:700],
        stream([("peft", FILE, b"x" * 5000)])[:2000],
        stream([PEFT, ("peft/a", FILE, b"x")])[:1024], stream([PEFT])[:512] + b"garbage" * 1500,
        with_size(stream([("peft", FILE, b"x")]), b"\xff" * 12),
        with_size(stream([("peft", FILE, b"x")]), b"99999999999\0"),
    ],
    ids=[
        "empty", "garbage", "cut in a header", "cut in a file", "cut before a file", "garbage after a folder",
        "negative size", "no size",
    ],
)  # fmt: skip
def test_a_damaged_archive_is_refused(data: bytes, new: Path) -> None:
    with pytest.raises(RefusedError):
        received(data, new)


class Endless(io.RawIOBase):
    """A header that announces 4 GiB, then bytes without end."""

    def __init__(self) -> None:
        self.begin, self.num_read = io.BytesIO(LONG_HEADER[:512]), 0

    def read(self, size: int = -1) -> bytes:
        data = self.begin.read(size) or b"a" * size
        self.num_read += len(data)
        return data


def test_a_header_without_end_is_not_read_into_memory(new: Path) -> None:
    endless = Endless()
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError, match="header"):
            unpack(endless, new, "peft", limit_bytes=GIB)  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
    assert endless.num_read < 4 * 2**20


def test_more_than_fits_is_refused_before_it_is_written(new: Path) -> None:
    data = stream([PEFT, ("peft/a", FILE, b"x" * 600), ("peft/b", FILE, b"x" * 600)])
    with pytest.raises(RefusedError, match=r"'peft/b' has 600 bytes; with the 600 bytes before it.* 1,000 bytes"):
        received(data, new, limit_bytes=1000)
    assert not (new / "peft/b").exists()


def test_too_many_members_are_refused(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 3)
    entries: list[Entry] = [PEFT, *((f"peft/{name}", FILE, b"x") for name in "abc")]
    received(stream(entries[:3]), new)
    with pytest.raises(RefusedError, match="more than 3 members"):
        unpack(io.BytesIO(stream(entries)), new.parent / "other", "peft", limit_bytes=GIB)


def test_a_folder_with_links_inside_of_it_arrives_as_it_is(new: Path) -> None:
    entries: list[Entry] = [
        PEFT, ("peft/blobs", FOLDER), ("peft/blobs/1", FILE, b"weights"), ("peft/snapshots", FOLDER),
        ("peft/snapshots/model", LINK, "../blobs/1"), ("peft/again", HARD, "peft/blobs/1"),
        ("peft/here", LINK, "./blobs"),
    ]  # fmt: skip
    assert received(stream(entries), new) == "2 files, 7 bytes"
    assert (new / "peft/snapshots/model").readlink() == Path("../blobs/1")
    assert (new / "peft/snapshots/model").read_bytes() == b"weights"
    assert (new / "peft/here/1").read_bytes() == (new / "peft/again").read_bytes() == b"weights"


def test_modes_are_those_of_plain_files(new: Path) -> None:
    entries: list[Entry] = [
        ("peft", FOLDER, b"", 0), ("peft/a", FILE, b"x", 0o6777), ("peft/b", FILE, b"x", 0),
        ("peft/c", FILE, b"x", 0o644),
    ]  # fmt: skip
    received(stream(entries), new)
    assert [(new / "peft" / name).stat().st_mode & 0o7777 for name in "abc"] == [0o755, 0o600, 0o644]
    assert (new / "peft").stat().st_mode & 0o700 == 0o700


def test_what_gnu_tar_sends_arrives(new: Path, tmp_path: Path) -> None:
    folder = tmp_path / "host/peft"
    (folder / ("n" * 120) / ("m" * 120)).mkdir(parents=True)
    (folder / ("n" * 120) / ("m" * 120) / "é it's $(an) adapter").write_bytes(b"x" * 3_000_000)
    (folder / "empty").touch()
    os.utime(folder / "empty", (10**9, 10**9))
    argv = ["tar", "-C", str(folder.parent), "-cf", "-", "--", "peft"]
    data = subprocess.run(argv, check=True, capture_output=True).stdout
    assert received(data, new) == "2 files, 2.9 MiB"
    assert {path.relative_to(new) for path in everything(new)} == {
        path.relative_to(folder.parent) for path in {folder, *everything(folder)}
    }
    assert (new / "peft/empty").stat().st_mtime == 10**9


def test_sizes_are_shown_in_the_unit_that_suits() -> None:
    assert [size_text(size) for size in (0, 2000, 3 * 2**20, 93 * GIB)] == [
        "0 bytes",
        "2,000 bytes",
        "3.0 MiB",
        "93.0 GiB",
    ]


def test_some_of_the_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, usable in ((100 * GIB, 99 * GIB), (1000, 900)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, free=free: type("usage", (), {"free": free}))
        assert free_bytes(tmp_path) == usable
