"""Experts spread over processes without the host: nothing of the exchange depends on what the router decides.

Sending each row to its expert's process means asking first how many come: the host waits for the GPU in every layer,
and nothing can be recorded. Here every process of an expert group gets all tokens of the group with their experts and
weights, computes the part of those experts that it holds, and the parts are summed where the tokens came from:

    tokens [t, h] → all-gather [p·t, h] → this process's experts, weighted and added → reduce-scatter [t, h]

For p = 2 that is as much on the wire as rows sent alone, for more processes more: it is for few tokens, where launching
takes longer than computing. GPUs that read each other's memory take the rows they need from there
(symmetric_memory.py), with the
same room. What is sized by the number of rows here, which only the GPU knows, has room for as many as
capacity.py says, and kernels go no further than the last of `ends`. Where that is not all that may come, what did
not find room is counted in `Room.missing`, and the pass is worth nothing: train/step.py takes it again, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.dispatch import capacity
from mixtral_run.model.parallel.megatron import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from mixtral_run.model.parallel.mesh import Mesh

if TYPE_CHECKING:
    from mixtral_run.model.dispatch.symmetric_memory import Peers


@dataclass(frozen=True)
class Room:
    """missing: int64 scalar on the device, the most rows that did not find room in a layer since it was set to zero.

    unlimited: there is room for all rows that could come, as where they are few and nearly the same in all processes.
    peers: where given, rows are read through it instead of gathering tokens.
    """

    missing: Tensor
    unlimited: bool = False
    peers: Peers | None = None

    @staticmethod
    def on(device: torch.device, *, unlimited: bool = False, peers: Peers | None = None) -> Room:
        return Room(torch.zeros((), dtype=torch.int64, device=device), unlimited, peers)

    def num_rows(self, choices: int, size: int) -> int:
        """For how many rows a process of an expert group of `size` has room; choices: of all tokens of the group."""
        return choices if self.unlimited else capacity.rows_with_room(choices, size)

    def bound(self, ends: Tensor, num_rows: int) -> Tensor:
        """ends as far as so many rows have room, int32; what does not find it is counted."""
        self.missing.copy_(torch.maximum(self.missing, ends[-1] - num_rows))
        return ends.clamp(max=num_rows).int()

    def sufficed(self, mesh: Mesh) -> bool:
        """Whether all rows have had room in all processes since this was last asked. All ranks must call."""
        if not capacity.may_run_out(mesh.expert_size):
            return True
        dist.all_reduce(self.missing, dist.ReduceOp.MAX)
        most = int(self.missing)
        self.missing.zero_()
        return most == 0


@dataclass(frozen=True)
class Gathered:
    """All tokens of a group: [p·t, h], and of each its experts int64 and their weights fp32, both [p·t, topk]."""

    tokens: Tensor
    weights: Tensor
    experts: Tensor


def gather(tokens: Tensor, weights: Tensor, experts: Tensor, group: dist.ProcessGroup) -> Gathered:
    """From every process's own. The same number of tokens on all, which must call. Gradients go back to where they
    belong."""
    topk = weights.shape[1]
    # As one message: the numbers of experts are exact.
    both = gather_from_sequence_parallel_region(torch.cat((weights, experts.to(weights.dtype)), dim=1), group=group)
    everyones = gather_from_sequence_parallel_region(tokens, group=group)
    return Gathered(everyones, both[:, :topk], both[:, topk:].detach().long())


def sum_where_they_belong(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """parts [p·t, h] of each process → the sum for its own tokens [t, h]. All must call."""
    own: Tensor = reduce_scatter_to_sequence_parallel_region(parts, group=group)
    return own
