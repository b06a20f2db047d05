"""Offloading of saved tensors: what layers save for the backward pass is moved to host memory.

Copies run on their own stream, concurrently with the computation: a layer's input is copied to the host while the next
layer runs, and back while that layer is recomputed. At most two inputs are on the GPU at a time.
`torch.autograd.graph.save_on_cpu` copies on the stream of the computation, which waits for it, and allocates new memory
each time.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mixtral_run.errors import TrainingError


class Offload:
    """Host memory for the tensors that autograd saves under `hooks`, for all layers of a model. Rank-local.

    On a CPU it copies as well, so that tests cover the same code. Buffers are reused by the next pass: pinning is slow.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spare: list[Tensor] = []
        self._last: weakref.ref[_Offloaded] | None = None
        # The streams of torch.cpu do nothing. The stream is created by the first copy, as creating one initializes the
        # GPU.
        self._module: Any = torch.cuda if device.type == "cuda" else torch.cpu
        self._copies: Any = None

    @property
    def num_spare(self) -> int:
        """Number of buffers that are free for the next pass."""
        return len(self._spare)

    def hooks(self) -> saved_tensors_hooks:
        """Return a context in which the tensors that autograd saves are offloaded."""
        return saved_tensors_hooks(self._keep, _Offloaded.take)

    def _keep(self, tensor: Tensor) -> _Offloaded:
        before = self._last() if self._last is not None else None
        if before is not None:
            before.leave()
        saved = _Offloaded(self, tensor.detach().contiguous(), before)
        self._last = weakref.ref(saved)
        return saved

    def copy(self, source: Tensor, into: Tensor) -> Any:
        """Start a copy on the copy stream after the current stream's work so far; return the event of its end."""
        if self._copies is None:
            self._copies = self._module.Stream(self.device)
        self._copies.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._copies):
            into.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def wait(self, copied: Any) -> None:
        """Make the current stream wait for a copy."""
        self._module.current_stream(self.device).wait_event(copied)

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return host memory, pinned if there is a GPU. Raises TrainingError if the host has none left."""
        while self._spare:
            spare = self._spare.pop()
            if (*spare.shape, spare.dtype) == (*shape, dtype):
                return spare
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        except RuntimeError as error:
            raise TrainingError(
                "The host's memory does not hold the layers' inputs (--recompute offload).",
                found=str(error).splitlines()[0],
                next_command="a smaller --micro-batch-size or --seq-length; "
                "`mixtral-run plan` reports what a host needs",
            ) from error

    def take_back(self, buffer: Tensor) -> None:
        """Make a buffer free for reuse."""
        # All copies run on one stream: the next copy into this buffer runs after those that still read it.
        self._spare.append(buffer)


class _Offloaded:
    """One offloaded tensor: on the host, and on the GPU until it is copied and again from when it is fetched."""

    def __init__(self, offload: Offload, tensor: Tensor, before: _Offloaded | None) -> None:
        self._offload = offload
        self._before = weakref.ref(before) if before is not None else None
        self._host = offload.buffer(tensor.shape, tensor.dtype)
        self._on_device: Tensor | None = tensor
        self._copied = offload.copy(tensor, self._host)

    def leave(self) -> None:
        """Free the GPU's memory once the copy is done, in the order of the stream.

        The host does not wait: it may run far ahead, and the allocator hands the memory to the next allocation.
        """
        if self._on_device is not None:
            self._offload.wait(self._copied)
            self._on_device = None

    def fetch(self) -> Tensor:
        """Start the copy back to the GPU; return the tensor."""
        if self._on_device is None:
            self._on_device = torch.empty_like(self._host, device=self._offload.device, pin_memory=False)
            self._copied = self._offload.copy(self._host, self._on_device)
        return self._on_device

    def take(self) -> Tensor:
        """Return the tensor on the GPU, and start to fetch the tensor that is needed next."""
        tensor = self.fetch()
        self.leave()
        before = self._before() if self._before is not None else None
        if before is not None:
            before.fetch()
        return tensor

    def __del__(self) -> None:
        # If no buffer could be allocated there is nothing to free.
        if hasattr(self, "_copied"):
            self.leave()
            self._offload.take_back(self._host)
