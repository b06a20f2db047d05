"""Triton kernels of moe.py's router: from logits to the chosen experts and their probabilities, and back.

A program computes a block of tokens. Import only on machines with a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32


@triton.jit
def _choose_kernel(
    logits_ptr,
    probs_ptr,
    experts_ptr,
    tokens,
    count,
    TOPK: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.arange(0, COUNT)
    there = (rows < tokens)[:, None] & (numbers < count)[None, :]
    logits = tl.load(logits_ptr + rows[:, None] * count + numbers[None, :], mask=there, other=float("-inf"))
    largest = tl.max(logits, axis=1)
    left = logits
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(TOPK):
        # A row of NaN has no largest number: its experts must exist all the same.
        expert = tl.minimum(tl.argmax(left, axis=1), count - 1)
        mine = numbers[None, :] == expert[:, None]
        total += tl.exp(tl.sum(tl.where(mine, logits, 0.0), axis=1) - largest)
        left = tl.where(mine, float("-inf"), left)
        tl.store(experts_ptr + rows * TOPK + choice, expert.to(tl.int64), mask=rows < tokens)
    left = logits
    for choice in tl.static_range(TOPK):
        expert = tl.minimum(tl.argmax(left, axis=1), count - 1)
        mine = numbers[None, :] == expert[:, None]
        prob = tl.exp(tl.sum(tl.where(mine, logits, 0.0), axis=1) - largest) / total
        left = tl.where(mine, float("-inf"), left)
        tl.store(probs_ptr + rows * TOPK + choice, prob, mask=rows < tokens)


@triton.jit
def _choose_backward_kernel(
    probs_ptr,
    experts_ptr,
    gradient_ptr,
    for_logits_ptr,
    tokens,
    count,
    TOPK: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.arange(0, COUNT)
    mask = rows < tokens
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(TOPK):
        places = rows * TOPK + choice
        mean += tl.load(probs_ptr + places, mask=mask) * tl.load(gradient_ptr + places, mask=mask)
    result = tl.zeros([BLOCK, COUNT], dtype=tl.float32)
    for choice in tl.static_range(TOPK):
        places = rows * TOPK + choice
        slope = tl.load(probs_ptr + places, mask=mask) * (tl.load(gradient_ptr + places, mask=mask) - mean)
        expert = tl.load(experts_ptr + places, mask=mask)
        result += tl.where(numbers[None, :] == expert[:, None], slope[:, None], 0.0)
    there = mask[:, None] & (numbers < count)[None, :]
    tl.store(for_logits_ptr + rows[:, None] * count + numbers[None, :], result, mask=there)


def choose(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Compute moe.choose for contiguous logits fp32 [tokens, experts], without autograd."""
    tokens, count = logits.shape
    probs = torch.empty(tokens, topk, dtype=torch.float32, device=logits.device)
    experts = torch.empty(tokens, topk, dtype=torch.int64, device=logits.device)
    sizes = {"TOPK": topk, "COUNT": triton.next_power_of_2(count), "BLOCK": BLOCK}
    _choose_kernel[(triton.cdiv(tokens, BLOCK),)](logits, probs, experts, tokens, count, **sizes, num_warps=1)
    return probs, experts


def choose_backward(probs: Tensor, experts: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Return the gradient of the logits [tokens, count], given that of the probabilities. All are contiguous."""
    tokens, topk = probs.shape
    for_logits = torch.empty(tokens, count, dtype=torch.float32, device=probs.device)
    sizes = {"TOPK": topk, "COUNT": triton.next_power_of_2(count), "BLOCK": BLOCK}
    _choose_backward_kernel[(triton.cdiv(tokens, BLOCK),)](
        probs, experts, gradient, for_logits, tokens, count, **sizes, num_warps=1
    )
    return for_logits
