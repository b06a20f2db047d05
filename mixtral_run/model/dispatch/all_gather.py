"""Token dispatch by all-gather: no size of the exchange depends on the router's decisions.

An all-to-all of permuted tokens has to exchange their counts first: the host waits for the GPU in every layer, and the
pass cannot be captured in a CUDA graph. Here every process of an expert group receives all tokens of the group with
their experts and probabilities, computes the part of its own experts, and the parts are summed where the tokens came
from:

    tokens [t, h] → all-gather [p·t, h] → experts of this process, weighted and summed → reduce-scatter [t, h]

For p = 2 the traffic equals that of an all-to-all; for more processes it is larger. The exchange suits few tokens,
where kernel launches take longer than the computation. GPUs that can read each other's memory read only the rows that
they need (symmetric_memory.py), with the same capacity. Tensors whose number of rows only the GPU knows are allocated
for the capacity (capacity.py), and kernels stop at the last of `offsets`. If more rows come than the capacity, they are
counted (overflow.py) and the pass is invalid: train/steps/step.py takes the step again by all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.dispatch.base import ExpertInputs, TokenDispatcher, added
from mixtral_run.model.dispatch.overflow import RowCapacity
from mixtral_run.model.dispatch.permute import Permutation, sort_by_expert, unpermute
from mixtral_run.model.parallel.megatron import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.recompute.recipe import Recipe


@dataclass(frozen=True)
class GatheredTokens:
    """Tokens of all processes of a group: [p·t, h], with their experts int64 and probabilities fp32, both [p·t,
    topk].
    """

    tokens: Tensor
    probs: Tensor
    experts: Tensor


@dataclass(frozen=True)
class AllGatherTrip:
    """Arguments of `unpermute`. probs: fp32 [p·t, topk]; order: int64 [rows]; inverse: int64 [p·t·topk]; end: int32
    [1], the number of rows that exist.
    """

    probs: Tensor
    order: Tensor
    inverse: Tensor
    end: Tensor


class AllGatherDispatcher(TokenDispatcher[AllGatherTrip]):
    """Exchange in a group of several processes by all-gather and reduce-scatter. Can be captured in a CUDA graph.

    With gradients it serves adapted experts only. unlimited: see RowCapacity.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, device: torch.device, *, unlimited: bool = False
    ) -> None:
        self._group = group
        self._num_local = num_experts // group.size()
        self._capacity = RowCapacity(device, unlimited=unlimited)

    def dispatch(
        self, tokens: Tensor, probs: Tensor, experts: Tensor, *, recipe: Recipe | None, indexed: bool
    ) -> tuple[ExpertInputs, AllGatherTrip]:
        del recipe  # the gathered tokens are kept
        topk, count = experts.shape[1], self._num_local
        gathered = gather(tokens, probs, experts, self._group)
        chosen = gathered.experts.flatten() - self._group.rank() * count
        # Choices of other processes' experts come last.
        chosen = torch.where((chosen >= 0) & (chosen < count), chosen, count)
        order, inverse, offsets, source = sort_by_expert(chosen, count + 1, topk)
        num_rows = self._capacity.num_rows(chosen.numel(), self._group.size())
        offsets = self._capacity.bound(offsets[:count], num_rows)
        order, source, end = order[:num_rows], source[:num_rows], offsets[-1:]
        exists = torch.arange(num_rows, device=order.device) < end
        row_probs = gathered.probs.flatten().index_select(0, order).where(exists, 0.0)
        trip = AllGatherTrip(gathered.probs, order, inverse, end)
        if indexed:
            permutation = Permutation(offsets, source, inverse, topk, partial=True)
            return ExpertInputs(gathered.tokens, permutation, None, row_probs), trip
        return ExpertInputs(gathered.tokens.index_select(0, source), Permutation(offsets)), trip

    def combine(self, outputs: Tensor, trip: AllGatherTrip, residual: Tensor | None = None) -> Tensor:
        parts = unpermute(outputs, trip.probs.detach().contiguous(), trip.order, trip.inverse, trip.end)
        return added(residual, sum_to_owners(parts, self._group))

    def overflowed(self, mesh: Mesh) -> bool:
        return self._capacity.exceeded(mesh)


def gather(tokens: Tensor, probs: Tensor, experts: Tensor, group: dist.ProcessGroup) -> GatheredTokens:
    """Gather the tokens of all processes; gradients are summed where the tokens came from.

    All ranks of the group must call, with the same number of tokens.
    """
    topk = probs.shape[1]
    # One message carries both: expert numbers are exact in fp32.
    both = gather_from_sequence_parallel_region(torch.cat((probs, experts.to(probs.dtype)), dim=1), group=group)
    all_tokens = gather_from_sequence_parallel_region(tokens, group=group)
    return GatheredTokens(all_tokens, both[:, :topk], both[:, topk:].detach().long())


def sum_to_owners(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum parts [p·t, h] over the processes and return those of this process's tokens [t, h]. All ranks must call."""
    own: Tensor = reduce_scatter_to_sequence_parallel_region(parts, group=group)
    return own
