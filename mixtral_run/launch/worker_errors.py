"""Errors of a job's processes: each process leaves its own as JSON, and the parent raises one error for all of them."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from mixtral_run.errors import MixtralRunError, TrainingError, from_mapping, to_mapping
from mixtral_run.launch.process_exit import INTERRUPTED

ERROR_DIRECTORY_VARIABLE = "MIXTRAL_RUN_ERROR_DIRECTORY"
"""Environment variable of a process that `run_job` started: the folder for its error, which its parent reads."""

_LOST_PEER = (
    r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|NCCL communicator was aborted"
    # torch's checkpoint writer says this on ranks that only learned that another rank could not write.
    r"|ranks:dict_keys\(\[\]\)"
)


def hand_over_error(error: MixtralRunError) -> None:
    """Write the error of this process for the parent, which prints each distinct error once.

    If the file cannot be written, because the disk is full for example, print the error here.
    """
    file = _file("error")
    unfinished = file.with_suffix(".partial")
    try:
        unfinished.write_text(json.dumps(to_mapping(error)), encoding="utf-8")
        unfinished.rename(file)
    except OSError:
        print(f"[rank {os.environ.get('RANK', '0')}] ✗ {error}", file=sys.stderr, flush=True)


def is_consequence(error: BaseException) -> bool:
    """Return True if a process failed only because another process of the job had ended."""
    return re.search(_LOST_PEER, str(error)) is not None


def leave_quietly() -> NoReturn:
    """End this process as failed without a message: the process that failed first reports the reason."""
    _file("consequence").touch()
    sys.exit(1)


def collect_error(folder: Path, failure: object) -> MixtralRunError:
    """Return the error of a job whose processes failed.

    Args:
        folder: Directory of ERROR_DIRECTORY_VARIABLE.
        failure: torch's ChildFailedError, with the failure of each process.

    Returns:
        The error that the processes left, or one error that lists several distinct ones. If there is none, a
        TrainingError with the exit code or signal of each process that ended first.
    """
    errors: dict[object, MixtralRunError] = {}
    for file in sorted(folder.glob("rank-*.error")):
        try:
            error = from_mapping(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a process that was killed while it wrote
            continue
        # `found` may differ between ranks by a number.
        errors.setdefault((type(error), error.what, error.where, error.problems, error.next_command), error)
    distinct = list(errors.values())
    if len(distinct) == 1:
        return distinct[0]
    if distinct:
        return type(distinct[0])("Several processes failed.", problems=[str(error) for error in distinct])
    silent = {int(file.stem.removeprefix("rank-")) for file in folder.glob("rank-*.consequence")}
    lines = [_describe_end(process) for process in _first_to_end(failure, silent)]
    return TrainingError(
        "A process of the job ended before its work was done.",
        problems=lines,
        next_command="the lines above this one say more; --debug shows tracebacks",
    )


def _file(suffix: str) -> Path:
    return Path(os.environ[ERROR_DIRECTORY_VARIABLE]) / f"rank-{os.environ.get('RANK', '0')}.{suffix}"


def _first_to_end(failure: object, silent: set[int]) -> list[Any]:
    """Return the processes that failed on their own. torchrun ends the others afterwards, by force if it must.

    silent: local ranks that left quietly as a consequence.
    """
    ended: list[Any] = [process for _, process in sorted(getattr(failure, "failures", {}).items())]
    first = min((process.timestamp for process in ended), default=0)
    # Timestamps are in seconds, and torchrun may end the other processes within the same second.
    on_their_own = [
        process
        for process in ended
        if process.timestamp == first and process.exitcode != -signal.SIGTERM and process.local_rank not in silent
    ]
    return on_their_own or ended


def _describe_end(process: object) -> str:
    exit_code = getattr(process, "exitcode", None)
    number = getattr(process, "local_rank", "?")
    if exit_code == -9:
        return f"rank {number}: killed (SIGKILL), which the kernel does when memory runs out: see dmesg"
    if exit_code == INTERRUPTED:
        return f"rank {number}: interrupted (SIGINT)"
    if isinstance(exit_code, int) and exit_code < 0:
        return f"rank {number}: ended by signal {-exit_code}"
    return f"rank {number}: exit code {exit_code}"
