"""Heartbeat of a job's process: a small file that the launcher reads, with the last step and the last collective.

A thread counts the beats, which shows that the process runs; the process itself notes steps and collectives, which
shows that it gets on. The file is mapped into memory, so a note costs about a microsecond.
"""

from __future__ import annotations

import enum
import faulthandler
import functools
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAT_SECONDS = 0.5
DIRECTORY_VARIABLE = "MIXTRAL_RUN_HEARTBEATS"
"""Environment variable of a process that a launcher watches: the folder for its heartbeat."""
STACK_SIGNAL = signal.SIGUSR2
"""Signal at which a process writes its stack into the folder."""

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "new_group", "recv", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "_all_gather_base",
    "_reduce_scatter_base", "init_process_group", "all_gather_single", "reduce_scatter_single",
)  # fmt: skip
"""Functions of torch.distributed in which a process waits for others."""

HANG_SHARE = 0.9
"""Share of --distributed-timeout-minutes after which a waiting process shows that another one hangs: torch's own
timeout would end the waiting process without the name of the other one."""

_FORMAT = struct.Struct("<qdqqqqq40s")


class State(enum.IntEnum):
    """What a process does, as far as the launcher has to know."""

    WORKING = 0
    IN_COLLECTIVE = 1
    ON_GPU = 2
    """It works, or waits for a GPU: collectives of GPUs block where the results are read."""


@dataclass(frozen=True)
class Beat:
    """Content of a heartbeat.

    limit: seconds that the process may wait in a collective. events: notes so far. step: 0 before the first one.
    collective: name of the last one.
    """

    pid: int
    limit: float
    beats: int
    events: int
    step: int
    num_collectives: int
    state: State
    collective: str


def read_beat(file: Path) -> Beat | None:
    """Return the content of a process's file; None if the process has not written it yet."""
    try:
        pid, limit, beats, events, step, num_collectives, state, name = _FORMAT.unpack_from(file.read_bytes())
        collective = name.rstrip(b"\0").decode()
        return Beat(pid, limit, beats, events, step, num_collectives, State(state), collective) if pid else None
    except (OSError, struct.error, ValueError):
        return None


class Heartbeat:
    """The heartbeat of this process. Methods may be called from several threads."""

    def __init__(self, file: Path, limit: float) -> None:
        file.write_bytes(bytes(_FORMAT.size))
        with file.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), _FORMAT.size)
        self._lock = threading.Lock()
        self._limit = limit
        self._beats = self._events = self._step = self._num_collectives = self._depth = 0
        self._resting = self._state = State.WORKING
        self._name = b""
        self._write()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            with self._lock:
                self._beats += 1
                self._write()

    def _write(self) -> None:
        numbers = (os.getpid(), self._limit, self._beats, self._events, self._step, self._num_collectives, self._state)
        _FORMAT.pack_into(self._map, 0, *numbers, self._name)

    def note_step(self, step: int, *, on_gpu: bool) -> None:
        """Note that a step begins. on_gpu: its collectives do not block where they are called."""
        with self._lock:
            self._events += 1
            self._step = step
            self._resting = State.ON_GPU if on_gpu else State.WORKING
            if self._depth == 0:
                self._state = self._resting
            self._write()

    def note_progress(self) -> None:
        """Note that the process has done a part of its step."""
        with self._lock:
            self._events += 1
            self._write()

    def enter(self, name: str) -> None:
        """Note that a collective begins."""
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._events += 1
                self._num_collectives += 1
                self._name = name.encode()[:40]
                self._state = State.IN_COLLECTIVE
                self._write()

    def leave(self, *, finished: bool) -> None:
        """Note that a collective's call has returned. finished: False if the process will wait for it later."""
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._events += 1
                self._state = self._resting if finished else State.IN_COLLECTIVE
                self._write()


_own: Heartbeat | None = None


def start_heartbeat(folder: Path, rank: int, timeout_minutes: float) -> None:
    """Start the heartbeat of this process, note its collectives, and write its stack at STACK_SIGNAL."""
    global _own
    # The descriptor stays open as long as the process lives. The launcher sends no signal before it sees a heartbeat.
    stack = os.open(folder / f"rank-{rank}.stack", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    faulthandler.register(STACK_SIGNAL, file=stack, all_threads=True, chain=False)
    _own = Heartbeat(folder / f"rank-{rank}.heartbeat", HANG_SHARE * 60 * timeout_minutes)
    _note_collectives(_own)


def note_step(step: int, *, on_gpu: bool) -> None:
    """Note in this process's heartbeat that a step begins. Do nothing in a process without one."""
    if _own is not None:
        _own.note_step(step, on_gpu=on_gpu)


def note_progress() -> None:
    """Note in this process's heartbeat that a part of a step is done. Do nothing in a process without one."""
    if _own is not None:
        _own.note_progress()


class _Thread(threading.local):
    """What a thread does. is_unnoted: its collectives are not those of the training."""

    is_unnoted = False


_thread = _Thread()


@contextmanager
def unnoted() -> Iterator[None]:
    """Leave the collectives of this thread out of the heartbeat while the block runs.

    A thread beside the training has a process group of its own: that it waits there does not show that a rank hangs.
    """
    _thread.is_unnoted = True
    try:
        yield
    finally:
        _thread.is_unnoted = False


def _note_collectives(heartbeat: Heartbeat) -> None:
    """Replace the collectives of torch.distributed by functions that note each call."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    for name in COLLECTIVES:
        if not hasattr(distributed_c10d, name):
            # torch before 2.13 does not have all of them.
            continue
        noted = _noted(name, getattr(distributed_c10d, name), heartbeat)
        for module in (distributed_c10d, dist):
            if hasattr(module, name):
                setattr(module, name, noted)


def _noted(name: str, call: Callable[..., Any], heartbeat: Heartbeat) -> Callable[..., Any]:
    @functools.wraps(call)
    def noted(*arguments: Any, **named: Any) -> Any:
        if _thread.is_unnoted:
            return call(*arguments, **named)
        heartbeat.enter(name)
        try:
            return call(*arguments, **named)
        finally:
            heartbeat.leave(finished=not named.get("async_op", False))

    return noted
