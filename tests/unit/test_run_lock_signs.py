"""Locks of file systems that keep those of each host apart: another host is seen by its note and its signs of life."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixtral_run.errors import ConfigError, HostError, MixtralRunError
from mixtral_run.run_lock import (
    LOCK_NAME,
    acquire,
    all_of,
    check_held,
    holder_of,
    lock_problems,
    mounts,
    one_run,
    release,
    signs,
)  # fmt: skip
from mixtral_run.run_lock import lock as lock_module
from mixtral_run.run_lock.signs import read_by_path
from mixtral_run.train.checkpoints.save_target import SaveTarget
from mixtral_run.train.checkpoints.saving import SaveRequest, begin, complete
from mixtral_run.weights.io.atomic_folder import Staging
from mixtral_run.weights.manifest.checkpoint_folder import LATEST

MOUNT = "40 20 0:52 / /srv rw,relatime shared:7 - {} server:/export rw,{}"
OTHER = {"command": "mixtral-run finetune", "host": "gpu-07", "pid": 17, "since": "today", "boot": "b", "token": "t"}


@pytest.mark.parametrize(
    ("kind", "options", "reaches", "late"),
    [
        ("ext4", "errors=remount-ro", True, 0),
        ("overlay", "lowerdir=/a", True, 0),
        ("nfs4", "vers=4.2,hard,local_lock=none", True, 0),
        ("nfs", "vers=3,nolock,local_lock=all", False, 0),
        ("nfs4", "vers=4.2,local_lock=flock,acregmin=3,acregmax=600", False, 600),
        ("nfs", "vers=3,nolock,nocto", False, 60),
        ("nfs", "vers=3,nolock,nocto,acregmax=3600", False, 3600),
        ("nfs", "vers=3,local_lock=posix", True, 0),
        ("lustre", "flock,lazystatfs", True, 0),
        ("lustre", "localflock", False, 0),
        ("cifs", "vers=3.0,nobrl,actimeo=90", False, 90),
        ("fuse.sshfs", "user_id=0", False, 60),
        ("fuse.gcsfuse", "user_id=0", False, None),
        ("fuse.s3fs", "user_id=0", False, None),
        ("fuse", "user_id=0", False, None),
        ("9p", "trans=virtio", False, 0),
        ("9p", "trans=virtio,cache=loose", False, None),
        ("ceph", "name=x", True, 0),
    ],
)
def test_the_mount_tells_whether_a_lock_holds_between_hosts_and_how_late_writes_show(
    kind: str, options: str, reaches: bool, late: float | None
) -> None:
    lines = "\n".join((MOUNT.replace("0:52", "0:5").format("nfs", "nolock"), MOUNT.format(kind, options)))
    assert mounts.locks_reach_other_hosts(lines, "0:52") is reaches
    assert mounts.cache_seconds(lines, "0:52") == late
    assert mounts.locks_reach_other_hosts(lines, "8:1"), "a disk that no line names"


class Clock:
    """A clock that only sleeping moves, and the reports of a lock that was lost. ended: an error in the place of exit.

    during: called with the time at each sleep.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.ended: list[MixtralRunError] = []
        self.over = threading.Event()
        self.during: Callable[[float], object] = float

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during(self.now)

    def end(self, error: MixtralRunError) -> None:
        self.ended.append(error)
        self.over.set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """A shared file system whose locks are those of one host: flock answers yes to everybody."""
    found = Clock()
    monkeypatch.setattr(mounts, "locks_reach_other_hosts", lambda *_: False)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(signs, "time", found)
    monkeypatch.setattr(lock_module, "time", found)
    monkeypatch.setattr(signs, "_end", found.end)
    monkeypatch.setattr(signs, "_announced", set())
    monkeypatch.setattr(signs, "BEAT_SECONDS", 0.01)
    yield found
    assert not signs._watched


def of_another_host(lock: Path, counter: int = 0) -> None:
    """Put the note of a holder on gpu-07 in the place of what is there, in a new file."""
    lock.unlink(missing_ok=True)
    lock.write_text(json.dumps(OTHER | {"counter": f"{counter:012d}"}))


def test_a_holder_that_was_taken_for_dead_ends_and_leaves_the_new_lock(tmp_path: Path, clock: Clock) -> None:
    lock = tmp_path / LOCK_NAME
    held = acquire(lock, "mixtral-run finetune", tmp_path)
    own = lock.read_bytes()
    check_held()
    for _ in range(500):
        if lock.read_bytes() != own:
            break
        time.sleep(0.01)
    assert lock.read_bytes() != own and not clock.ended, "the counter is a sign of life"
    lock.write_text(json.dumps(OTHER))  # In place, as older versions do.
    taken = lock.read_bytes()
    assert clock.over.wait(5)
    (error,) = clock.ended
    assert isinstance(error, HostError) and error.exit_code == 3 and "process 17 on gpu-07" in str(error)
    with pytest.raises(HostError, match="gpu-07"):
        check_held()
    release(lock, held)
    assert lock.read_bytes() == taken
    lock.unlink()
    held = acquire(lock, "mixtral-run finetune", tmp_path)
    release(lock, held)
    assert not lock.exists() and len(clock.ended) == 1


def test_a_result_gets_no_name_once_the_folder_was_taken(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "BEAT_SECONDS", 1000.0)
    staging = Staging(tmp_path / "base", "marker", "mixtral-run convert")
    with pytest.raises(HostError, match="gpu-07"), staging:
        (staging.folder / "marker").write_text("mine")
        of_another_host(staging.folder / LOCK_NAME)
        staging.publish()
    assert not (tmp_path / "base").exists() and (staging.folder / "marker").exists(), "another run has the folder"
    staging = Staging(tmp_path / "second", "marker", "mixtral-run convert")
    with staging:
        (staging.folder / "marker").write_text("mine")
        staging.publish()
    assert (tmp_path / "second/marker").exists() and not clock.ended


@pytest.mark.usefixtures("clock")
def test_a_checkpoint_gets_no_name_once_the_folder_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "BEAT_SECONDS", 1000.0)
    lock = tmp_path / LOCK_NAME
    target = SaveTarget(SimpleNamespace(), tmp_path, 5)  # type: ignore[arg-type]
    with one_run(lock, "mixtral-run finetune", tmp_path):
        begin(target, None)
        own = lock.read_text()
        of_another_host(lock)
        with pytest.raises(HostError, match="gpu-07"):
            complete(target, SaveRequest(5, {}), {}, {}, "adapter")
        assert sorted(each.name for each in tmp_path.iterdir()) == [".iter_0000005.partial", LOCK_NAME]
        lock.write_text(own)
        complete(target, SaveRequest(5, {}), {}, {}, "adapter")
    assert target.final.is_dir() and (tmp_path / LATEST).is_file()


def test_a_dead_holder_is_waited_for_once_and_replaced_by_a_new_file(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / LOCK_NAME
    of_another_host(lock)
    old = os.open(lock, os.O_RDONLY)
    assert lock_problems(lock, "--save x") == []
    assert 45 <= clock.now < 50
    with one_run(lock, "mixtral-run finetune", tmp_path):
        assert json.loads(lock.read_text())["host"] == socket.gethostname()
        assert json.loads(os.pread(old, 4096, 0)) == OTHER | {"counter": "0" * 12}, "the other's file was written to"
    os.close(old)
    lock.write_text(json.dumps(OTHER | {"host": socket.gethostname(), "boot": ""}))
    old = os.open(lock, os.O_RDONLY)
    acquire_and_release(lock)
    assert b"today" in os.pread(old, 4096, 0), "so is that of a dead process of this host"
    os.close(old)
    assert clock.now < 52 and capsys.readouterr().err.count("sign of life") == 1


def test_a_living_holder_is_named_at_its_first_sign(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / LOCK_NAME
    of_another_host(lock)
    clock.during = lambda now: of_another_host(lock, int(now) // 10)
    with pytest.raises(ConfigError, match="gpu-07") as refused, one_run(lock, "mixtral-run finetune", tmp_path):
        pytest.fail("both write")
    assert clock.now <= 11 and capsys.readouterr().err.count("\n") == 1
    assert "rm " not in str(refused.value), "it lives"


@pytest.mark.parametrize("kind", ["slow", "failing"])
def test_time_in_which_the_storage_does_not_answer_is_no_silence(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    lock, look, looks = tmp_path / LOCK_NAME, signs._look, []
    of_another_host(lock)

    def stalled(path: Path) -> tuple[int, int, bytes]:
        looks.append(clock.now)
        if kind == "failing" and len(looks) >= 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if len(looks) == 3:
            clock.now += (
                60  # The server is away, for the beats of the holder as well, which come 10 s after its return.
            )
            clock.during = lambda now: of_another_host(lock, 1) if now > 73 else None
        return look(path)

    monkeypatch.setattr(signs, "_look", stalled)
    assert "gpu-07" in str(holder_of(lock))
    assert lock.exists()


def test_many_dead_holders_are_waited_for_together(tmp_path: Path, clock: Clock) -> None:
    locks = [(f"gpu-{number}", tmp_path / f"{number}.lock") for number in range(5)]
    for _, lock in locks:
        of_another_host(lock)
    clock.during = lambda now: of_another_host(locks[3][1], int(now))
    with pytest.raises(ConfigError) as refused, all_of(locks, "mixtral-run bootstrap", "No."):
        pytest.fail("both write")
    assert [each.split(":")[0] for each in refused.value.problems] == ["gpu-3"]
    assert clock.now < 60 and [lock.exists() for _, lock in locks] == [False, False, False, True, False]


def test_who_waits_for_a_sign_keeps_nobody_off(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, opened = tmp_path / LOCK_NAME, []
    of_another_host(lock)

    def count(now: float) -> None:
        own = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
        opened.append(own.count(str(lock)))

    clock.during = count
    assert holder_of(lock) is None and lock_problems(lock, "--save x") == []
    of_another_host(lock)
    acquire_and_release(lock)
    assert opened[:-1] and max(opened[:-1]) == 0, "an open file keeps the lock of this host"


def acquire_and_release(lock: Path) -> None:
    release(lock, acquire(lock, "mixtral-run finetune", lock.parent))


@pytest.mark.parametrize("kind", [errno.ESTALE, errno.ENOENT, "other"])
def test_a_note_that_is_not_there_any_more_is_not_mine(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, kind: int | str
) -> None:
    """Another host has put its note there between the write and the second look of this one."""
    lock, reads = tmp_path / LOCK_NAME, []
    look = signs._look

    def read(path: Path) -> tuple[int, int, bytes]:
        reads.append(path)
        if len(reads) == 1:
            of_another_host(lock)
            clock.during = lambda now: of_another_host(lock, int(now))
            if isinstance(kind, int):
                raise OSError(kind, os.strerror(kind))
        return look(path)

    monkeypatch.setattr(signs, "_look", read)
    with pytest.raises(ConfigError, match="gpu-07"):
        acquire(lock, "mixtral-run finetune", tmp_path)
    assert json.loads(lock.read_text())["host"] == "gpu-07"


def test_the_last_look_before_a_lock_is_removed_decides(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = tmp_path / LOCK_NAME, signs._removed
    of_another_host(lock)

    def late(doubt: signs.Doubt) -> bool:
        of_another_host(lock, 1)
        return removed(doubt)

    monkeypatch.setattr(signs, "_removed", late)
    assert "gpu-07" in str(holder_of(lock)) and lock.exists()


def test_where_writes_show_at_any_time_a_foreign_lock_is_refused_at_once(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "cache_seconds_of", lambda _: None)
    lock = tmp_path / LOCK_NAME
    of_another_host(lock)
    with pytest.raises(ConfigError, match=f"rm {lock}"):
        acquire(lock, "mixtral-run finetune", tmp_path)
    assert f"rm {lock}" in lock_problems(lock, "--save x")[0] and clock.now == 0
    # Two hosts may have one name.
    lock.write_text(json.dumps(OTHER | {"host": socket.gethostname()}))
    assert lock_problems(lock, "--save x")
    monkeypatch.setattr(signs, "cache_seconds_of", lambda _: 600.0)
    assert lock_problems(lock, "--save x") == [] and clock.now > 640


def test_the_process_ends_with_the_errors_code_and_reports_it_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[object] = []
    monkeypatch.setattr(os, "_exit", done.append)
    monkeypatch.setattr(signs, "_report", [])
    error = HostError("Taken.")
    signs._end(error)
    assert done == [3] and "Taken." in capsys.readouterr().err
    signs.report_loss_with(done.append)
    signs._end(error)
    assert done == [3, error, 3] and not capsys.readouterr().err


def test_a_pipe_in_the_place_of_a_lock_holds_nobody(tmp_path: Path) -> None:
    """Opened as a file is, it waits for a writer that never comes."""
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(OSError, match="Illegal seek"):
        read_by_path(tmp_path / "lock")
