"""The words of rsync, the folders of a fetch and what lies where after each of its ends."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import subprocess
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
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import JobRow
from mixtral_run.fleet.jobs.transfer import listing, rsync
from mixtral_run.fleet.jobs.transfer.unpack import Received
from mixtral_run.fleet.ssh.connection import Ssh
from tests.unit.fleet.jobs.transfer.test_sums_and_bounds import START, read

HOST = parse_host("gpu-1")


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
    own = dataclasses.replace(HOST, checkpoints_folder="/data/c")
    monkeypatch.setattr(fetching, "find_hosts", lambda *_: [own])
    fetch_job("gpu-1:/checkpoints/x", tmp_path)
    assert calls[-1][0] == (own, "/data/c/x", tmp_path / "x")
    fetch_job("gpu-1:/checkpoints/x", tmp_path, folders=JobOptions(checkpoints_folder="/d"))
    assert calls[-1][0] == (own, "/d/x", tmp_path / "x")
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


@pytest.mark.parametrize("error", [HostError("lost"), KeyboardInterrupt()])
def test_what_has_arrived_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    said: list[str] = []
    monkeypatch.setattr(fetching, "receive", MagicMock(side_effect=error))
    with pytest.raises(type(error)):
        fetching._continue(MagicMock(), HOST, "/c/a", read(START), tmp_path / "out", said.append)
    (work,) = tmp_path.glob(".mixtral-run-fetch-*")
    assert said == ["… 0 files, 0 bytes on gpu-1", f"What has arrived stays in {work}; the same command continues."]
