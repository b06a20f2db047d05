"""A polite stop: SIGTERM, Ctrl-C or a lost terminal ends a run after the iteration under way, with its checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from mixtral_run.model.parallel.mesh import Mesh

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Whether a stop was asked for, on any rank."""

    ended_a_run = False
    """Whether one was, as far as this process knows, in any run of it."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._asked = False

    def ask(self, signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        self._asked = StopRequest.ended_a_run = True

    def agreed(self) -> bool:
        """True on all ranks once any was asked. All ranks must call: a signal reaches them at different iterations."""
        asked = torch.tensor(float(self._asked))
        if self._mesh.world_size > 1:
            # Over gloo, on the host: the flag must not wait for the GPU's queue.
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        StopRequest.ended_a_run |= bool(asked)
        return bool(asked)


@contextmanager
def stop_requests(mesh: Mesh) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT and SIGHUP into a request while the block runs."""
    request = StopRequest(mesh)
    kept = {number: signal.signal(number, request.ask) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
