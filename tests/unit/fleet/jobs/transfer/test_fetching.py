"""A fetch step by step: what is asked of a host, what lies where after each end, and when something is said."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import parse_host
from mixtral_run.fleet.jobs import fetch as module
from mixtral_run.fleet.jobs import jobs
from mixtral_run.fleet.jobs.fetch import fetch
from mixtral_run.fleet.jobs.job_log import JobFollower, Left
from mixtral_run.fleet.jobs.jobs import JobRow, RunningJob, job_name, list_jobs
from mixtral_run.fleet.jobs.transfer import listing as listings
from mixtral_run.fleet.jobs.transfer import rsync
from mixtral_run.fleet.jobs.transfer.listing import File, Listing, read_listing
from mixtral_run.fleet.jobs.transfer.unpack import Received
from mixtral_run.fleet.ssh.connection import Ssh

HOST = parse_host("gpu-1")


class Pod:
    """STAND-IN for a connection that is not SSH: it sends an archive of one folder."""

    def __init__(self, name: str = "adapter") -> None:
        self.asked: list[list[str]] = []
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(folder)
            file = tarfile.TarInfo(f"{name}/a")
            file.size = 3
            archive.addfile(file, io.BytesIO(b"new"))
        self.data = stream.getvalue()

    @contextlib.contextmanager
    def receive(self, host: Any, command: list[str]) -> Iterator[Any]:
        assert host is HOST
        self.asked.append(command)
        yield io.BytesIO(self.data)


def tree(folder: Path) -> dict[str, str]:
    return {str(each.relative_to(folder)): each.read_text() for each in folder.rglob("*") if each.is_file()}


def test_an_archive_is_unpacked_beside_its_place_and_then_named(tmp_path: Path) -> None:
    pod, said = Pod(), list[str]()
    assert fetch(HOST, "/checkpoints/adapter", tmp_path / "sub/out", pod, say=said.append) == tmp_path / "sub/out"
    assert pod.asked == [["sh", "-c", 'cd "$1" && exec tar -cf - -- "$2"', "fetch", "/checkpoints", "adapter"]]
    assert tree(tmp_path) == {"sub/out/a": "new"}
    assert [each.name for each in (tmp_path / "sub").iterdir()] == ["out"]
    assert said[0] == "kubectl copies without rsync: this fetch begins anew if it is interrupted."
    assert said[1:] == ["  1 file, 3 bytes from gpu-1"]
    with pytest.raises(ConfigError, match="already exists"):
        fetch(HOST, "/checkpoints/adapter", tmp_path / "sub/out", pod)
    (tmp_path / "sub/out/a").write_text("old")
    fetch(HOST, "/checkpoints/adapter", tmp_path / "sub/out", pod, overwrite=True)
    assert tree(tmp_path) == {"sub/out/a": "new"}
    # What is refused leaves nothing, and what was there before stays.
    (tmp_path / "sub/out/a").write_text("old")
    with pytest.raises(HostError, match="what the host sent is refused"):
        fetch(HOST, "/checkpoints/adapter", tmp_path / "sub/out", Pod("other"), overwrite=True)
    assert tree(tmp_path) == {"sub/out/a": "old"} and len(list((tmp_path / "sub").iterdir())) == 1


def test_what_had_the_name_comes_back_if_the_new_content_cannot_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").write_text("old")
    with pytest.raises(FileNotFoundError):
        module._put_in_place(tmp_path / "gone", tmp_path / "target", tmp_path / "aside")
    assert tree(tmp_path) == {"target": "old"}
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "target":
            return rename(path, target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(HostError) as caught:
        module._put_in_place(tmp_path / "new", tmp_path / "target", tmp_path / "aside")
    assert (caught.value.where, caught.value.found) == (str(tmp_path / "target"), "No space left on device")
    assert str(caught.value.next_command).startswith(f"mv {tmp_path / 'aside'} {tmp_path / 'target'}, ")
    assert tree(tmp_path) == {"aside": "old"}


@pytest.mark.parametrize(
    ("reason", "listing", "said"),
    [
        ("rsync here is not version 3.2.5 or newer", "unused", "rsync here is not version 3.2.5 or newer: this fetch"),
        (None, None, "rsync is not installed on gpu-1: this fetch"),
        (None, "listing", ""),
    ],
)
def test_rsync_is_used_where_both_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str | None, listing: str | None, said: str
) -> None:
    listed: list[Any] = []
    monkeypatch.setattr(module, "why_not_here", lambda: reason)
    monkeypatch.setattr(module, "_list", lambda *given: listed.append(given[1:]) or listing)
    monkeypatch.setattr(module, "_continue", lambda *given: f"continued {given[3]}")
    monkeypatch.setattr(Ssh, "receive", Pod.receive)
    ssh: Any = Ssh(tmp_path / "known")
    ssh.asked, ssh.data = [], Pod().data
    lines: list[str] = []
    fetch(HOST, "/c/adapter", tmp_path / "out", ssh, say=lines.append)
    assert listed == ([] if reason else [(HOST, "/c/adapter", "adapter")])
    assert (lines[0].startswith(said) and lines[1] == "  1 file, 3 bytes from gpu-1") if said else lines == [
        "  continued listing from gpu-1"
    ]  # fmt: skip


def listing_of(**sizes: int) -> Listing:
    words = ["rsync", "d", "0", "755", "1.0", "./adapter", ""]
    for name, size in sizes.items():
        words += ["f", str(size), "644", "1.0", f"./adapter/{name}", ""]
    found = read_listing(io.BytesIO(b"".join(word.encode() + b"\0" for word in words)), "adapter")
    assert found is not None
    return found


def sent(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None, content: bytes = b"new") -> list[int]:
    """Play rsync: it writes a file, or raises after it has written a part of it."""
    free: list[int] = [10]

    def receive(_: Any, __: Any, parent: Any, listing: Listing, folder: Path, on_progress: Any) -> None:
        assert parent == PurePosixPath("/c")
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter/a").write_bytes(content)
        on_progress(2)
        if error is not None:
            (folder / "adapter/a").write_bytes(content[:2])
            raise error

    monkeypatch.setattr(module, "receive", receive)
    monkeypatch.setattr(module, "free_bytes", lambda _: free[0])
    return free


def test_an_interrupted_fetch_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(**sizes: int) -> list[str]:
        said: list[str] = []
        with contextlib.suppress(HostError, KeyboardInterrupt):
            module._continue(MagicMock(), HOST, "/c/adapter", listing_of(**sizes), tmp_path / "out", said.append)
        return said

    sent(monkeypatch, KeyboardInterrupt())
    first, second = again(a=3)
    work = module._work_folder(HOST, "/c/adapter", tmp_path / "out")
    assert first == "… 1 file, 3 bytes on gpu-1" and second.startswith(f"What has arrived stays in {work}; ")
    assert {name: text for name, text in tree(tmp_path).items() if "lock" not in name} == {
        f"{work.name}/new/adapter/a": "ne"
    }
    # What is here already needs no space: of 13 bytes 11 are free, and then 10.
    free = sent(monkeypatch)
    for space, fits in ((0, False), (1, True)):
        free[0] = space
        said = again(a=3)
        assert (tmp_path / "out").exists() is fits
    assert said == ["… 1 file, 3 bytes on gpu-1; 2 bytes are here from an earlier fetch"]
    assert tree(tmp_path) == {"out/a": "new"} and not work.exists()
    # A host that sends something else than it listed: nothing of it stays.
    sent(monkeypatch, content=b"newer")
    assert len(again(a=3)) == 1 and tree(tmp_path / "out") == {"a": "new"} and not (work / "new").exists()


def test_a_folder_of_an_interrupted_fetch_is_this_users_alone(tmp_path: Path) -> None:
    work = module._work_folder(HOST, "/c/a", tmp_path / "out")
    assert re.fullmatch(r"\.mixtral-run-fetch-[0-9a-f]{16}", work.name) and work.stat().st_mode & 0o777 == 0o700
    assert module._work_folder(HOST, "/c/a", tmp_path / "out") == work
    others = {module._work_folder(HOST, *each) for each in (("/c/b", tmp_path / "out"), ("/c/a", tmp_path / "o2"))}
    assert len({work, *others}) == 3
    for mode in (0o701, 0o710, 0o707):
        work.chmod(mode)
        with pytest.raises(ConfigError, match="may have been written to by others"):
            module._work_folder(HOST, "/c/a", tmp_path / "out")


def test_progress_is_said_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], list[str]()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    report = module._progress(said.append, 1000)
    for at, received in ((109.9, 1), (110.0, 400), (119.9, 500), (120.0, 2000)):
        now[0] = at
        report(Received(2, received))
    assert said == [
        "… 2 files, 400 bytes so far; 600 bytes more fit here", "… 2 files, 2,000 bytes so far; 0 bytes more fit here"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("output", "usable"),
    [
        ("rsync  version 3.2.5  protocol", True),
        ("rsync  version v3.2.7  protocol", True),
        ("rsync  version 3.10.0  protocol", True),
        ("rsync  version 4.0.0  protocol", True),
        ("rsync  version 3.2.4  protocol", False),
        ("rsync  version 3.1.9  protocol", False),
        ("openrsync: protocol version 29", False),
    ],
)
def test_the_version_of_rsync(monkeypatch: pytest.MonkeyPatch, output: str, usable: bool) -> None:
    monkeypatch.setattr(rsync.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=output))
    assert rsync.why_not_here() == (None if usable else "rsync here is not version 3.2.5 or newer")
    for error in (FileNotFoundError(), subprocess.TimeoutExpired("rsync", 60)):
        monkeypatch.setattr(rsync.subprocess, "run", MagicMock(side_effect=error))
        assert rsync.why_not_here() == "rsync is not installed here"


class Running:
    """STAND-IN for rsync: it ends when it was waited for often enough."""

    def __init__(self, waits: int, code: int, text: str) -> None:
        self.waits, self.code, self.text = waits, code, text
        self.waited: list[float] = []
        self.returncode = code

    def poll(self) -> int | None:
        return self.code if len(self.waited) >= self.waits else None

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        raise subprocess.TimeoutExpired("rsync", seconds)


@pytest.mark.parametrize("looking", [0.0, 0.01, 0.5])
def test_what_has_arrived_is_looked_at_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looking: float
) -> None:
    """Every fifth of a second, or with pauses of ten times what looking at all the files took."""
    process, names, progress = Running(3, 0, ""), list[bytes](), list[int]()
    now = [0.0]

    @contextlib.contextmanager
    def running(argv: list[str], given: bytes) -> Iterator[Any]:
        names.append(given)
        yield process, SimpleNamespace(text=lambda: process.text)

    def received(_: object, folder: Path) -> tuple[int, None]:
        now[0] += looking
        return 7, None

    monkeypatch.setattr(rsync, "_running", running)
    monkeypatch.setattr(rsync, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Listing, "received", received)
    found = listing_of(a=3, b=4)
    rsync.receive(MagicMock(), HOST, PurePosixPath("/c"), found, tmp_path, progress.append)
    assert names == [b"adapter/a\0adapter/b\0"] and progress == [7] * 3 and (tmp_path / "adapter").is_dir()
    assert process.waited == [pytest.approx(max(0.2, 10 * looking))] * 3
    # Without files nothing is started.
    rsync.receive(MagicMock(), HOST, PurePosixPath("/c"), listing_of(), tmp_path, progress.append)
    assert len(names) == 1
    process.code = process.returncode = 23
    with pytest.raises(HostError, match="did not receive all files from gpu-1"):
        rsync.receive(MagicMock(), HOST, PurePosixPath("/c"), found, tmp_path, progress.append)
    monkeypatch.setattr(Listing, "received", lambda *_: (9, PurePosixPath("adapter/a")))
    process.waited.clear()
    with pytest.raises(HostError, match="sends more than it listed") as caught:
        rsync.receive(MagicMock(), HOST, PurePosixPath("/c"), found, tmp_path, progress.append)
    assert caught.value.found == "adapter/a is larger"


@pytest.mark.parametrize(
    ("code", "text", "what", "found"),
    [
        (23, "rsync error: some\nPermission denied: x\n", "did not receive", "Permission denied: x"),
        (23, "rsync error: some  files\n", "did not receive", "rsync error: some files"),
        (23, "\n", "did not receive", "exit code 23"),
        (255, "Connection refused\n", "refuses the connection", None),
        (255, "closed (0 bytes received so far)\n", "cannot be reached", None),
        (255, "closed (10 bytes received so far)\n", "did not receive", None),
        (1, "x" * 400, "did not receive", "x" * 300),
    ],
)
def test_why_rsync_ended(code: int, text: str, what: str, found: str | None) -> None:
    error = rsync._problem(HOST, code, text)
    assert what in error.what and (found is None or error.found == found)


def test_files_that_are_larger_than_listed(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    found = listing_of(a=3, b=4, c=5)
    for name, size in (("a", 3), ("b", 2)):
        (tmp_path / "adapter" / name).write_bytes(bytes(size))
    assert found.received(tmp_path) == (5, None)
    (tmp_path / "adapter/b").write_bytes(bytes(5))
    assert found.received(tmp_path) == (7, PurePosixPath("adapter/b"))


def test_lists_at_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join(word + b"\0" for word in (b"rsync", b"d", b"0", b"755", b"1.0", b"./adapter", b""))
    monkeypatch.setattr(listings, "MAX_LIST_BYTES", len(data))
    asked: list[int] = []
    stream: Any = SimpleNamespace(read=lambda size: asked.append(size) or data[:size])
    assert read_listing(stream, "adapter") is not None and asked == [len(data) + 1]
    monkeypatch.setattr(listings, "MAX_LIST_BYTES", len(data) - 1)
    with pytest.raises(ValueError, match="longer than"):
        read_listing(io.BytesIO(data), "adapter")
    assert File(1, 0o644, 1.0).num_bytes == 1


def test_names_and_order_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.time, "strftime", lambda form, _: form)
    assert re.fullmatch(r"convert-%m%d-%H%M%S-[0-9a-f]{4}", job_name("convert"))
    rows = {
        name: JobRow(name, "convert", HOST, "exited", 0, False, since, "")
        for name, since in (("a", "2026-01-02"), ("b", "2026-01-03"), ("c", "2026-01-01"))
    }
    monkeypatch.setattr(jobs, "_rows_of", lambda _, host: ([rows[host]], None if host != "b" else HostError("odd")))
    ssh: Any = SimpleNamespace(each=lambda hosts, work: [work(host) for host in hosts])
    found, errors = list_jobs(["a", "b", "c"], ssh)  # type: ignore[list-item]
    assert [each.job for each in found] == ["b", "a", "c"] and [each.what for each in errors] == ["odd"]


def test_a_second_ctrl_c_leaves_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    follower = JobFollower(RunningJob("job", "finetune", (HOST,)), MagicMock(), io.StringIO(), said.append)
    monkeypatch.setattr(follower, "_follow_or_report", lambda *_: follower._leave.wait(10))
    waits: list[Any] = [KeyboardInterrupt(), False, KeyboardInterrupt()]
    wait = follower._leave.wait

    def waiting(seconds: float) -> bool:
        if seconds == 0.2:
            if isinstance(each := waits.pop(0), BaseException):
                raise each
            return False
        return wait(seconds)

    monkeypatch.setattr(follower._leave, "wait", waiting)
    with pytest.raises(Left):
        follower.follow()
    assert waits == [] and len(said) == 2
    assert said[0].startswith("\njob is running. Ctrl-C again leaves it running; to end it: mixtral-run stop job")
    assert said[1] == "Left. job continues: mixtral-run logs -f job"
