"""Errors of the processes of a job: handed over as JSON, and reported once."""

from pathlib import Path
from traceback import StackSummary

import pytest
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mixtral_run.errors import MixtralRunError, TrainingError
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


def told(folder: Path, *failures: ProcessFailure) -> MixtralRunError:
    return collect_error(folder, ChildFailedError("job", {each.local_rank: each for each in failures}))


def test_only_the_process_that_ended_first_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SystemExit):
        leave_quietly()
    # Rank 1 was killed; 2 lost it, 0 was asked to end by torchrun, 3 did not and was killed after five minutes.
    error = told(tmp_path, ended(0, -15, 1000), ended(1, -9, 1000), ended(2, 1, 1000), ended(3, -9, 1300))
    assert [problem.split(":")[0] for problem in error.problems] == ["rank 1"]
    assert "memory" in error.problems[0]


def test_a_process_that_only_was_asked_to_end_is_named_where_no_other_is(tmp_path: Path) -> None:
    assert "rank 0: ended by signal 15" in str(told(tmp_path, ended(0, -15, 1000)))


def test_the_same_problem_of_several_processes_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_DIRECTORY_VARIABLE, str(tmp_path))
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        hand_over_error(TrainingError("The memory is full.", found=f"{rank + 1} GiB wanted", next_command="plan"))
    error = told(tmp_path, *(ended(rank, 6, 1000) for rank in range(3)))
    assert (error.what, error.found) == ("The memory is full.", "1 GiB wanted")


def test_ranks_that_only_hear_of_a_failed_write_are_no_cause() -> None:
    assert is_consequence(CheckpointException("write", {}))
    cause = (OSError(28, "No space left on device"), StackSummary())
    assert not is_consequence(CheckpointException("write", {0: cause}))
