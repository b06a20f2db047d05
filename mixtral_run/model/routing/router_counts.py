"""Tokens by layer and expert, counted on the device: nothing waits for it, and CUDA graphs can contain the counting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.parallel.context import ContextPart
from mixtral_run.model.parallel.mesh import Mesh


class RouterCounts:
    """Counts of the experts that the routers of a model choose. All ranks must construct one.

    Only passes within `counting` count, and of them only the tokens up to the last one of a row whose loss counts: what
    follows it is padding. Recomputation in the backward pass counts nothing.

    Attributes:
        step: int64 [layers, experts], of this rank's passes since `begin_step`.
        total: the same of the steps that `end_step` added, since `take`.

    Args:
        routers: of all layers, which return (probabilities, experts int64 [tokens, topk], tokens).
        num_experts: of a layer.
        mesh: of the model.
        sequence_parallel: True if each tensor-parallel rank routes its own part of the sequence.
    """

    def __init__(
        self, routers: Sequence[torch.nn.Module], num_experts: int, mesh: Mesh, *, sequence_parallel: bool
    ) -> None:
        self._mesh, self._is_split = mesh, sequence_parallel and mesh.tensor_size > 1
        self._part = ContextPart(mesh.context_rank, mesh.context_size)
        self._experts = torch.arange(num_experts, device=mesh.device)
        self.step = torch.zeros(len(routers), num_experts, dtype=torch.int64, device=mesh.device)
        self.total = torch.zeros_like(self.step)
        self._chosen: list[Tensor] = []
        self._listens = False
        for router in routers:
            router.register_forward_hook(self._note)

    def begin_step(self) -> None:
        """Forget the passes since the last step, such as those of a step that is taken again."""
        self.step.zero_()

    def end_step(self) -> None:
        """Add the passes of the step to the total."""
        self.total.add_(self.step)

    def take(self) -> Tensor:
        """Return the total over all ranks, and begin a new one. All ranks must call."""
        taken = self._over_ranks(self.total)
        self.total.zero_()
        return taken

    def take_step(self) -> Tensor:
        """Return the passes since `begin_step` over all ranks, without adding them. All ranks must call."""
        return self._over_ranks(self.step)

    def _over_ranks(self, counts: Tensor) -> Tensor:
        counts = counts.clone()
        if self._mesh.world_size > 1:
            dist.all_reduce(counts)
        return counts

    def _note(self, router: torch.nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        del router, inputs
        if self._listens:
            self._chosen.append(outputs[1])

    @contextmanager
    def counting(self, mask: Tensor) -> Iterator[None]:
        """Count the forward pass within. mask: [batch, sequence] on the device, above 0 where the loss counts."""
        self._chosen, self._listens = [], True
        try:
            yield
        finally:
            chosen, self._chosen, self._listens = self._chosen, [], False
        self._add(torch.stack(chosen), mask)

    def _add(self, chosen: Tensor, mask: Tensor) -> None:
        """Add the experts of a pass, int64 [layers, tokens, topk], for tokens in the order sequence, batch."""
        places = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask > 0, places, -1).amax(dim=1)
        # Of the rows, the part that this rank has routed.
        mine = self._part.places(mask.shape[1], mask.device) if self._part.size > 1 else places
        counts = (mine[:, None] <= last).reshape(-1)
        if self._is_split:
            counts = counts.chunk(self._mesh.tensor_size)[self._mesh.tensor_rank]
        elif self._mesh.tensor_rank != 0:
            counts = torch.zeros_like(counts)  # every rank has routed all tokens
        hits = (chosen[..., None] == self._experts) & counts[:, None, None]
        self.step.add_(hits.sum(dim=(1, 2)))
