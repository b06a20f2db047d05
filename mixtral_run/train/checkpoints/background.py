"""A task that every rank of a job runs in a thread, and that ends on all of them together."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixtral_run.errors import TrainingError
from mixtral_run.launch.heartbeat import HANG_SHARE, unnoted
from mixtral_run.model.parallel.mesh import Mesh

WAIT_SECONDS = 0.05
"""Time between two questions whether all ranks are done, while nothing else is to do."""
SECONDS_AFTER_ERROR = 30.0
"""Least time that a save gets to end after the training has failed, and all of it where other ranks may have ended."""

_RUNNING, _OVER, _LATE = 1.0, 2.0, 0.0


class BackgroundTask:
    """A rank's thread that writes a checkpoint. The thread only uses process groups that nothing else uses.

    The main threads agree by reductions over the group of the training: an error is raised on all ranks in the same
    iteration.
    """

    def __init__(self, task: Callable[[], None], mesh: Mesh, what: Path, timeout_minutes: float) -> None:
        self._mesh, self._what = mesh, what
        # A task that takes longer than a process may wait for others has met a disk that does not answer.
        self._limit = HANG_SHARE * 60 * timeout_minutes
        self._error: BaseException | None = None
        self._began = self._ended = time.monotonic()
        # A daemon: a disk that never answers must not keep the process.
        self._thread = threading.Thread(target=self._run, args=(task,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, task: Callable[[], None]) -> None:
        try:
            with unnoted():
                task()
        except BaseException as error:
            self._error = error
        self._ended = time.monotonic()

    def is_over(self) -> bool:
        """Return True on all ranks once the task has ended on each. All ranks must call.

        Raises TrainingError on all ranks if the task takes longer than a process may wait for others.
        """
        running = self._thread.is_alive()
        late = running and time.monotonic() - self._began > self._limit
        state = torch.tensor(_LATE if late else _RUNNING if running else _OVER)
        if self._mesh.world_size > 1:
            # A CPU tensor goes over gloo, so that the answer does not wait for the kernels in the GPU's queue.
            dist.all_reduce(state, op=dist.ReduceOp.MIN)
        if float(state) == _LATE:
            found: list[Any] = [None] * self._mesh.world_size
            dist.all_gather_object(found, running)
            raise TrainingError(
                f"The checkpoint {self._what.name} is not on the disk after {self._limit:,.0f} s.",
                where=str(self._what.parent),
                expected="a disk that takes it within this time, which --distributed-timeout-minutes and the size of "
                "the checkpoint set",
                found="still writing: " + ", ".join(f"rank {rank}" for rank, each in enumerate(found) if each),
                next_command=f"df -h {shlex.quote(str(self._what.parent))}, then the same command with --resume",
            )
        return float(state) == _OVER

    def wait(self) -> None:
        """Return when the task has ended on all ranks. All ranks must call. Raises as `is_over` does."""
        # Asking keeps the heartbeat of a rank that waits for a slow disk of another one.
        while not self.is_over():
            self._thread.join(WAIT_SECONDS)

    @property
    def is_running(self) -> bool:
        """Return True while this rank's thread runs. Rank-local."""
        return self._thread.is_alive()

    def join_after_error(self, *, all_ranks_live: bool) -> None:
        """Wait for this rank's thread after an error of the training, and ignore its own error. Rank-local.

        all_ranks_live: the threads of the other ranks write on, so that the task gets the time that it would have had
        without the error.
        """
        left = self._began + self._limit - time.monotonic() if all_ranks_live else 0.0
        self._thread.join(max(SECONDS_AFTER_ERROR, left))

    def result(self) -> float:
        """Return the seconds that the task took on this rank, or raise its error. Call after `is_over` is True."""
        if self._error is not None:
            raise self._error
        return self._ended - self._began
