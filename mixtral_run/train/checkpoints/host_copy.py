"""Copy in host memory of what a checkpoint holds, so that training changes the originals while it is written.

On a GPU the copy runs on a stream of its own, while the next step computes its gradients: until the optimizer changes
the originals nothing has to wait. The thread that writes the checkpoint launches it, since launching hundreds of copies
takes milliseconds, too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.megatron import is_main_replica
from mixtral_run.train.checkpoints.adapter_shards import MOMENTS, ParameterState, live_states, shards_of

_ALIGNMENT = 64


class HostCopy:
    """Buffers for the adapters and AdamW's moments, as far as this rank writes them. They are reused by every save.

    Attributes:
        states: the state of each parameter, in the buffers.
        num_bytes: of all buffers.
    """

    def __init__(self, model: MixtralModel, optimizer: torch.optim.Optimizer) -> None:
        written = [each for each in shards_of(model, adapters=True).values() if is_main_replica(each.replica_id)]
        live = [each for each in live_states(model, optimizer) if _holds_any(each, written)]
        sizes = [-(-each.parameter.nbytes // _ALIGNMENT) * _ALIGNMENT for each in live]
        # A frozen parameter has no moments.
        counts = [1 + len(MOMENTS) * each.parameter.requires_grad for each in live]
        self.num_bytes = sum(size * count for size, count in zip(sizes, counts, strict=True))
        # The zeros are written: the system gives memory only then, and a step would wait for it.
        self._memory = torch.zeros(self.num_bytes, dtype=torch.uint8)
        if model.mesh.device.type == "cuda":
            pin(self._memory)
        self._device = model.mesh.device
        self._optimizer = optimizer
        self._ready: torch.cuda.Event | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._copied = torch.cuda.Event()
            self._launched = threading.Event()
            self._launched.set()
            optimizer.register_step_pre_hook(lambda *_: self._hold_optimizer())
        self.states: list[ParameterState] = []
        at = 0
        for state, size, count in zip(live, sizes, counts, strict=True):
            buffers = [_like(state.parameter, self._memory[at + n * size : at + (n + 1) * size]) for n in range(count)]
            at += count * size
            # Without moments the second iterator ends at once.
            moments = dict(zip(MOMENTS, buffers[1:], strict=False))
            self.states.append(replace(state, value=buffers[0], moments=moments))

    def begin(self) -> None:
        """Begin a copy of the state as it is now, which `finish` completes. The optimizer must have taken a step.

        On a CPU the state is copied here.
        """
        if self._device.type != "cuda":
            self._copy()
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
                self._copy()
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

    def _copy(self) -> None:
        for state in self.states:
            state.value.copy_(state.parameter.detach(), non_blocking=True)
            for name, buffer in state.moments.items():
                buffer.copy_(self._optimizer.state[state.parameter][name], non_blocking=True)


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

    Memory that cannot be pinned works as well, with a slower copy.
    """
    if memory.numel():
        torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
