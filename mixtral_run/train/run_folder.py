"""The folder that a training run writes to: one run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixtral_run.launch import processes
from mixtral_run.run_lock import one_run


@contextmanager
def own_output(lock: Path | None, verb: str) -> Iterator[None]:
    """Hold the lock of a run's output while the block runs, in the first rank. Do nothing without a lock.

    Raises ConfigError in the first rank if another run holds it.
    """
    if lock is None or processes.rank() != 0:
        yield
        return
    with one_run(lock, f"mixtral-run {verb}", lock.parent):
        yield
