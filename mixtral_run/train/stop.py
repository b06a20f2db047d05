"""A polite stop: SIGTERM or Ctrl-C ends a run after the iteration under way, once its checkpoint is written."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from mixtral_run.model.parallel import Processes


class StopRequest:
    """Whether a stop was asked for, on any rank."""

    def __init__(self, here: Processes) -> None:
        self._here = here
        self._asked = False

    def ask(self, signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        self._asked = True

    def agreed(self) -> bool:
        """True on all ranks once any was asked. All ranks must call: a signal reaches them at different iterations."""
        asked = torch.tensor(float(self._asked))
        if self._here.world_size > 1:
            # Over gloo, on the host: the flag must not wait for the GPU's queue.
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


@contextmanager
def stop_requests(here: Processes) -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request while the block runs."""
    request = StopRequest(here)
    kept = {number: signal.signal(number, request.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
