"""What layers keep for the backward pass, in the host's memory instead of the GPU's.

Copies run on a stream of their own beside the products: a layer's input leaves while the layer after it runs, and comes
back while that layer runs again. No more than two are on the GPU at a time. `torch.autograd.graph.save_on_cpu`
copies on the stream of the products, which wait for it, and into new memory each time.
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
    """Keeps what autograd saves under `hooks`, for all layers of a model. Rank-local.

    On a CPU it copies as well, so that the same is tested there. Buffers are kept for the next pass: pinning is slow.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spare: list[Tensor] = []
        self._last: weakref.ref[_Kept] | None = None
        # Those of torch.cpu do nothing. A stream would begin to use the GPU: the first copy makes it.
        self._module: Any = torch.cuda if device.type == "cuda" else torch.cpu
        self._copies: Any = None

    @property
    def num_spare(self) -> int:
        """Buffers that wait for the next pass."""
        return len(self._spare)

    def hooks(self) -> saved_tensors_hooks:
        """A context in which the tensors that autograd saves go to the host."""
        return saved_tensors_hooks(self._keep, _Kept.take)

    def _keep(self, tensor: Tensor) -> _Kept:
        before = self._last() if self._last is not None else None
        if before is not None:
            before.leave()
        kept = _Kept(self, tensor.detach().contiguous(), before)
        self._last = weakref.ref(kept)
        return kept

    def copy(self, source: Tensor, into: Tensor) -> Any:
        """Copy beside what the current stream does from here on; returns the event of its end."""
        if self._copies is None:
            self._copies = self._module.Stream(self.device)
        self._copies.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._copies):
            into.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def wait(self, copied: Any) -> None:
        """Let the current stream go on only after that copy."""
        self._module.current_stream(self.device).wait_event(copied)

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory, pinned where there is a GPU. Raises TrainingError where there is none left."""
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
                next_command="a smaller --micro-batch-size or --seq-length; `mixtral-run plan` says what a host needs",
            ) from error

    def take_back(self, buffer: Tensor) -> None:
        # All copies run on one stream: the next one into this buffer comes after what still reads it.
        self._spare.append(buffer)


class _Kept:
    """One tensor: on the host, and on the GPU as long as it leaves and from when it is fetched."""

    def __init__(self, offload: Offload, tensor: Tensor, before: _Kept | None) -> None:
        self._offload = offload
        self._before = weakref.ref(before) if before is not None else None
        self._host = offload.buffer(tensor.shape, tensor.dtype)
        self._on_device: Tensor | None = tensor
        self._copied = offload.copy(tensor, self._host)

    def leave(self) -> None:
        """Free the GPU's memory. By the stream's order and not by when the GPU gets there, however far ahead the host
        runs: the allocator gives the memory to the next that asks."""
        if self._on_device is not None:
            self._offload.wait(self._copied)
            self._on_device = None

    def fetch(self) -> Tensor:
        """Begin to bring it back."""
        if self._on_device is None:
            self._on_device = torch.empty_like(self._host, device=self._offload.device, pin_memory=False)
            self._copied = self._offload.copy(self._host, self._on_device)
        return self._on_device

    def take(self) -> Tensor:
        """The tensor on the GPU; the one that is needed next is on its way from here on."""
        tensor = self.fetch()
        self.leave()
        before = self._before() if self._before is not None else None
        if before is not None:
            before.fetch()
        return tensor

    def __del__(self) -> None:
        # Where the buffer could not be had there is nothing to give back.
        if hasattr(self, "_copied"):
            self.leave()
            self._offload.take_back(self._host)
