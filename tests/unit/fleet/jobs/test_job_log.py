"""Live output of a log that is not strictly in the order of its time stamps, over connections that break."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mixtral_run.errors import Stopped, TrainingError
from mixtral_run.fleet.explain.explain import explain
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.jobs import job_log
from mixtral_run.fleet.jobs.job_log import JobFollower, job_error
from mixtral_run.fleet.jobs.jobs import JobRow, RunningJob
from mixtral_run.fleet.ssh.connection import Ssh

HOST = parse_host("gpu-01")


def stamp(tick: int) -> str:
    return f"2026-01-01T00:00:00.{tick:09d}Z"


class BreakingEngine(Ssh):
    """STAND-IN for an engine behind SSH: sends its log from `--since` on; connections break after some lines."""

    def __init__(self, log: list[tuple[int, str]], cuts: list[int]) -> None:
        super().__init__()
        self.log, self.cuts = log, cuts

    def stream(
        self,
        host: Host,
        command: Sequence[str],
        on_line: Callable[[str], None],
        stop: threading.Event | None = None,
        on_error_line: Callable[[str], None] | None = None,
    ) -> int:
        since = command[command.index("--since") + 1] if "--since" in command else ""
        lines = [f"{stamp(tick)} {text}" for tick, text in self.log if stamp(tick) >= since]
        for line in lines[: self.cuts.pop(0) if self.cuts else None]:
            on_line(line)
        return 0


def follow(monkeypatch: pytest.MonkeyPatch, log: list[tuple[int, str]], cuts: list[int], exit_code: int = 0) -> str:
    breaking = BreakingEngine(log, list(cuts))
    row = JobRow("job", "finetune", HOST, "exited", exit_code, False, "", "")
    running = JobRow("job", "finetune", HOST, "running", 0, False, "", "")
    monkeypatch.setattr(job_log, "RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr(job_log, "list_jobs", lambda *_: ([running if breaking.cuts else row], []))
    out = io.StringIO()
    JobFollower(RunningJob("job", "finetune", (HOST,)), breaking, out, say=[].append).follow()
    return out.getvalue()


LOG = [(tick - 1 if tick % 3 == 0 else tick + 1, f"line {tick}") for tick in range(1, 200)]


@pytest.mark.parametrize("cuts", [[], [5], [3, 70, 51, 52], [199]])
def test_every_line_is_shown_once(monkeypatch: pytest.MonkeyPatch, cuts: list[int]) -> None:
    assert follow(monkeypatch, LOG, cuts).splitlines() == [text for _, text in LOG]


def test_equal_lines_of_one_moment_are_all_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert follow(monkeypatch, [(7, "same")] * 4, [2]) == "same\n" * 4


def test_the_cause_is_found_in_a_line_that_came_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="A GPU's memory is full"):
        follow(monkeypatch, [(2, "config"), (1, "torch.OutOfMemoryError: CUDA out of memory.")], [], exit_code=6)


def test_a_conversion_that_the_kernel_killed_without_a_word_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    row = JobRow("convert-1", "convert", HOST, "exited", 137, True, "", "")
    reported = str(job_error(RunningJob("convert-1", "convert", (HOST,)), HOST, row, ["Converting a → b"]))
    assert "The host's memory is full" in reported
    assert "bootstrap gpu-01 --tags swap" in reported
    assert "(host-memory)" in explain("gpu-01")


def test_last_words_after_the_stream_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking = BreakingEngine(LOG, [10])
    row = JobRow("job", "finetune", HOST, "exited", 0, False, "", "")
    monkeypatch.setattr(job_log, "list_jobs", lambda *_: ([row], []))
    out = io.StringIO()
    JobFollower(RunningJob("job", "finetune", (HOST,)), breaking, out, say=[].append).follow()
    assert out.getvalue().splitlines() == [text for _, text in LOG]


@pytest.mark.parametrize("exit_code", [130, 143])
def test_a_job_that_was_asked_to_end_is_stopped_not_failed(monkeypatch: pytest.MonkeyPatch, exit_code: int) -> None:
    with pytest.raises(Stopped, match="was stopped on gpu-01") as caught:
        follow(monkeypatch, [(1, "saved")], [], exit_code=exit_code)
    assert caught.value.exit_code == 130
    assert "--resume" in str(caught.value)
