"""The capacity of a process for permuted tokens where only the GPU knows how many there are."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.dispatch import capacity
from mixtral_run.model.parallel.mesh import Mesh


class RowCapacity:
    """Number of rows to allocate, and a counter of the rows beyond it. One object serves all layers.

    overflow: int64 scalar on the device, the largest number of rows of a layer that exceeded the capacity since the
    counter was reset. unlimited: allocate for all rows that could come, as where tokens are few and nearly the same in
    all processes.
    """

    def __init__(self, device: torch.device, *, unlimited: bool = False) -> None:
        self.overflow = torch.zeros((), dtype=torch.int64, device=device)
        self._unlimited = unlimited

    def num_rows(self, choices: int, size: int) -> int:
        """Return the rows that a process of an expert group of `size` allocates. choices: of all tokens of the
        group.
        """
        return choices if self._unlimited else capacity.rows_with_room(choices, size)

    def bound(self, offsets: Tensor, num_rows: int) -> Tensor:
        """Return offsets limited to num_rows, int32, and count the rows beyond. Never waits for the GPU."""
        self.overflow.copy_(torch.maximum(self.overflow, offsets[-1] - num_rows))
        return offsets.clamp(max=num_rows).int()

    def exceeded(self, mesh: Mesh) -> bool:
        """Return True if rows exceeded the capacity of any process since the last call. All ranks must call."""
        if not capacity.may_run_out(mesh.expert_size):
            return False
        dist.all_reduce(self.overflow, dist.ReduceOp.MAX)
        most = int(self.overflow)
        self.overflow.zero_()
        return most != 0
