"""The lock of an output: it names its holder, ends with it, and lets nobody write through a link."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.bootstrap.bootstrap import BootstrapRequest, bootstrap
from mixtral_run.fleet.state import state_folder
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.run_lock import LOCK_NAME, acquire, all_of, holder_of, lock_problems, mounts, one_run
from mixtral_run.run_lock import lock as lock_module
from mixtral_run.train.preflight import output_problems
from mixtral_run.weights.io import atomic_folder
from mixtral_run.weights.quantized_cache import layout, writer

HOLD = """
import sys, time
from pathlib import Path
from mixtral_run.run_lock import acquire
held = [acquire(Path(each), "mixtral-run finetune", Path(each)) for each in sys.argv[1:]]
print("held", flush=True)
time.sleep(1000)
"""


def holding(*locks: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, *map(str, locks)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with holding(tmp_path / "out" / LOCK_NAME) as process:
        yield process
        process.kill()


def test_a_second_run_is_told_who_writes_and_gets_the_folder_once_that_one_is_killed(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    lock = tmp_path / "out" / LOCK_NAME
    holder = holder_of(lock)
    assert holder is not None
    assert (holder.command, holder.host, holder.pid) == ("mixtral-run finetune", socket.gethostname(), other.pid)
    with pytest.raises(ConfigError) as refused, one_run(lock, "mixtral-run finetune", tmp_path / "out"):
        pytest.fail("it writes as well")
    for each in (f"process {other.pid}", socket.gethostname(), holder.since, f"kill {other.pid}"):
        assert each in str(refused.value)
    (problem,) = output_problems(tmp_path / "out", resume=None)
    assert f"mixtral-run finetune, process {other.pid} on {socket.gethostname()}" in problem
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert lock.exists() and output_problems(tmp_path / "out", resume=None) == []
    with one_run(lock, "mixtral-run finetune", tmp_path / "out"):
        # In this process as well the lock holds: flock belongs to the open file.
        assert lock_problems(lock, "--save out") != []
    assert list((tmp_path / "out").iterdir()) == []


def test_a_convert_or_export_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "base"
    with holding(atomic_folder.work_folder(output) / LOCK_NAME) as process:
        try:
            (problem,) = atomic_folder.output_problems(output, overwrite=False, is_ours=lambda _: False, what="x")
            assert f"process {process.pid} on " in problem
            with pytest.raises(ConfigError, match=f"process {process.pid}"), atomic_folder.Staging(output, "m", "c"):
                pytest.fail("both write")
        finally:
            process.kill()


def test_a_folder_that_its_holder_removes_before_its_lock_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where several processes convert into one folder at once."""
    work, opened = tmp_path / "work", lock_module._open_or_create
    ends = [work.rmdir]

    def late(lock: Path) -> tuple[int, bool]:
        if ends:
            ends.pop()()
        return opened(lock)

    monkeypatch.setattr(lock_module, "_open_or_create", late)
    descriptor = acquire(work / LOCK_NAME, "mixtral-run convert", tmp_path)
    assert not ends and holder_of(work / LOCK_NAME) is not None
    lock_module.release(work / LOCK_NAME, descriptor)


def test_what_a_publication_leaves_behind_has_no_lock(tmp_path: Path) -> None:
    output = tmp_path / "base"
    for content in ("one", "two"):
        with atomic_folder.Staging(output, "marker", "mixtral-run convert") as staging:
            staging.clear()
            (staging.folder / "marker").write_text(content)
            staging.publish()
        assert [each.name for each in tmp_path.iterdir()] == ["base"]
        assert [each.name for each in output.iterdir()] == ["marker"]
        assert (output / "marker").read_text() == content


def test_all_hosts_that_another_bootstrap_sets_up_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = state_folder("locks")
    with holding(folder / "gpu-01.lock", folder / "gpu-03.lock") as process:
        try:
            with pytest.raises(ConfigError) as refused:
                bootstrap(BootstrapRequest(hosts=("gpu-01", "gpu-02", "gpu-03")))
        finally:
            process.kill()
    assert [line.split(":")[0] for line in refused.value.problems] == ["gpu-01", "gpu-03"]
    assert all(f"process {process.pid}" in line for line in refused.value.problems)
    assert not (folder / "gpu-02.lock").exists()


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    mine, lock = tmp_path / "mine", tmp_path / LOCK_NAME
    mine.write_text("content")
    lock.symlink_to(mine)
    with pytest.raises(OSError, match="symbolic links"), one_run(lock, "mixtral-run finetune", tmp_path):
        pytest.fail("it writes through a link")
    assert mine.read_text() == "content"


@pytest.mark.parametrize(
    "note", ["", "[" * 9000, "[]", '{"command": "a\\u001b[2J", "host": "h", "pid": 1, "since": ""}']
)
def test_a_note_in_another_form_names_nobody(tmp_path: Path, note: str) -> None:
    lock = tmp_path / LOCK_NAME
    lock.write_text(note)
    with lock.open("r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        (problem,) = lock_problems(lock, "--save x")
    assert "another process" in problem and problem.isprintable()


def test_without_locks_of_the_file_system_the_note_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock_module, "SETTLE_SECONDS", 0.0)
    lock = tmp_path / LOCK_NAME
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        note = {"command": "mixtral-run export", "host": socket.gethostname(), "pid": process.pid, "since": "today"}
        lock.write_text(json.dumps(note))
        assert "mixtral-run export" in lock_problems(lock, "--output-path x")[0]
        process.kill()
        process.wait()
        assert lock_problems(lock, "--output-path x") == []
    with all_of([("x", lock)], "mixtral-run export", "No."):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_quantized_cache_that_another_host_writes_stays_where_locks_are_those_of_one_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".quantised-fp8.unfinished-0123456789ab"
    left.mkdir()
    wanted = layout.Files(layout.cache_folder(tmp_path, "fp8"), MIXTRAL_8X7B, "fp8")
    for reaches in (False, True):
        monkeypatch.setattr(mounts, "locks_reach_other_hosts", lambda *_, _answer=reaches: _answer)
        with pytest.raises(writer.CacheNotWritten, match="GiB free"):
            writer.begin(tmp_path, wanted, 10**18, lambda: False)
        assert left.exists() is not reaches


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_what_a_killed_run_of_another_user_left_is_removed_and_a_running_one_is_named() -> None:
    # Not below the folder of the other tests, which is closed to other users.
    with tempfile.TemporaryDirectory() as name:
        folder, lock = Path(name), Path(name) / LOCK_NAME
        folder.chmod(0o777)
        held = acquire(lock, "mixtral-run finetune", folder)
        os.seteuid(65534)
        try:
            holder = holder_of(lock)
            assert holder is not None and holder.pid == os.getpid()
            with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
                acquire(lock, "mixtral-run finetune", folder)
            os.close(held)
            assert holder_of(lock) is None
            with one_run(lock, "mixtral-run finetune", folder):
                assert lock.stat().st_uid == 65534
        finally:
            os.seteuid(0)


def test_the_other_ranks_of_a_job_do_not_take_the_first_ones_lock_for_another_run(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "out" / LOCK_NAME
    monkeypatch.setenv("RANK", "0")
    assert f"process {other.pid}" in lock_problems(lock, "--save out")[0]
    monkeypatch.setenv("RANK", "1")
    assert lock_problems(lock, "--save out") == []
