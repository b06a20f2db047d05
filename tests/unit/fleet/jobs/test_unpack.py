"""Nothing that a host sends for `fetch` is written outside of the folder, independent of the checks of tarfile."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from mixtral_run.fleet.jobs.transfer import unpack as module
from mixtral_run.fleet.jobs.transfer.unpack import RefusedError, free_bytes, size_text, unpack
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


def pax_stream(num_members: int, header_bytes: int, global_headers: dict[str, str] | None = None) -> IO[bytes]:
    """Return a stream of empty files, each with an extended header; nothing of it is held in memory."""

    def pieces() -> Iterator[bytes]:
        if global_headers:
            yield tarfile.TarInfo.create_pax_global_header(global_headers)  # type: ignore[attr-defined]
        yield stream([PEFT])[:512]
        for number in range(num_members):
            entry = tarfile.TarInfo(f"peft/{number}")
            entry.pax_headers = {"comment": "x" * header_bytes}
            yield entry.tobuf(tarfile.PAX_FORMAT)
        yield b"\0" * 10240

    class Pieces(io.RawIOBase):
        rest, source = b"", pieces()

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.rest = self.rest or next(self.source, b"")
            size = min(len(buffer), len(self.rest))
            buffer[:size], self.rest = self.rest[:size], self.rest[size:]
            return size

    return io.BufferedReader(Pieces())


def test_headers_are_not_kept_in_memory(new: Path) -> None:
    source = pax_stream(100, 500_000)
    tracemalloc.start()
    try:
        assert unpack(source, new, "peft", limit_bytes=GIB).num_files == 100
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_the_headers_of_all_members_are_bounded(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ALL_HEADER_BYTES", 100_000)
    assert unpack(pax_stream(8, 10_000), new, "peft", limit_bytes=GIB).num_files == 8
    with pytest.raises(RefusedError, match="headers of the archive"):
        unpack(pax_stream(12, 10_000), new.parent / "other", "peft", limit_bytes=GIB)


def test_content_does_not_count_as_headers(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ALL_HEADER_BYTES", 3 * 512)
    entries: list[Entry] = [PEFT, ("peft/a", FILE, b"x" * 100_001), ("peft/b", FILE, b"x" * 100_001)]
    assert received(stream(entries), new) == "2 files, 200,002 bytes"


def test_many_global_headers_are_refused(new: Path) -> None:
    assert unpack(pax_stream(1, 1, {"comment": "x"}), new, "peft", limit_bytes=GIB).num_files == 1
    with pytest.raises(RefusedError, match="more than 100 global headers"):
        unpack(pax_stream(1, 1, {f"k{n}": "x" for n in range(101)}), new.parent / "other", "peft", limit_bytes=GIB)


@pytest.mark.parametrize("kind", [FILE, FOLDER, LINK])
def test_deeply_nested_folders_are_refused(kind: bytes, new: Path) -> None:
    with pytest.raises(ValueError, match="1,501 parts"):
        received(stream([("peft/" + "a/" * 1499 + "b", kind, *(["b"] if kind == LINK else []))]), new)
    assert everything(new) == set()


@pytest.mark.parametrize("target", ["a/" * 102, "a" * 3001, "./" * 1000])
def test_a_link_to_a_long_path_is_refused(target: str, new: Path) -> None:
    with pytest.raises(RefusedError, match="link to a path of more than"):
        received(stream([PEFT, ("peft/l", LINK, target)]), new)


@pytest.mark.parametrize(
    ("first", "second"), [("L", "l"), ("stra\u00dfe", "STRASSE"), ("\u00e9", "e\u0301"), ("ab", "a\u200cb")]
)
def test_a_path_through_a_link_is_refused_whatever_the_filesystem_ignores(first: str, second: str, new: Path) -> None:
    link = (f"peft/a/b/{first}", LINK, "../..")
    with pytest.raises(RefusedError, match="not a folder"):
        received(stream([PEFT, link, (f"peft/a/b/{second}/x", LINK, "../../../..")]), new)
    with pytest.raises(RefusedError, match="through another link"):
        received(stream([link, ("peft/x", LINK, f"a/b/{second}/../../y")]), new.parent / "other")


def test_names_that_differ_in_case_arrive_where_the_filesystem_keeps_them_apart(new: Path) -> None:
    (new / "probe").touch()
    if (new / "PROBE").exists():
        pytest.skip("this filesystem ignores case")
    assert received(stream([PEFT, ("peft/a", FILE, b"x"), ("peft/A", FILE, b"y")]), new) == "2 files, 2 bytes"


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


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (1, "1 byte"), (1024**2 - 1, "1,048,575 bytes"), (1024**2, "1.0 MiB"), (3 * 2**19, "1.5 MiB"),
        (2**30 - 2**20, "1023.0 MiB"), (2**30, "1.0 GiB"), (5 * 2**29, "2.5 GiB"),
    ],
)  # fmt: skip
def test_a_size_is_in_its_unit(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text
