"""Which process of a job hangs, by the heartbeats of all; and that a waiting machine alone is no hang."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_run.launch import hang_watch
from mixtral_run.launch.hang_watch import HangWatch, describe_hang
from mixtral_run.launch.heartbeat import Beat, Heartbeat, State, read_beat

WAITING = Beat(11, 60.0, 9, 30, 4, 8, State.IN_COLLECTIVE, "all_reduce")
WORKING = dataclasses.replace(WAITING, pid=12, num_collectives=7, state=State.WORKING)


def hung(beats: dict[int, tuple[Beat, bool]], stopped: set[int]) -> list[str]:
    return [line for line in describe_hang(beats, stopped) if " waits; " not in line]


def test_a_stopped_process_is_named_before_all_others() -> None:
    lines = hung({0: (WORKING, False), 1: (WAITING, True), 2: (WAITING, False)}, {1})
    assert [line.split(";")[0] for line in lines] == [
        "rank 1 (process 11) is stopped by a signal (SIGSTOP, Ctrl-Z or a debugger)"
    ]


def test_a_process_without_a_beat_is_named_before_one_that_works() -> None:
    lines = hung({0: (WORKING, False), 1: (WORKING, True)}, set())
    assert len(lines) == 1 and lines[0].startswith("rank 1 (process 12) runs no Python code")


def test_the_process_outside_of_the_collective_is_named() -> None:
    lines = describe_hang({0: (WAITING, False), 1: (WORKING, False)}, set())
    assert lines[0].startswith("rank 1 (process 12) does not come to the collective")
    assert lines[0].endswith("last step 4, last collective all_reduce (number 7)")
    assert lines[1:] == ["rank 0 waits; last step 4, last collective all_reduce (number 8)"]


def test_of_processes_that_all_wait_the_one_behind_is_named() -> None:
    behind = dataclasses.replace(WAITING, num_collectives=6, state=State.ON_GPU)
    assert hung({0: (WAITING, False), 3: (behind, False)}, set())[0].startswith("rank 3 (process 11) is behind")
    lines = hung({0: (WAITING, False), 1: (WAITING, False)}, set())
    assert len(lines) == 1 and "another machine" in lines[0]


def test_a_heartbeat_is_read_as_it_was_noted(tmp_path: Path) -> None:
    file = tmp_path / "rank-0.heartbeat"
    assert read_beat(file) is None
    heartbeat = Heartbeat(file, 54.0)
    heartbeat.note_step(7, on_gpu=True)
    heartbeat.enter("all_gather_object")
    heartbeat.enter("all_gather")
    found = read_beat(file)
    assert found is not None
    assert (found.pid, found.limit, found.step, found.collective) == (os.getpid(), 54.0, 7, "all_gather_object")
    assert (found.num_collectives, found.state) == (1, State.IN_COLLECTIVE)
    heartbeat.leave(finished=True)
    heartbeat.leave(finished=True)
    after = read_beat(file)
    assert after is not None and after.state is State.ON_GPU and after.events == found.events + 1
    heartbeat.enter("all_reduce")
    heartbeat.leave(finished=False)
    waits = read_beat(file)
    assert waits is not None and waits.state is State.IN_COLLECTIVE


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as started:
        yield started
        started.kill()


def write(folder: Path, rank: int, beat: Beat) -> None:
    values = dataclasses.astuple(beat)
    name = str(values[-1]).encode()
    (folder / f"rank-{rank}.heartbeat").write_bytes(struct.pack("<qdqqqqq40s", *values[:-1], name))


def test_the_job_ends_after_the_limit_and_not_before(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hang_watch, "STACK_SECONDS", 0.0)
    monkeypatch.setattr(hang_watch, "STACK_SIGNAL", 0)  # this process has no handler for it
    write(tmp_path, 0, dataclasses.replace(WAITING, pid=process.pid, limit=3.0))
    watch = HangWatch(tmp_path)
    watch.look(1.0)
    for _ in range(2):
        watch.look(1.0)
        assert watch.error is None
    # A note in between: the process got on.
    write(tmp_path, 0, dataclasses.replace(WAITING, pid=process.pid, limit=3.0, events=31))
    for _ in range(3):
        watch.look(1.0)
        assert watch.error is None
    watch.look(1.0)
    assert watch.error is not None and watch.error.exit_code == 6
    assert process.wait(10) == -9


def test_a_machine_that_slept_does_not_count(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    write(tmp_path, 0, dataclasses.replace(WAITING, pid=process.pid, limit=60.0))
    watch = HangWatch(tmp_path)
    for _ in range(3):
        watch.look(100_000.0)
    assert watch.error is None


def test_a_process_that_works_for_long_ends_nothing(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    write(tmp_path, 0, dataclasses.replace(WORKING, pid=process.pid, limit=1.0))
    watch = HangWatch(tmp_path)
    for _ in range(10):
        watch.look(5.0)
    assert watch.error is None
    time.sleep(0.1)
    assert process.poll() is None
