"""Run under torchrun: compare exchanges through symmetric memory with collectives, forward and backward.

Exits with 1 if anything differs. Rounds are run eagerly and as a CUDA graph that is replayed with other numbers, so
that a value that is read too early or overwritten too soon is wrong.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.model.dispatch.all_gather import gather, sum_to_owners
from mixtral_run.model.dispatch.overflow import RowCapacity
from mixtral_run.model.dispatch.symmetric_memory import SymmetricMemoryExchange, open_symmetric_memory
from mixtral_run.model.parallel.mesh import Mesh, open_mesh

ARCHITECTURE = dataclasses.replace(MIXTRAL_8X7B, hidden_size=1536)
MOST = 300
ROUNDS = 40
TOLD = ("result", "gradient of tokens", "gradient of weights")
Numbers = tuple[Tensor, Tensor, Tensor, Tensor]


def numbers(tokens: int, routing: str, seed: int) -> Numbers:
    """Return tokens, probs, experts and a gradient, which differ between processes."""
    generator = torch.Generator("cuda").manual_seed(1000 * seed + dist.get_rank())
    hidden, count = ARCHITECTURE.hidden_size, ARCHITECTURE.num_experts
    values, gradient = (torch.randn(tokens, hidden, device="cuda", generator=generator).bfloat16() for _ in range(2))
    likes = torch.rand(tokens, count, device="cuda", generator=generator)
    if routing == "two experts":
        likes[:, [0, 7]] += 1
    elif routing == "one process":
        likes[:, -2:] += 1
    weights, experts = likes.topk(ARCHITECTURE.moe_router_topk)
    return values, weights, experts, gradient


class Factor(torch.autograd.Function):
    """Experts that multiply by a number; the gradient of probs is computed as in lora_experts.py."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, probs: Tensor, factors: Tensor) -> Tensor:
        results = rows * factors[:, None].to(rows.dtype)
        ctx.save_for_backward(results, probs, factors)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        results, probs, factors = ctx.saved_tensors
        for_shares = (gradients[0].float() * results.float()).sum(1) / probs
        return gradients[0] * factors[:, None].to(results.dtype), for_shares, None


def by_symmetric_memory(exchange: SymmetricMemoryExchange, capacity: RowCapacity, given: Numbers) -> list[Tensor]:
    """Return result and gradients of a layer whose experts multiply by their number, from 1. All ranks must call."""
    tokens, weights, experts, gradient = given
    tokens, weights = tokens.detach().requires_grad_(), weights.detach().requires_grad_()
    exchange.begin()
    num_rows = capacity.num_rows(experts.numel() * exchange.size, exchange.size)
    routes = exchange.route(tokens, weights, experts, num_rows, capacity.overflow)
    rows, probs = exchange.rows(tokens, weights, routes)
    # Rows at or after the last offset belong to no expert; any factor will do.
    number = (torch.arange(num_rows, device="cuda")[:, None] >= routes.offsets).sum(1)
    factors = 1.0 + number + exchange.rank * routes.offsets.numel()
    results = Factor.apply(rows, probs, factors)
    own = exchange.sum_to_owners(results, weights.detach(), routes)
    own.backward(gradient)
    assert tokens.grad is not None
    assert weights.grad is not None
    return [own.detach(), tokens.grad, weights.grad]


def by_collectives(mesh: Mesh, given: Numbers) -> list[Tensor]:
    """Compute the same in fp32 by all-gather. All ranks must call."""
    tokens, weights, experts, gradient = given
    tokens, weights = tokens.float().requires_grad_(), weights.detach().requires_grad_()
    found = gather(tokens, weights, experts, mesh.expert_group)
    own = found.experts // (ARCHITECTURE.num_experts // mesh.expert_size) == mesh.expert_rank
    factor = (found.probs * (found.experts + 1)).where(own, 0.0).sum(1, keepdim=True)
    result = sum_to_owners(found.tokens * factor, mesh.expert_group)
    result.backward(gradient.float())
    assert tokens.grad is not None
    assert weights.grad is not None
    return [result.detach(), tokens.grad, weights.grad]


def check(name: str, found: list[Tensor], expected: list[Tensor]) -> None:
    # A weight's gradient is a sum of 1,536 numbers of either sign, some 300 in size, each rounded to bf16.
    for what, one, other, near in zip(TOLD, found, expected, (2e-2, 2e-2, 3.0), strict=True):
        difference = (one.float() - other).abs() - 2e-2 * other.abs()
        worst = float(difference.max())
        assert worst <= near, f"{name}, {what}: {worst} further than it may be"


def captured(run: Callable[[Numbers], list[Tensor]], given: Numbers) -> Callable[[Numbers], list[Tensor]]:
    held = tuple(each.clone() for each in given)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = run(held)

    def replay(given: Numbers) -> list[Tensor]:
        for one, other in zip(held, given, strict=True):
            one.copy_(other)
        graph.replay()
        return results

    return replay


def main() -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl")
    size = dist.get_world_size()
    with open_mesh(LaunchConfig(tensor_model_parallel_size=2, expert_model_parallel_size=size, device="cuda")) as mesh:
        exchange = open_symmetric_memory(mesh, ARCHITECTURE, MOST, torch.bfloat16)
        assert exchange is not None, "these GPUs do not read from each other"
        capacity = RowCapacity(mesh.device)
        for tokens, routing in ((MOST, "random"), (MOST, "two experts"), (17, "random"), (1, "two experts")):
            for seed in range(4):
                given = numbers(tokens, routing, seed)
                check(
                    f"{tokens} {routing}", by_symmetric_memory(exchange, capacity, given), by_collectives(mesh, given)
                )
        replay = captured(lambda given: by_symmetric_memory(exchange, capacity, given), numbers(MOST, "random", 0))
        many = [numbers(MOST, "random", seed) for seed in range(ROUNDS)]
        # Replays follow each other without a wait, so that processes run ahead of each other.
        results = [[each.clone() for each in replay(given)] for given in many]
        for seed, (given, found) in enumerate(zip(many, results, strict=True)):
            check(f"replay {seed}", found, by_collectives(mesh, given))
        assert not capacity.exceeded(mesh)
        # If nearly all tokens choose the experts of one process, rows exceed its capacity, which is reported.
        by_symmetric_memory(exchange, capacity, numbers(MOST, "one process", 0))
        assert capacity.exceeded(mesh) == (size != 2)
        assert not capacity.exceeded(mesh)
        exchange.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
