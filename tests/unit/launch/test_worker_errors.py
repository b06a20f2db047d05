"""Errors of the processes of a job: handed over as JSON, and reported once."""

from pathlib import Path
from traceback import StackSummary

import pytest
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mixtral_run.errors import MixtralRunError, Stopped, TrainingError
from mixtral_run.launch.worker_errors import (
    ERROR_DIRECTORY_VARIABLE,
    collect_error,
    hand_over_error,
    is_consequence,
    leave_quietly,
)


def ended(rank: int, exit_code: int, second: int) -> ProcessFailure:
    failure = ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=exit_code, error_file="")
    failure.timestamp = second
    return failure


def collected(folder: Path, *failures: ProcessFailure) -> MixtralRunError:
    return collect_error(folder, ChildFailedError("job", {each.local_rank: each for each in failures}))


def test_only_the_process_that_ended_first_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SystemExit):
        leave_quietly()
    # Rank 1 was killed and rank 2 lost it. torchrun then terminated rank 0, and killed rank 3 after five minutes.
    error = collected(tmp_path, ended(0, -15, 1000), ended(1, -9, 1000), ended(2, 1, 1000), ended(3, -9, 1300))
    assert [problem.split(":")[0] for problem in error.problems] == ["rank 1"]
    assert "memory" in error.problems[0]


def test_a_terminated_process_is_reported_if_it_is_the_only_one(tmp_path: Path) -> None:
    assert "rank 0: ended by signal 15" in str(collected(tmp_path, ended(0, -15, 1000)))


def test_a_process_that_was_interrupted_alone_is_named(tmp_path: Path) -> None:
    assert "rank 1: interrupted (SIGINT)" in str(collected(tmp_path, ended(0, -15, 1001), ended(1, 130, 1000)))


def test_the_same_error_of_several_processes_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_DIRECTORY_VARIABLE, str(tmp_path))
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        hand_over_error(TrainingError("The memory is full.", found=f"{rank + 1} GiB wanted", next_command="plan"))
    error = collected(tmp_path, *(ended(rank, 6, 1000) for rank in range(3)))
    assert (error.what, error.found) == ("The memory is full.", "1 GiB wanted")


def test_ranks_that_only_learned_of_a_failed_write_are_a_consequence() -> None:
    assert is_consequence(CheckpointException("write", {}))
    cause = (OSError(28, "No space left on device"), StackSummary())
    assert not is_consequence(CheckpointException("write", {0: cause}))


def test_an_error_that_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk is often both the error and the reason why its file cannot be written."""
    monkeypatch.setenv(ERROR_DIRECTORY_VARIABLE, str(tmp_path / "missing"))
    monkeypatch.setenv("RANK", "1")
    hand_over_error(TrainingError("The disk is full."))
    assert "[rank 1] ✗ The disk is full." in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"what": "x"', "[]", "3"])
def test_a_file_that_was_cut_off_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    (tmp_path / "rank-0.error").write_text(content)
    monkeypatch.setenv(ERROR_DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    hand_over_error(TrainingError("The memory is full."))
    assert collected(tmp_path, ended(0, -9, 1000), ended(1, 6, 1000)).what == "The memory is full."


def test_several_that_stopped_on_request_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_DIRECTORY_VARIABLE, str(tmp_path))
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        hand_over_error(Stopped(f"Stopped after iteration {rank}."))
    assert collected(tmp_path, ended(0, 130, 1000), ended(1, 130, 1000)).exit_code == 130
