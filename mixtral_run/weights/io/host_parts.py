"""Tensors on their way to a file: in parts on the host, copied from a GPU through pinned memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PART_BYTES = 4 * 2**20
"""Most bytes that each thread has copied from a GPU and not yet written."""


class ToHost:
    """Copies of parts from a GPU, through pinned memory that all parts of a run share: each is gone with the next one.

    Other memory would be new for each part, and the driver would copy it piece by piece, one thread after another.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def copy(self, part: Tensor) -> Tensor:
        """Return a contiguous part of at most PART_BYTES on the host: itself, or a copy."""
        if not part.is_cuda:
            return part.cpu()
        if self._memory is None:
            # A thread begins on the first GPU; pinning there would open a context on it for every process.
            torch.cuda.set_device(part.device)
            self._stream = torch.cuda.Stream(part.device)
            try:
                self._memory = torch.empty(PART_BYTES, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # a limit of memory that may be pinned
                self._memory = torch.empty(PART_BYTES, dtype=torch.uint8)
        assert self._stream is not None
        copied = self._memory[: part.nbytes].view(part.dtype)
        with torch.cuda.stream(self._stream):
            copied.copy_(part, non_blocking=True)
        self._stream.synchronize()
        return copied


def host_parts(tensor: Tensor, to_host: ToHost) -> Iterator[Tensor]:
    """Yield the elements in their order, as flat tensors on the host. Each copy has at most PART_BYTES."""
    if tensor.is_contiguous():
        for part in tensor.view(-1).split(PART_BYTES // tensor.itemsize):
            yield to_host.copy(part)
    elif tensor.nbytes <= PART_BYTES:
        yield tensor.cpu().contiguous().view(-1)
    else:
        rows = max(1, PART_BYTES * len(tensor) // tensor.nbytes)
        for part in tensor.split(rows):
            yield from host_parts(part if rows > 1 else part[0], to_host)
