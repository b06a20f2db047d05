"""Experts' exchanges over memory that the GPUs of one machine read from each other.

Collectives bring every token to every process of an expert group (all_gather.py), of which with four it needs half, and
sending rows alone means asking first how many there are. Here nobody sends: each lays out what it has where the others
can read it, all wait for each other on the GPU, and each reads the rows that it needs from where they are, over NVLink,
sorted by expert as it reads. All know from all choices which row is where (sort_triton.py), so that the way back is
the same: a token's rows are read from the one or two processes that have its experts, weighted and added in fp32.

    offered   tokens [t, h] of this process; weights and experts         read by who has their experts
    answers   rows [rows, h] of this process's experts; fp32 [rows]      read by who has their tokens

What is read next lies in the other of the two, so that a wait before reading is also the end of all reading before it.
Nothing of it waits for the host: the pass is recorded with it. Backward, gradients go the same ways.

Memory: torch's symmetric memory (torch.distributed._symmetric_memory), without multicast.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.model.dispatch import capacity
from mixtral_run.model.parallel.mesh import Mesh, everywhere, refused

if TYPE_CHECKING:
    from mixtral_run.model.kernels.sort_triton import Routes

log = logging.getLogger(__name__)

BOUNDARY = 256
"""Bytes; what starts there is read in the widest pieces."""


@dataclass(frozen=True)
class Piece:
    """Of memory that everyone reads. own: this process's, flat; pointers, int64 [p] on the device: everyone's."""

    own: Tensor
    pointers: Tensor

    def write(self, values: Tensor) -> None:
        """From its begin on, in its own precision."""
        self.own[: values.numel()].view_as(values).copy_(values)


class Peers:
    """The exchanges of one expert group, for up to `tokens` of each process.

    All of the group must make one, `allocate`, `share` once all have, and then call alike, with as many tokens. `close`
    before it is let go.
    """

    def __init__(
        self, group: dist.ProcessGroup, architecture: MixtralArchitecture, tokens: int, dtype: torch.dtype
    ) -> None:
        self.size, self.rank, self._group = group.size(), group.rank(), group
        self._num_experts = architecture.num_experts
        each = architecture.num_experts // self.size
        self._own = range(self.rank * each, (self.rank + 1) * each)
        hidden, choices = architecture.hidden_size, tokens * architecture.moe_router_topk
        num_rows = capacity.rows_with_room(choices * self.size, self.size)
        self._kinds = (dtype, torch.float32, torch.int32, dtype, torch.float32)
        counts = (tokens * hidden, choices, choices, num_rows * hidden, num_rows)
        self._sizes = [
            -(-count * kind.itemsize // BOUNDARY) * BOUNDARY for count, kind in zip(counts, self._kinds, strict=True)
        ]
        self._last: Piece | None = None

    def allocate(self) -> None:
        """Take the memory that is to be shared. Raises RuntimeError where there is none, ImportError where torch has
        no such thing."""
        # Not asked for, and on machines whose switches are not set up for it an error.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        from torch.distributed import _symmetric_memory as symmetric_memory

        device = torch.device("cuda", torch.cuda.current_device())
        self._memory = symmetric_memory.empty(sum(self._sizes), dtype=torch.uint8, device=device)

    def share(self) -> None:
        """Let the others read it, and find theirs. Raises RuntimeError where the driver does not."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        self._handle: Any = symmetric_memory.rendezvous(self._memory, self._group)
        everyones = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64)
        pieces = []
        for number, (kind, size) in enumerate(zip(self._kinds, self._sizes, strict=True)):
            begin = sum(self._sizes[:number])
            own = self._memory[begin : begin + size].view(kind)
            pieces.append(Piece(own, (everyones + begin).to(self._memory.device)))
        self._tokens, self._weights, self._experts, self._rows, self._shares = pieces

    def begin(self) -> None:
        """Before each pass through the model: whatever the one before read last."""
        self._last = None

    def route(self, tokens: Tensor, weights: Tensor, experts: Tensor, num_rows: int, missing: Tensor) -> Routes:
        """Lay out tokens [t, h], weights fp32 and experts [t, topk], and find out which row is where.

        num_rows, missing: for how many rows there is room, and where it is noted that there was not (gathered.Room).
        """
        from mixtral_run.model.kernels.sort_triton import route

        self._may_write(self._tokens)
        self._weights.write(weights.detach())
        self._experts.write(experts)
        self._tokens.write(tokens.detach())
        self._handle.barrier()
        pointers = (self._weights.pointers, self._experts.pointers)
        rows, topk = experts.shape
        return route(*pointers, (rows, topk), self._num_experts, self._own, num_rows, missing)

    def rows(self, tokens: Tensor, weights: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """What `route` laid out, as the rows of this process's experts [rows, h], as far as `routes.ends` goes, and
        what each counts for, fp32 [rows]. Gradients of both go back to where they belong."""
        found: tuple[Tensor, Tensor] = _Rows.apply(tokens, weights, self, routes)  # type: ignore[no-untyped-call]
        return found

    def sum_where_they_belong(self, rows: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        """rows [rows, h] of each process → for this process's tokens the sum of theirs, times weights fp32 [t, topk],
        which get no gradient: [t, h]."""
        own: Tensor = _SumRows.apply(rows, weights, self, routes)  # type: ignore[no-untyped-call]
        return own

    def close(self) -> None:
        """All of the group must call: nobody reads this process's memory after that."""
        torch.cuda.synchronize()
        dist.barrier(self._group)

    # ---------------------------------------------------------------------------------------------- the two ways

    def fetch(self, like: Tensor, routes: Routes, *, weighted: bool) -> Tensor:
        """Of what is laid out the rows [rows, h] of this process's experts. like: this process's tokens."""
        from mixtral_run.model.kernels.symmetric_memory_triton import fetch

        return fetch(self._tokens.pointers, routes, like.shape[0], like, weighted=weighted)

    def fetch_gradient(self, gradient: Tensor, routes: Routes) -> Tensor:
        """Lay out gradient [t, h]; what each row of this process's experts gets of everyone's, times its share."""
        self._may_write(self._tokens)
        self._tokens.write(gradient)
        self._handle.barrier()
        return self.fetch(gradient, routes, weighted=True)

    def answer(
        self, rows: Tensor, shares: Tensor | None, weights: Tensor | None, routes: Routes
    ) -> tuple[Tensor, Tensor | None]:
        """rows [rows, h] of each process, added up where their tokens are, [t, h], times weights [t, topk] where given;
        and of shares fp32 [rows] those of each choice there, [t, topk]."""
        from mixtral_run.model.kernels.symmetric_memory_triton import pick, put, sum_rows

        self._may_write(self._rows)
        put(rows, routes, self._rows.own)
        if shares is not None:
            self._shares.write(shares)
        self._handle.barrier()
        count = routes.experts.shape[0] // self.size
        own = slice(self.rank * count, (self.rank + 1) * count)
        total = sum_rows(self._rows.pointers, routes, own, weights, rows)
        return total, None if shares is None else pick(self._shares.pointers, routes, own)

    def _may_write(self, piece: Piece) -> None:
        """Wait until nobody reads there, where no other wait has said so since."""
        if self._last is None or self._last is piece:
            self._handle.barrier()
        self._last = piece


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, peers: Peers, routes: Routes) -> tuple[Tensor, Tensor]:
        del weights  # its values came with the routes
        ctx.peers, ctx.routes = peers, routes
        # Another tensor of the same memory: the result itself would refer to this step, and the step to it.
        return peers.fetch(tokens, routes, weighted=False), routes.shares.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        return *ctx.peers.answer(gradients[0].contiguous(), gradients[1], None, ctx.routes), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, peers: Peers, routes: Routes) -> Tensor:
        ctx.peers, ctx.routes = peers, routes
        return peers.answer(rows.contiguous(), None, weights.contiguous(), routes)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.peers.fetch_gradient(gradients[0].contiguous(), ctx.routes), None, None, None


def open_peers(
    mesh: Mesh, architecture: MixtralArchitecture, tokens: int, dtype: torch.dtype, *, wanted: bool = True
) -> Peers | None:
    """For up to so many tokens of each process, where the GPUs of an expert group can read from each other, and all
    want it; else None. All ranks must call, and get the same."""
    able = wanted and dtype is torch.bfloat16 and _read_each_other(mesh.expert_group, mesh.device)
    if not everywhere(able, mesh.device):
        return None
    peers = Peers(mesh.expert_group, architecture, max(tokens, architecture.num_experts), dtype)
    for step in (peers.allocate, peers.share, partial(_try, peers, architecture, mesh.device, dtype)):
        why = refused(step, mesh.device)
        if why is not None:
            if why:
                log.warning("GPUs do not read from each other, exchanges are slower: %s.", why)
            return None
    return peers


def _read_each_other(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all of the group are on this machine, a GPU each by its rank, and driver and user let them."""
    # Where reading between GPUs hangs or brings wrong bytes, NCCL is told so by this.
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return False
    if device.type != "cuda" or os.environ.get("LOCAL_WORLD_SIZE") != str(dist.get_world_size()):
        return False
    others = [rank for rank in dist.get_process_group_ranks(group) if rank != device.index]
    return max(others) < torch.cuda.device_count() and all(
        torch.cuda.can_device_access_peer(device, other) for other in others
    )


def _try(peers: Peers, architecture: MixtralArchitecture, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RuntimeError where not what was put there is read; and have the kernels before anything is recorded."""
    tokens, topk = architecture.num_experts, architecture.moe_router_topk
    number = torch.arange(tokens, device=device)
    experts = (number[:, None] + torch.arange(topk, device=device)) % architecture.num_experts
    values = torch.full((tokens, architecture.hidden_size), float(peers.rank + 1), dtype=dtype, device=device)
    weights = experts + 1.0
    missing = torch.zeros((), dtype=torch.int64, device=device)
    peers.begin()
    # Every expert gets as many rows, so that no room is spared.
    routes = peers.route(values, weights, experts, tokens * topk, missing)
    rows, shares = peers.rows(values, weights, routes)
    right = (rows == (routes.source // tokens + 1)[:, None]).all() & (missing == 0)
    total, back = peers.answer(rows, shares, weights, routes)
    assert back is not None
    right &= (total == values * weights.sum(1, keepdim=True)).all() & (back == weights).all()
    if not right:
        raise RuntimeError("they read something else than was there")
