"""Token dispatch through memory that the GPUs of one machine read from each other. A job may have several machines, if
each expert group lies within one.

Collectives bring every token to every process of an expert group (all_gather.py); with four processes half of them are
needed. An all-to-all of permuted tokens has to exchange counts first, which the host waits for. Here nobody sends: each
process writes its tokens to symmetric memory, all wait for each other on the GPU, and each reads the rows that it needs
over NVLink, sorted by expert as it reads. Every process computes from the choices of all processes which row is where
(sort_triton.py), so that the way back is the same: a token's rows are read from the one or two processes that have its
experts, weighted, and summed in fp32.

    dispatched   tokens [t, h] of this process; probs and experts          read by the processes of their experts
    results      rows [rows, h] of this process's experts; fp32 [rows]     read by the processes of their tokens

Consecutive reads alternate between the two regions, so that a barrier before reading one is also the end of all reads
of the other. Nothing waits for the host: the pass can be captured in a CUDA graph. Backward, gradients take the same
ways.

The memory is torch's symmetric memory (torch.distributed._symmetric_memory), without multicast.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.model.dispatch import capacity
from mixtral_run.model.dispatch.base import ExpertInputs, TokenDispatcher, added
from mixtral_run.model.dispatch.overflow import RowCapacity
from mixtral_run.model.dispatch.permute import Permutation
from mixtral_run.model.parallel.mesh import Mesh, everywhere, refused
from mixtral_run.model.recompute.recipe import Recipe

if TYPE_CHECKING:
    from mixtral_run.model.kernels.sort_triton import Routes

log = logging.getLogger(__name__)

ALIGNMENT_BYTES = 256
"""Regions start at a multiple of this, so that they can be read in the widest words."""


@dataclass(frozen=True)
class Region:
    """One region of the symmetric memory. own: this rank's flat view. pointers: int64 [p] on the device, the addresses
    of the same region on every rank of the group.
    """

    own: Tensor
    pointers: Tensor

    def write(self, values: Tensor) -> None:
        """Copy values to the start of this rank's region, in the region's dtype."""
        self.own[: values.numel()].view_as(values).copy_(values)


class SymmetricMemoryExchange:
    """Exchanges of one expert group through symmetric memory, for up to `tokens` of each process.

    All ranks of the group must create one, call `allocate`, call `share` once all have allocated, and then call the
    other methods alike, with the same number of tokens. Call `close` before the object is released.
    """

    def __init__(
        self, group: dist.ProcessGroup, architecture: MixtralArchitecture, tokens: int, dtype: torch.dtype
    ) -> None:
        self.size, self.rank, self._group = group.size(), group.rank(), group
        self.tokens = tokens
        self._num_experts = architecture.num_experts
        each = architecture.num_experts // self.size
        self._own = range(self.rank * each, (self.rank + 1) * each)
        hidden, choices = architecture.hidden_size, tokens * architecture.moe_router_topk
        num_rows = capacity.rows_with_room(choices * self.size, self.size)
        self._kinds = (dtype, torch.float32, torch.int32, dtype, torch.float32)
        counts = (tokens * hidden, choices, choices, num_rows * hidden, num_rows)
        self._sizes = [
            -(-count * kind.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            for count, kind in zip(counts, self._kinds, strict=True)
        ]
        self._last: Region | None = None

    def allocate(self) -> None:
        """Allocate this rank's memory. Raises RuntimeError if there is none, ImportError if torch does not have
        symmetric memory.
        """
        # Multicast is not needed, and is an error on machines whose NVSwitches are not set up for it.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        from torch.distributed import _symmetric_memory as symmetric_memory

        device = torch.device("cuda", torch.cuda.current_device())
        self._memory = symmetric_memory.empty(sum(self._sizes), dtype=torch.uint8, device=device)

    def share(self) -> None:
        """Exchange addresses with the other ranks of the group. Raises RuntimeError if the driver refuses."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        self._handle: Any = symmetric_memory.rendezvous(self._memory, self._group)
        addresses = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64)
        regions = []
        for number, (kind, size) in enumerate(zip(self._kinds, self._sizes, strict=True)):
            begin = sum(self._sizes[:number])
            own = self._memory[begin : begin + size].view(kind)
            regions.append(Region(own, (addresses + begin).to(self._memory.device)))
        self._tokens, self._probs, self._experts, self._rows, self._row_probs = regions

    def begin(self) -> None:
        """Forget which region the previous pass of the model read last. Call it before each pass."""
        self._last = None

    def route(self, tokens: Tensor, probs: Tensor, experts: Tensor, num_rows: int, overflow: Tensor) -> Routes:
        """Write tokens [t, h], probs fp32 and experts [t, topk], and return which row is where.

        num_rows, overflow: the capacity, and the counter of rows beyond it (RowCapacity).
        """
        from mixtral_run.model.kernels.sort_triton import route

        self._wait_for_readers(self._tokens)
        self._probs.write(probs.detach())
        self._experts.write(experts)
        self._tokens.write(tokens.detach())
        self._handle.barrier()
        pointers = (self._probs.pointers, self._experts.pointers)
        rows, topk = experts.shape
        return route(*pointers, (rows, topk), self._num_experts, self._own, num_rows, overflow)

    def rows(self, tokens: Tensor, probs: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """Read what `route` wrote: the rows of this process's experts [rows, h] up to the last of `routes.offsets`,
        and the routing probability of each, fp32 [rows]. Gradients of both return to their tokens' processes.
        """
        found: tuple[Tensor, Tensor] = _Rows.apply(tokens, probs, self, routes)  # type: ignore[no-untyped-call]
        return found

    def sum_to_owners(self, rows: Tensor, probs: Tensor, routes: Routes) -> Tensor:
        """Return for each token of this process the sum of its rows times probs: [t, h].

        rows: [rows, h] of each process's experts. probs: fp32 [t, topk]; they get no gradient.
        """
        own: Tensor = _SumRows.apply(rows, probs, self, routes)  # type: ignore[no-untyped-call]
        return own

    def close(self) -> None:
        """Wait until no rank reads this rank's memory any more. All ranks of the group must call."""
        torch.cuda.synchronize()
        dist.barrier(self._group)

    # ---------------------------------------------------------------------------------------------- the two directions

    def fetch(self, like: Tensor, routes: Routes, *, weighted: bool) -> Tensor:
        """Read the rows [rows, h] of this process's experts from all ranks' tokens. like: this process's tokens."""
        from mixtral_run.model.kernels.symmetric_memory_triton import fetch

        return fetch(self._tokens.pointers, routes, like.shape[0], like, weighted=weighted)

    def fetch_gradient(self, gradient: Tensor, routes: Routes) -> Tensor:
        """Write gradient [t, h]; return for each row of this process's experts its token's gradient times its prob."""
        self._wait_for_readers(self._tokens)
        self._tokens.write(gradient)
        self._handle.barrier()
        return self.fetch(gradient, routes, weighted=True)

    def answer(
        self, rows: Tensor, row_probs: Tensor | None, probs: Tensor | None, routes: Routes
    ) -> tuple[Tensor, Tensor | None]:
        """Bring rows back to their tokens.

        Args:
            rows: [rows, h] of each process's experts.
            row_probs: fp32 [rows], a number of each row to bring back as well.
            probs: fp32 [t, topk], factors of the rows; None for ones.

        Returns the sum of each token's rows, [t, h], and the numbers of its choices, [t, topk].
        """
        from mixtral_run.model.kernels.symmetric_memory_triton import pick, put, sum_rows

        self._wait_for_readers(self._rows)
        put(rows, routes, self._rows.own)
        if row_probs is not None:
            self._row_probs.write(row_probs)
        self._handle.barrier()
        count = routes.experts.shape[0] // self.size
        own = slice(self.rank * count, (self.rank + 1) * count)
        total = sum_rows(self._rows.pointers, routes, own, probs, rows)
        return total, None if row_probs is None else pick(self._row_probs.pointers, routes, own)

    def _wait_for_readers(self, region: Region) -> None:
        """Wait until nobody reads the region, unless a barrier since the last read already implies it."""
        if self._last is None or self._last is region:
            self._handle.barrier()
        self._last = region


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, probs: Tensor, exchange: SymmetricMemoryExchange, routes: Routes
    ) -> tuple[Tensor, Tensor]:
        del probs  # their values are part of the routes
        ctx.exchange, ctx.routes = exchange, routes
        # detach() makes another tensor of the same memory: the result itself would refer to this autograd node, which
        # refers to the routes.
        return exchange.fetch(tokens, routes, weighted=False), routes.row_probs.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        return *ctx.exchange.answer(gradients[0].contiguous(), gradients[1], None, ctx.routes), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, probs: Tensor, exchange: SymmetricMemoryExchange, routes: Routes) -> Tensor:
        ctx.exchange, ctx.routes = exchange, routes
        return exchange.answer(rows.contiguous(), None, probs.contiguous(), routes)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.exchange.fetch_gradient(gradients[0].contiguous(), ctx.routes), None, None, None


@dataclass(frozen=True)
class SymmetricMemoryTrip:
    """probs: fp32 [t, topk] of this process's tokens, without a gradient; routes: which row is where."""

    probs: Tensor
    routes: Routes


class SymmetricMemoryDispatcher(TokenDispatcher[SymmetricMemoryTrip]):
    """Exchange in which each process reads the rows of its experts, and then the results of its tokens.

    It serves adapted experts only, and can be captured in a CUDA graph.
    """

    def __init__(self, exchange: SymmetricMemoryExchange, device: torch.device) -> None:
        self.exchange = exchange
        self._capacity = RowCapacity(device)

    def begin_pass(self) -> None:
        self.exchange.begin()

    def dispatch(
        self, tokens: Tensor, probs: Tensor, experts: Tensor, *, recipe: Recipe | None, indexed: bool
    ) -> tuple[ExpertInputs, SymmetricMemoryTrip]:
        assert indexed, "symmetric memory serves adapted experts only"
        del recipe  # the fetched rows are kept
        size = self.exchange.size
        num_rows = self._capacity.num_rows(experts.numel() * size, size)
        routes = self.exchange.route(tokens, probs, experts, num_rows, self._capacity.overflow)
        rows, row_probs = self.exchange.rows(tokens, probs, routes)
        trip = SymmetricMemoryTrip(probs.detach(), routes)
        return ExpertInputs(rows, Permutation(routes.offsets), None, row_probs), trip

    def combine(self, outputs: Tensor, trip: SymmetricMemoryTrip, residual: Tensor | None = None) -> Tensor:
        return added(residual, self.exchange.sum_to_owners(outputs, trip.probs, trip.routes))

    def overflowed(self, mesh: Mesh) -> bool:
        return self._capacity.exceeded(mesh)


def open_symmetric_memory(
    mesh: Mesh, architecture: MixtralArchitecture, tokens: int, dtype: torch.dtype, *, wanted: bool = True
) -> SymmetricMemoryExchange | None:
    """Return an exchange for up to `tokens` of each process if the GPUs of every expert group can read from each other
    and all ranks want it; otherwise None. All ranks must call, and get the same.
    """
    able = wanted and dtype is torch.bfloat16 and _can_read_peers(mesh.expert_group, mesh.device)
    # The sharing of memory would hang between machines: launchers other than torchrun may number the ranks otherwise.
    is_one_machine = _is_same_on_all(_machine_number(), mesh.expert_group, mesh.device)
    if not everywhere(able and is_one_machine, mesh.device):
        return None
    exchange = SymmetricMemoryExchange(mesh.expert_group, architecture, max(tokens, architecture.num_experts), dtype)
    for step in (exchange.allocate, exchange.share, partial(_self_test, exchange, architecture, mesh.device, dtype)):
        why = refused(step, mesh.device)
        if why is not None:
            if why:
                log.warning("GPUs do not read from each other, exchanges are slower: %s.", why)
            return None
    return exchange


def _can_read_peers(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if all ranks of the group are on this machine, each on the GPU of its number there, and the driver
    and the environment allow these GPUs to read from each other.

    torch's symmetric memory asks for no more: it exchanges addresses through the store of the group, and handles of the
    memory through sockets of the machine.
    """
    # Users set this where peer reads hang or return wrong bytes, to tell NCCL so.
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return False
    if device.type != "cuda":
        return False
    # torchrun numbers the ranks of a machine one after the other.
    first = dist.get_rank() - device.index
    numbers = [rank - first for rank in dist.get_process_group_ranks(group)]
    on_machine = range(min(int(os.environ.get("LOCAL_WORLD_SIZE", "0")), torch.cuda.device_count()))
    return all(number in on_machine for number in numbers) and all(
        torch.cuda.can_device_access_peer(device, other) for other in numbers if other != device.index
    )


def _machine_number() -> int:
    """Return a number of 62 bits that differs between machines."""
    # Host names of containers may be equal.
    booted = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return int.from_bytes(hashlib.sha256(booted).digest()[:8]) >> 2


def _is_same_on_all(number: int, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if the number is the same on all ranks of the group. All ranks must call."""
    ends = torch.tensor([number, -number], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    most, least = ends.tolist()
    return bool(most == -least)


def _self_test(
    exchange: SymmetricMemoryExchange, architecture: MixtralArchitecture, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise RuntimeError if what is read differs from what was written. Compiles the kernels before any capture: those
    of the run, which depend on the number of tokens.
    """
    tokens, topk = exchange.tokens, architecture.moe_router_topk
    tokens -= tokens % architecture.num_experts
    number = torch.arange(tokens, device=device)
    experts = (number[:, None] + torch.arange(topk, device=device)) % architecture.num_experts
    values = torch.full((tokens, architecture.hidden_size), float(exchange.rank + 1), dtype=dtype, device=device)
    probs = experts + 1.0
    overflow = torch.zeros((), dtype=torch.int64, device=device)
    exchange.begin()
    # Every expert gets the same number of rows: the capacity needs no spare.
    routes = exchange.route(values, probs, experts, tokens * topk, overflow)
    rows, row_probs = exchange.rows(values, probs, routes)
    right = (rows == (routes.source // tokens + 1)[:, None]).all() & (overflow == 0)
    total, back = exchange.answer(rows, row_probs, probs, routes)
    assert back is not None
    right &= (total == values * probs.sum(1, keepdim=True)).all() & (back == probs).all()
    if not right:
        raise RuntimeError("the self-test read other values than were written")
