"""Token dispatch by all-to-all: each permuted token is sent to the process that has its expert.

The processes exchange first how many tokens each sends, and the host waits for these counts. The exchange has no limit
of capacity, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.dispatch.base import ExpertInputs, TokenDispatcher
from mixtral_run.model.dispatch.permute import Permutation, permute, regroup, sort_by_expert, unpermute
from mixtral_run.model.parallel.megatron import all_to_all
from mixtral_run.model.recompute.recipe import Recipe


@dataclass(frozen=True)
class AllToAllTrip:
    """Arguments of `unpermute`, and the way back of the received tokens.

    sent, received: tokens sent to and received from each process. blocks: sizes of the received blocks by local expert
    and sender; by_sender: the order of these blocks in which they are sent back.
    """

    probs: Tensor
    order: Tensor
    inverse: Tensor
    sent: Sequence[int]
    received: Sequence[int]
    blocks: Sequence[int]
    by_sender: Sequence[int]


class AllToAllDispatcher(TokenDispatcher[AllToAllTrip]):
    """Exchange of permuted tokens with all-to-all collectives of exact sizes. Waits for the GPU once a layer."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self._group = group
        self._num_experts = num_experts

    def dispatch(
        self, tokens: Tensor, probs: Tensor, experts: Tensor, *, recipe: Recipe | None, indexed: bool
    ) -> tuple[ExpertInputs, AllToAllTrip]:
        topk = experts.shape[1]
        order, inverse, offsets, source = sort_by_expert(experts.flatten(), self._num_experts, topk)
        rows = permute(tokens, source, inverse, topk)
        size = self._group.size()
        counts = torch.diff(offsets, prepend=torch.zeros_like(offsets[:1]))
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts, group=self._group)
        # [sender or receiver, local expert]; one copy to the host for both.
        sent, received = torch.stack((counts, incoming)).view(2, size, -1).tolist()
        send_sizes, receive_sizes = [sum(each) for each in sent], [sum(each) for each in received]
        arrived = all_to_all(self._group, rows, receive_sizes, send_sizes)
        blocks, local = [count for each in received for count in each], len(received[0])
        # Blocks arrive by sender and expert; the experts take them by expert and sender.
        by_expert = [sender * local + expert for expert in range(local) for sender in range(size)]
        by_sender = [expert * size + sender for sender in range(size) for expert in range(local)]
        arrived = regroup(arrived, blocks, by_expert)
        permutation = Permutation(incoming.view(size, -1).sum(0).cumsum(0).int())
        # Without an index the received tokens are kept: recomputing them would take another exchange.
        recipe = Recipe.saved(arrived) if recipe is not None and not indexed else None
        trip = AllToAllTrip(
            probs, order, inverse, send_sizes, receive_sizes, [blocks[block] for block in by_expert], by_sender
        )
        return ExpertInputs(arrived, permutation, recipe), trip

    def combine(self, outputs: Tensor, trip: AllToAllTrip, residual: Tensor | None = None) -> Tensor:
        outputs = regroup(outputs, trip.blocks, trip.by_sender)
        returned: Tensor = all_to_all(self._group, outputs, trip.sent, trip.received)
        return unpermute(returned, trip.probs, trip.order, trip.inverse, residual=residual)
