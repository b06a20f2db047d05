"""Graceful stop: after SIGTERM, SIGINT or SIGHUP a run ends its current iteration and saves a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from mixtral_run.launch.worker_errors import ERROR_DIRECTORY_VARIABLE
from mixtral_run.model.parallel.mesh import Mesh

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVING_RESULTS = "Stopping: the part that is complete is written first."
SAVING_CHECKPOINT = "Stopping: the iteration ends, and a checkpoint is saved."
SAVING_NOTHING = "Stopping: the iteration ends first."
"""What a run that is asked to stop does before it ends."""


class StopRequest:
    """A request to stop the run, made on any rank."""

    ended_a_run = False
    """True once any run of this process was asked to stop, as far as this process knows."""

    def __init__(self, mesh: Mesh, stopping: str) -> None:
        self._mesh, self._stopping = mesh, stopping
        self._asked = False

    def ask(self, signal_number: int, frame: FrameType | None) -> None:
        """Handle a signal: request the stop. The first Ctrl-C is answered with what follows, and what another one does.

        Another one ends the job only under the kit's own parent process (StopOnce).
        """
        del frame
        if signal_number == signal.SIGINT and not self._asked and self._mesh.is_first:
            again = " Ctrl-C again ends at once, without it." if ERROR_DIRECTORY_VARIABLE in os.environ else ""
            # Not print: the signal may have interrupted a print to the same stream.
            with contextlib.suppress(OSError):
                os.write(2, f"{self._stopping}{again}\n".encode())
        self._asked = StopRequest.ended_a_run = True

    def agreed(self) -> bool:
        """Return True on all ranks once any rank was asked to stop. All ranks must call.

        A signal reaches the ranks in different iterations, so a rank must not act on it alone.
        """
        asked = torch.tensor(float(self._asked))
        if self._mesh.world_size > 1:
            # A CPU tensor goes over gloo, so that the flag does not wait for the kernels in the GPU's queue.
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        StopRequest.ended_a_run |= bool(asked)
        return bool(asked)


@contextmanager
def stop_requests(mesh: Mesh, stopping: str = SAVING_RESULTS) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT and SIGHUP into a stop request while the context is open.

    stopping: Sentence about what the run does before it ends. "Without it" follows.
    """
    request = StopRequest(mesh, stopping)
    previous = {number: signal.signal(number, request.ask) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
