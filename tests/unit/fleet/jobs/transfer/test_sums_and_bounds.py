"""Sums, bounds and whole commands of a fetch, compared with values that are written by hand."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.jobs import fetch as fetching
from mixtral_run.fleet.jobs.fetch import fetch, fetch_job
from mixtral_run.fleet.jobs.jobs import JobRow
from mixtral_run.fleet.jobs.transfer import links, listing, rsync, unpack
from mixtral_run.fleet.jobs.transfer.links import Links, RefusedError
from mixtral_run.fleet.jobs.transfer.listing import read_listing
from mixtral_run.fleet.jobs.transfer.unpack import Received
from mixtral_run.fleet.ssh.connection import Ssh
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
    with pytest.raises(RefusedError, match=r"a header of the archive is longer than 1\.0 MiB"):
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


def test_the_whole_command_of_rsync() -> None:
    argv = rsync.rsync_argv(Host("v6", "fe80::1"), PurePosixPath("/c"), Path("/here"), Path("/known"))
    at = argv.index("--rsh")
    assert argv[:at] == [
        "rsync", "--files-from=-", "--from0", "--no-implied-dirs", "--protect-args", "--inplace", "--times", "--fsync",
        "--timeout=300", "--no-links", "--no-devices", "--no-specials", "--no-perms", "--no-owner", "--no-group",
        "--chmod=F600",
    ]  # fmt: skip
    assert argv[at + 2 :] == ["--", "[fe80::1]:/c/", "/here/"] and argv[at + 1].startswith("'ssh' '")
    assert rsync._quoted("it's") == "'it''s'"


@pytest.mark.parametrize("stubborn", [False, True])
def test_rsync_ends_with_the_block(monkeypatch: pytest.MonkeyPatch, stubborn: bool) -> None:
    waits: list[Any] = []
    started: list[Any] = []
    written: list[bytes] = []
    process: Any = MagicMock(poll=lambda: None)
    process.stdin.write = written.append

    def wait(*seconds: float) -> None:
        waits.append(seconds)
        if stubborn and seconds:
            raise subprocess.TimeoutExpired("rsync", 5)

    process.wait = wait
    monkeypatch.setattr(rsync.subprocess, "Popen", lambda argv, **more: started.append((argv, more)) or process)
    monkeypatch.setattr(rsync, "LastBytes", lambda _: "errors")
    monkeypatch.setattr(os, "environ", {"RSYNC_RSH": "x", "PATH": "/bin"})
    with rsync._running(["rsync"], b"names") as (found, errors):
        assert (found, errors, waits) == (process, "errors", [])
    ((argv, more),) = started
    assert (argv, more["env"], more["start_new_session"]) == (["rsync"], {"PATH": "/bin"}, True)
    assert written == [b"names"] and process.terminate.call_count == 1
    assert waits == ([(5,), ()] if stubborn else [(5,)]) and process.kill.call_count == int(stubborn)
    # One that has ended is left alone; its messages say why it did not read the names.
    waits.clear()
    process.poll = lambda: 1
    process.stdin.write = MagicMock(side_effect=BrokenPipeError)
    with rsync._running(["rsync"], b"names"):
        assert waits == [()]
    assert process.terminate.call_count == 1


def test_a_version_is_asked_for_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(argv: list[str], **more: Any) -> Any:
        asked.append((argv, more))
        return SimpleNamespace(stdout="rsync  version 3.2.5")

    monkeypatch.setattr(rsync.subprocess, "run", run)
    assert rsync.why_not_here() is None
    assert asked == [(["rsync", "--version"], {"capture_output": True, "text": True, "check": False, "timeout": 60})]


def test_folders_that_are_there_are_no_obstacle(tmp_path: Path) -> None:
    for _ in range(2):
        rsync.receive(MagicMock(), HOST, PurePosixPath("/c"), read(START), tmp_path, lambda _: None)
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize(
    ("free", "here", "fits", "most"),
    [
        (3, 2, True, ""), (4, 2, True, ""), (1, 2, False, "at most 3 bytes"), (2, 2, False, "at most 4 bytes"),
        (-9, 2, False, "at most 0 bytes"), (-2, 2, False, "at most 0 bytes"), (5, 0, True, ""),
        (4, 0, False, "at most 4 bytes"),
    ],
)  # fmt: skip
def test_what_is_here_already_needs_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, here: int, fits: bool, most: str
) -> None:
    """Five bytes of a file are to come."""
    monkeypatch.setattr(fetching, "free_bytes", lambda _: free)
    monkeypatch.setattr(fetching, "receive", lambda *given: (given[4] / "a").write_bytes(bytes(5)))
    work = fetching._work_folder(HOST, "/c/a", tmp_path / "out")
    (work / "new").mkdir()
    (work / "new/a").write_bytes(bytes(here))
    found = read(["rsync", "f", "5", "600", "1.0", "./a", ""])
    if fits:
        assert fetching._continue(MagicMock(), HOST, "/c/a", found, tmp_path / "out", lambda _: None) == Received(1, 5)
        assert (tmp_path / "out").stat().st_size == 5 and not work.exists()
    else:
        with pytest.raises(HostError, match="/c/a of gpu-1 does not fit here") as caught:
            fetching._continue(MagicMock(), HOST, "/c/a", found, tmp_path / "out", lambda _: None)
        assert (caught.value.expected, caught.value.found) == (most, "1 file, 5 bytes")


def test_a_target_that_is_there_is_replaced_also_after_an_attempt_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "free_bytes", lambda _: 99)
    monkeypatch.setattr(fetching, "receive", lambda *given: (given[4] / "a/f").write_bytes(b"new"))
    work = fetching._work_folder(HOST, "/c/a", tmp_path / "out")
    for folder in (work / "new/a", work / "old/x", tmp_path / "out"):
        folder.mkdir(parents=True)
    (work / "old/x/y").touch()
    (tmp_path / "out/f").write_text("old")
    found = read([*START, "f", "3", "600", "1.0", "./a/f", ""])
    fetching._continue(MagicMock(), HOST, "/c/a", found, tmp_path / "out", lambda _: None)
    assert (tmp_path / "out/f").read_text() == "new" and [each.name for each in tmp_path.iterdir()] == ["out"]


def test_the_folder_of_a_fetch_is_a_folder_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = fetching._work_folder(HOST, "/c/a", tmp_path / "out")
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: work.stat().st_uid + 1)
        with pytest.raises(ConfigError, match="written to by others"):
            fetching._work_folder(HOST, "/c/a", tmp_path / "out")
    work.rmdir()
    work.touch(mode=0o600)
    with pytest.raises(ConfigError, match="written to by others") as caught:
        fetching._work_folder(HOST, "/c/a", tmp_path / "out")
    assert caught.value.next_command == f"remove it: rm -r {work}"


def test_the_list_is_asked_for_with_the_name_and_its_folder() -> None:
    asked: list[Any] = []

    @contextlib.contextmanager
    def receive(host: Host, argv: list[str]) -> Iterator[io.BytesIO]:
        asked.append((host, argv))
        yield io.BytesIO()

    ssh: Any = SimpleNamespace(receive=receive)
    assert fetching._list(ssh, HOST, "/c d/a", "a") is None
    assert asked == [(HOST, ["sh", "-c", listing.SCRIPT, "fetch", "/c d", "a"])]


def test_what_lies_aside_is_kept_if_it_cannot_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that fails leaves nothing; but the earlier content stays in its folder if only that has it."""

    def lose(new: Path, target: Path, old: Path) -> None:
        target.rename(old)
        raise HostError("full")

    pod: Any = SimpleNamespace(receive=None)
    monkeypatch.setattr(fetching, "_receive", lambda *_: Received())
    monkeypatch.setattr(fetching, "_put_in_place", lose)
    (tmp_path / "out").write_text("old")
    with pytest.raises(HostError, match="full"):
        fetch(HOST, "/c/a", tmp_path / "out", pod, overwrite=True)
    (work,) = tmp_path.iterdir()
    assert work.name.startswith(".mixtral-run-fetch-") and (work / "old").read_text() == "old"
    monkeypatch.setattr(fetching, "_put_in_place", MagicMock(side_effect=HostError("full")))
    for there in (False, True):
        place = tmp_path / f"folder{there}/out"
        place.parent.mkdir()
        if there:
            place.touch()
        with pytest.raises(HostError, match="full"):
            fetch(HOST, "/c/a", place, pod, overwrite=True)
        assert list(place.parent.iterdir()) == ([place] if there else [])


@pytest.mark.parametrize("path", ["/", "/c/..", "/c/\x1b"])
def test_a_path_without_a_name_is_refused(path: str) -> None:
    with pytest.raises(HostError, match="A path on gpu-1 does not end with the name of a file or folder"):
        fetching._name_of(HOST, path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_or_a_path_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    calls: list[Any] = []
    state, output, asked = ["exited"], ["/srv/adapter"], list[Any]()
    row = lambda: JobRow("job-1", "finetune", HOST, state[0], 0, False, "", output[0])  # noqa: E731
    monkeypatch.setattr(fetching, "fetch", lambda *given, **more: calls.append((given, more)) or given[2])
    monkeypatch.setattr(fetching, "hosts_of", lambda *given: asked.append(given) or "hosts")
    monkeypatch.setattr(fetching, "find_job", lambda *given: asked.append(given) or [row(), None])
    say: Any = print
    more = {"overwrite": overwrite, "say": say}
    assert fetch_job("job-1", tmp_path, ["gpu-1"], say=say, **({"overwrite": True} if overwrite else {})) == [
        tmp_path / "adapter"
    ]
    assert calls == [((HOST, "/srv/adapter", tmp_path / "adapter"), more)]
    assert asked == [(("gpu-1",), None, None), ("job-1", "hosts")]
    assert fetch_job("job-1", tmp_path / "new") == [tmp_path / "new"]
    monkeypatch.setattr(fetching, "remembered_hosts", lambda: "known")
    monkeypatch.setattr(fetching, "find_hosts", lambda *given: asked.append(given) or [HOST])
    fetch_job("ops@gpu-1:/checkpoints/x/y:/z", tmp_path)
    assert asked[-1] == (["ops@gpu-1"], "known")
    assert calls[-1][0] == (HOST, "/var/lib/mixtral-run/checkpoints/x/y:/z", tmp_path / "z")
    state[0] = "running"
    with pytest.raises(ConfigError, match="job-1 is still running") as caught:
        fetch_job("job-1", tmp_path)
    assert caught.value.next_command == "mixtral-run logs -f job-1"
    state[0], output[0] = "exited", ""
    with pytest.raises(ConfigError, match=r"job-1 writes no files \(finetune\)"):
        fetch_job("job-1", tmp_path)


def test_an_output_in_another_store_names_no_tool() -> None:
    for url, command in (
        ("gs://b/x", "the store's own tool copies it"), ("s3://b/x", "aws s3 cp --recursive s3://b/x FOLDER")
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="The output of j is in an object store") as caught:
            fetching.refuse_store("j", url)
        assert (caught.value.where, caught.value.next_command) == (url, command)


def test_a_fetch_makes_the_folders_above_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "why_not_here", lambda: None)
    monkeypatch.setattr(fetching, "_list", lambda *_: "listing")
    monkeypatch.setattr(fetching, "_continue", lambda *_: "1 file")
    for _ in range(2):
        assert fetch(HOST, "/c/a", tmp_path / "x/y/out", Ssh(tmp_path / "k")) == tmp_path / "x/y/out"
    assert (tmp_path / "x/y").is_dir()
    (tmp_path / "x/y/out").touch()
    with pytest.raises(ConfigError, match="already exists"):
        fetch(HOST, "/c/a", tmp_path / "x/y/out", Ssh(tmp_path / "k"))


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
