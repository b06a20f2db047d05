"""Sums and bounds of lists and archives that a host sends, compared with values that are written by hand."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import parse_host
from mixtral_run.fleet.jobs.transfer import links, listing, rsync, unpack
from mixtral_run.fleet.jobs.transfer.links import Links, RefusedError
from mixtral_run.fleet.jobs.transfer.listing import read_listing
from mixtral_run.fleet.jobs.transfer.unpack import Received
from tests.unit.fleet.hostile_tar import FILE, FOLDER, LINK, PEFT, Entry, stream

HOST = parse_host("gpu-1")


START = ["rsync", "d", "0", "755", "1.0", "./a", ""]


def read(words: list[str], name: str = "a") -> listing.Listing:
    found = read_listing(io.BytesIO("".join(f"{word}\0" for word in words).encode()), name)
    assert found is not None
    return found


def test_the_bounds_of_what_a_host_sends() -> None:
    assert (unpack.MAX_MEMBERS, unpack.MAX_GLOBAL_HEADERS) == (200_000, 100)
    assert (unpack.MAX_HEADER_BYTES, unpack.MAX_ALL_HEADER_BYTES) == (1_048_576, 536_870_912)
    assert (unpack.BLOCK_BYTES, unpack.TAIL_BYTES, unpack.GIB) == (1_048_576, 20_480, 1_073_741_824)
    assert (listing.MAX_LIST_BYTES, listing.FIELDS, rsync.OLDEST) == (67_108_864, 6, (3, 2, 5))
    assert (rsync.WATCH_SECONDS, rsync.SILENT_SECONDS, rsync.SSH_FAILED) == (0.2, 300, 255)
    assert (links.MAX_PATH_BYTES, links.MAX_PATH_PARTS) == (3000, 100)
    assert Received() == Received(0, 0)
    assert [str(Received(count, 1)) for count in (0, 1, 2)] == ["0 files, 1 byte", "1 file, 1 byte", "2 files, 1 byte"]


def test_a_reader_counts_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail has the last 600 bytes here: 1,112 bytes have been read, of which the last 512 are zeros."""
    monkeypatch.setattr(unpack, "TAIL_BYTES", 600)
    reader = unpack._BoundedReader(io.BytesIO(b"x" * 600 + b"\0" * 512 + b"y"), 1112)
    assert [len(reader.read(size)) for size in (300, 300, 512)] == [300, 300, 512]
    assert (reader.allowed, reader.position, reader.tail) == (0, 1112, b"x" * 88 + b"\0" * 512)
    assert [reader.ends_at(offset) for offset in (0, 511, 512, 599, 600, 601, 1112)] == [False] * 4 + [True] + [
        False,
        False,
    ]
    with pytest.raises(RefusedError, match=r"^a header of the archive is longer than 1\.0 MiB"), unpack._damaged():
        reader.read()
    whole = unpack._BoundedReader(io.BytesIO(b"\0" * 512 + b"z"), 1000)
    assert whole.read() == b"\0" * 512 + b"z" and whole.ends_at(0) and not whole.ends_at(1)
    assert unpack._BoundedReader(io.BytesIO()).allowed == unpack._BoundedReader(io.BytesIO()).position == 0


def test_headers_and_blocks_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each header has 512 bytes. Contents are read in pieces of three bytes, and padded to 512."""
    headers: list[int] = []
    allowed: list[int] = []
    received: list[tuple[int, int]] = []
    take = unpack._Unpacker._take

    def noted(self: Any, archive: Any, member: Any) -> None:
        allowed.append(archive.fileobj.fileobj.allowed)
        take(self, archive, member)

    monkeypatch.setattr(unpack, "BLOCK_BYTES", 3)
    monkeypatch.setattr(unpack._Unpacker, "_take", noted)
    monkeypatch.setattr(unpack, "_check_headers", lambda count, _: headers.append(count))
    entries: list[Entry] = [PEFT, ("peft/a", FILE, b"x" * 7), ("peft/b", FILE, b"y" * 7), ("peft/c", FILE, b"")]
    found = unpack.unpack(
        io.BytesIO(stream(entries)), tmp_path, "peft", limit_bytes=14,
        on_progress=lambda each: received.append((each.num_files, each.num_bytes)),
    )  # fmt: skip
    assert (found.num_files, found.num_bytes) == (3, 14) and headers == [512, 1024, 1536, 2048]
    assert received == [(0, 3), (0, 6), (0, 7), (1, 10), (1, 13), (1, 14)]
    assert allowed == [1_048_576, 1_048_583, 1_048_583, 1_048_576]
    with pytest.raises(
        RefusedError, match="'peft/b' has 7 bytes; with the 7 bytes before it, that is more than the 13"
    ):
        unpack.unpack(io.BytesIO(stream(entries)), tmp_path / "2", "peft", limit_bytes=13)
    with pytest.raises(RefusedError, match="more than the 0 bytes that may be written here"):
        unpack.unpack(io.BytesIO(stream(entries)), tmp_path / "3", "peft", limit_bytes=-5)


def test_what_the_headers_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    archive: Any = SimpleNamespace(pax_headers=dict.fromkeys(range(100), ""))
    unpack._check_headers(536_870_912, archive)
    unpack._check_headers(0, archive)
    with pytest.raises(RefusedError, match=r"longer than 512\.0 MiB"):
        unpack._check_headers(536_870_913, archive)
    archive.pax_headers[100] = ""
    with pytest.raises(RefusedError, match="more than 100 global headers"):
        unpack._check_headers(0, archive)


def test_members_at_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MAX_MEMBERS", 1)
    assert str(unpack.unpack(io.BytesIO(stream([PEFT])), tmp_path, "peft", limit_bytes=0)) == "0 files, 0 bytes"
    with pytest.raises(RefusedError, match="the archive has more than 1 members"):
        unpack.unpack(io.BytesIO(stream([PEFT, ("peft/a", FILE, b"")])), tmp_path / "2", "peft", limit_bytes=0)


def test_times_and_folders_of_an_archive(tmp_path: Path) -> None:
    """A folder gets its time after what it holds was written. One that is named after its file keeps its mode."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, kind, time in (("a/b/f", FILE, 1e9), ("a/b", FOLDER, 1.1e9), ("a", FOLDER, 1.2e9)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mtime = kind, int(time)
            archive.addfile(entry)
    data.seek(0)
    assert unpack.unpack(data, tmp_path, "a", limit_bytes=9).num_files == 1
    assert [int((tmp_path / name).stat().st_mtime) for name in ("a/b/f", "a/b", "a")] == [10**9, 11 * 10**8, 12 * 10**8]
    # A time that no filesystem holds is left out.
    unpack.set_time(tmp_path / "a/b/f", float("inf"))
    unpack.set_time(tmp_path / "a/b/f", 1e300)
    unpack.set_time(tmp_path / "none", 1.0)
    assert int((tmp_path / "a/b/f").stat().st_mtime) == 10**9


@pytest.mark.parametrize("second", [FILE, FOLDER, LINK])
@pytest.mark.parametrize("first", [FILE, FOLDER, LINK])
def test_a_name_occurs_once(tmp_path: Path, first: bytes, second: bytes) -> None:
    def entry(kind: bytes) -> Entry:
        return ("peft/x", kind, "y" if kind == LINK else b"")

    with pytest.raises(RefusedError, match="'peft/x' occurs twice"):
        unpack.unpack(io.BytesIO(stream([PEFT, entry(first), entry(second)])), tmp_path, "peft", limit_bytes=9)


@pytest.mark.parametrize(
    ("target", "good"),
    [
        ("b", True), ("../c", True), ("./../c", True), ("../d/../c", True), ("..", True), ("../..", False),
        ("../../peft", False), ("/x", False), ("", False), ("../l", True), ("../l/x", False), ("../l/", True),
        ("-a/../../c", True), ("../../../c", False),
    ],
)  # fmt: skip
def test_where_a_link_may_lead(target: str, good: bool) -> None:
    """A link of peft/s; peft/l is a link as well: it may be the end of the way, and no step of it."""
    found = Links("peft")
    assert PurePosixPath("peft/l") not in found
    found.add(PurePosixPath("peft/l"), "c")
    found.add(PurePosixPath("peft/s/x"), target)
    with contextlib.nullcontext() if good else pytest.raises(RefusedError, match=r"outside of|another link"):
        found.check()


def test_how_long_the_path_of_a_link_may_be() -> None:
    path = PurePosixPath("peft/l")
    Links("peft").add(path, "a" * 3000)
    Links("peft").add(path, "a/" * 100)
    for target in ("a" * 3001, "a/" * 101):
        with pytest.raises(RefusedError, match="more than 3,000 bytes or 100 parts"):
            Links("peft").add(path, target)


def test_a_listing_by_hand() -> None:
    words = [*START, "f", "0", "107644", "2.5", "./a/zero", "", "f", "6", "600", "3.0", "./a/six", "",
             "f", "3", "4755", "4.0", "./a/three", "", "l", "2", "777", "1.0", "./a/l", "six"]  # fmt: skip
    found = read(words)
    assert found.files == {
        PurePosixPath("a/zero"): listing.File(0, 0o7644, 2.5), PurePosixPath("a/six"): listing.File(6, 0o600, 3.0),
        PurePosixPath("a/three"): listing.File(3, 0o4755, 4.0),
    }  # fmt: skip
    assert found.folders == {PurePosixPath("a"): 1.0} and found.links.targets == {PurePosixPath("a/l"): "six"}
    assert found.amount == Received(3, 9)
    # A single file stands alone.
    assert read(["rsync", "f", "5", "644", "1.0", "./a", ""]).amount == Received(1, 5)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["rsync"], "does not hold 'a'"),
        (["other", *START[1:]], "damaged"),
        (START[:-1], "damaged"),
        ([*START, "more"], "damaged"),
        ([*START, "f", "-1", "644", "1.0", "./a/x", ""], "'a/x' has -1 bytes"),
        ([*START, "f", "1", "644", "1.0", "./b", ""], "the list holds 'b', expected only 'a'"),
        ([*START, *START[1:]], "'a' occurs twice"),
        ([*START, "f", "1", "644", "1.0", "./a/b/x", ""], "'a/b/x' is inside of something that is not a folder"),
        ([*START, "d", "1", "755", "1.0", "./a/b/x", ""], "'a/b/x' is inside of something that is not a folder"),
        ([*START, "l", "1", "755", "1.0", "./a/b/x", "y"], "'a/b/x' is inside of something that is not a folder"),
        ([*START, "p", "1", "755", "1.0", "./a/b", ""], "'a/b' is neither a file, a folder nor a link"),
        ([*START, "f", "1", "8", "1.0", "./a/b", ""], "damaged: invalid literal for int"),
    ],
)
def test_a_list_that_is_refused_is_told_of(words: list[str], found: str) -> None:
    with pytest.raises(RefusedError, match=found):
        read(words)


def test_modes_and_what_is_left_over(tmp_path: Path) -> None:
    modes = {"a": "0", "b": "7777", "c": "640", "d": "111"}
    (tmp_path / "a").mkdir()
    words = list(START)
    for name, mode in modes.items():
        words += ["f", "1", mode, "1.0", f"./a/{name}", ""]
        (tmp_path / "a" / name).write_text("x")
    found = read(words)
    found.check_arrived(tmp_path)
    found.complete(tmp_path)
    assert [oct((tmp_path / "a" / name).stat().st_mode & 0o7777) for name in modes] == [
        "0o600", "0o755", "0o640", "0o711",
    ]  # fmt: skip
    assert (tmp_path / "a").stat().st_mtime == 1.0
    # A file of the listed size or a smaller one stays; a fifo and a folder in its place go.
    (tmp_path / "a/b").write_text("")
    (tmp_path / "a/c").unlink()
    os.mkfifo(tmp_path / "a/c")
    (tmp_path / "a/d").unlink()
    (tmp_path / "a/d").mkdir()
    with pytest.raises(RefusedError, match=r"arrived and was not|has 0 bytes, and 1 in the list"):
        found.check_arrived(tmp_path)
    found.remove_others(tmp_path)
    assert sorted(each.name for each in (tmp_path / "a").iterdir()) == ["a", "b"]
    assert found.received(tmp_path) == (1, None)
    (tmp_path / "a/b").write_text("x")
    with pytest.raises(RefusedError, match="'a/c' is in the list of files and did not arrive"):
        found.check_arrived(tmp_path)


@pytest.mark.parametrize("length", [80, 81])
def test_a_long_name_is_shortened_in_a_message(tmp_path: Path, length: int) -> None:
    """Names of 80 characters are shown as they are, whatever is wrong with them."""
    name = "a/" + "n" * (length - 2)
    file = ["f", "1", "644", "1.0", f"./{name}", ""]
    (tmp_path / "a").mkdir()
    messages: list[str] = []

    def refused(work: Any) -> None:
        with pytest.raises((RefusedError, HostError)) as caught:
            work()
        messages.append(str(caught.value))

    refused(lambda: read([*START, *file, *file]))
    refused(lambda: read(["rsync", *file]))
    refused(lambda: read([*START, "f", "-1", *file[2:]]))
    refused(lambda: read([*START, "p", *file[1:]]))
    refused(lambda: read(["rsync", "d", "0", "755", "1.0", "./b", "", *file], "b"))
    refused(lambda: read([*START, *file]).check_arrived(tmp_path))
    (tmp_path / name).write_text("xx")
    refused(lambda: read([*START, *file]).check_arrived(tmp_path))
    refused(lambda: read(START).check_arrived(tmp_path))
    refused(lambda: unpack.unpack(io.BytesIO(stream([(name, FILE, b"")])), tmp_path, "b", limit_bytes=9))
    messages.append(str(rsync._too_much(HOST, PurePosixPath(name))))
    assert [name in each for each in messages] == [length == 80] * 10


def test_a_name_is_compared_by_its_letters(tmp_path: Path) -> None:
    """Python keeps one object of each name in a path; the name that was asked for is another one."""
    name = "".join(["pe", "ft"])
    found = unpack.unpack(
        io.BytesIO(stream([PEFT, ("peft/x", LINK, "y"), ("peft/y", FILE, b"")])), tmp_path, name, limit_bytes=0
    )
    assert found == Received(1, 0)
    assert read(["rsync", "f", "0", "644", "1.0", "./peft", ""], name).amount == Received(1, 0)


def test_each_step_up_of_a_link_is_one() -> None:
    found = Links("peft")
    found.add(PurePosixPath("peft/l"), "s")
    found.add(PurePosixPath("peft/s/t/x"), "../l/y")
    found.check()
    for target in ("../../../z", "../../l/y"):
        found.add(PurePosixPath("peft/s/t/y"), target)
        with pytest.raises(RefusedError, match=r"outside of|another link"):
            found.check()


@pytest.mark.parametrize(
    "entry",
    [("peft", FOLDER), ("peft/x", FOLDER), ("peft/x/y", FOLDER), ("peft/x", FILE, b""), ("peft/x/y", FILE, b"")],
)
def test_a_file_that_is_in_the_way_is_told_of(tmp_path: Path, entry: Entry) -> None:
    (tmp_path / "peft").touch()
    with pytest.raises(RefusedError, match=f"'{entry[0]}' is inside of something that is not a folder"):
        unpack.unpack(io.BytesIO(stream([entry])), tmp_path, "peft", limit_bytes=9)


def test_a_size_is_compared_by_its_value(tmp_path: Path) -> None:
    found = read(["rsync", "f", "70000", "644", "1.0", "./a", ""])
    (tmp_path / "a").write_bytes(bytes(70_000))
    found.check_arrived(tmp_path)
    assert found.received(tmp_path) == (70_000, None)
