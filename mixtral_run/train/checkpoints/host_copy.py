"""Copy in host memory of what a checkpoint holds, so that training changes the originals while it is written.

On a GPU the copy runs on a stream of its own, while the next step computes its gradients: until the optimizer changes
the originals nothing has to wait. The thread that writes the checkpoint launches it, since launching hundreds of copies
takes milliseconds, too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.megatron import is_main_replica
from mixtral_run.planner.memory_model import USABLE_OF_HOST
from mixtral_run.run_lock import boot_id
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.adapter_shards import MOMENTS, ParameterState, live_states, shards_of
from mixtral_run.weights.io.disk import available_bytes

_ALIGNMENT = 64


class HookedOptimizer(Protocol):
    """An optimizer that calls functions before each of its steps, as torch's do."""

    def register_step_pre_hook(self, hook: Callable[..., None], /) -> Any:
        """Call `hook` before each step changes anything."""


class HostCopy(ABC):
    """Buffers for what this rank writes. They are reused by every save.

    Attributes:
        num_bytes: of all buffers; known before `allocate`.
        states: the state of each parameter, in the buffers; after `allocate`.

    `allocate` takes the memory, `attach` makes the copy ready for use. Between them the ranks agree that all have it.
    """

    def __init__(self, device: torch.device, optimizer: HookedOptimizer, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.states: list[ParameterState] = []
        self._device, self._hooked = device, optimizer
        self._ready: torch.cuda.Event | None = None
        self._buffers: list[Tensor] = []

    def attach(self) -> None:
        """Pin the memory. From now on the optimizer waits for a copy that has begun before it changes anything."""
        if self._device.type == "cuda":
            for each in self._buffers:
                pin(each)
            self._stream = torch.cuda.Stream(self._device)
            self._copied = torch.cuda.Event()
            self._launched = threading.Event()
            self._launched.set()
            self._hooked.register_step_pre_hook(lambda *_: self._hold_optimizer())

    @abstractmethod
    def allocate(self) -> None:
        """Take the memory, and fill `states`. Raises MemoryError or RuntimeError if the system has not enough."""

    def _buffer(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return zeros in host memory, which `attach` pins.

        The zeros are written: the system gives memory only then, and a step would wait for it.
        """
        self._buffers.append(torch.zeros(shape, dtype=dtype))
        return self._buffers[-1]

    @abstractmethod
    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each original with its buffer."""

    def begin(self) -> None:
        """Begin a copy of the state as it is now, which `finish` completes. The optimizer must have taken a step.

        On a CPU the state is copied here.
        """
        if self._device.type != "cuda":
            for original, buffer in self._pairs():
                buffer.copy_(original)
            return
        self._ready = torch.cuda.current_stream(self._device).record_event()
        self._launched.clear()

    def finish(self) -> None:
        """Return when the state of the last `begin` is in the buffers. May be called in another thread."""
        if self._ready is None:
            return
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._stream.wait_event(self._ready)
                self._copy(self._ready)
                self._copied.record(self._stream)
        finally:
            # After an error as well: the optimizer must not wait for ever.
            self._ready = None
            self._launched.set()
        self._copied.synchronize()

    def _hold_optimizer(self) -> None:
        """Let the optimizer's next kernels wait until the originals are copied. Called before each of its steps."""
        self._launched.wait()
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def _copy(self, ready: torch.cuda.Event) -> None:
        """Launch the copies from the GPU, and copy what is in host memory. ready: the originals are complete."""
        pairs = list(self._pairs())
        for original, buffer in pairs:
            if original.is_cuda:
                buffer.copy_(original, non_blocking=True)
        in_host_memory = [each for each in pairs if not each[0].is_cuda]
        if in_host_memory:
            # The update brings these back from the GPU on its own stream.
            ready.synchronize()
        for original, buffer in in_host_memory:
            buffer.copy_(original)


class AdapterCopy(HostCopy):
    """Buffers for the adapters and AdamW's moments, as far as this rank writes them."""

    def __init__(self, model: MixtralModel, optimizer: torch.optim.Optimizer) -> None:
        written = [each for each in shards_of(model, adapters=True).values() if is_main_replica(each.replica_id)]
        self._live = [each for each in live_states(model, optimizer) if _holds_any(each, written)]
        self._sizes = [-(-each.parameter.nbytes // _ALIGNMENT) * _ALIGNMENT for each in self._live]
        # A frozen parameter has no moments.
        self._counts = [1 + len(MOMENTS) * each.parameter.requires_grad for each in self._live]
        self._optimizer = optimizer
        num_bytes = sum(size * count for size, count in zip(self._sizes, self._counts, strict=True))
        super().__init__(model.mesh.device, optimizer, num_bytes)

    def allocate(self) -> None:
        """Take the memory in one block, and fill `states`."""
        memory = self._buffer(torch.Size([self.num_bytes]), torch.uint8)
        at = 0
        for state, size, count in zip(self._live, self._sizes, self._counts, strict=True):
            buffers = [_like(state.parameter, memory[at + n * size : at + (n + 1) * size]) for n in range(count)]
            at += count * size
            # Without moments the second iterator ends at once.
            moments = dict(zip(MOMENTS, buffers[1:], strict=False))
            self.states.append(replace(state, value=buffers[0], moments=moments))

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for state in self.states:
            yield state.parameter.detach(), state.value
            for name, buffer in state.moments.items():
                yield self._optimizer.state[state.parameter][name], buffer


def fits_on_hosts(num_bytes: int) -> bool:
    """Return True if each host has free memory for the copies of its ranks. All ranks must call.

    num_bytes: of this rank's copy. A part of the memory stays free for the processes themselves.
    """
    # Two hosts may have one name, and two containers of a host have names of their own.
    own = (f"{os.uname().nodename} {boot_id()}", num_bytes, available_bytes())
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    needed: dict[str, int] = {}
    free: dict[str, int] = {}
    for host, wanted, available in found:
        needed[host] = needed.get(host, 0) + wanted
        free[host] = min(free.get(host, available), available)
    # 0: a host that does not say what is free.
    return all(not free[host] or needed[host] <= USABLE_OF_HOST * free[host] for host in needed)


def _holds_any(state: ParameterState, shards: Sequence[Any]) -> bool:
    """Return True if one of the shards is a part of the parameter."""
    start, end = state.parameter.data_ptr(), state.parameter.data_ptr() + state.parameter.nbytes
    return any(start <= each.data.data_ptr() < end for each in shards)


def _like(parameter: Tensor, memory: Tensor) -> Tensor:
    """Return a tensor with the shape, the strides and the dtype of a parameter in `memory`."""
    flat = memory.view(parameter.dtype)
    return flat.as_strided(parameter.shape, parameter.stride())


def pin(memory: Tensor) -> None:
    """Pin memory in its exact size; torch's allocator would round it up to a power of two.

    Memory that cannot be pinned works as well, with a slower copy; the first time is reported.
    """
    if not memory.numel():
        return
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if code != 0:
        _clear_cuda_error()
        _warn_unpinned(code)


def _clear_cuda_error() -> None:
    """Take back the error that the CUDA runtime keeps of this thread's last call.

    The next launch of a kernel would raise it as its own. torch's check after a launch both raises and clears it.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


@functools.cache
def _warn_unpinned(code: int) -> None:
    """Report once in this process that memory could not be pinned. code: of the CUDA runtime's error."""
    Report.on_stderr().warn(
        f"Rank {os.environ.get('RANK', '0')} cannot pin host memory (CUDA error {code}): its copies between host and "
        "GPU are slower. The memory limit of the container and ulimit -l say how much may be pinned"
    )
