"""Triton kernels of moe.py's router: from logits to the chosen experts and their probabilities, and back.

A program computes a block of tokens, or, for the gradient of the tokens, a block of one token's columns. Import only on
machines with a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
COLUMNS = 1024


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


@triton.jit
def _route_backward_kernel(
    probs_ptr,
    experts_ptr,
    gradient_ptr,
    weight_ptr,
    for_tokens_ptr,
    output_ptr,
    width,
    TOPK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
):
    """Only the logits of the chosen experts have a gradient: TOPK rows of the weight are mixed.

    They are summed by the number of their expert, as a product with the whole weight sums them.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < width
    mean = 0.0
    for choice in tl.static_range(TOPK):
        place = token * TOPK + choice
        mean += tl.load(probs_ptr + place) * tl.load(gradient_ptr + place)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    last = tl.full([], -1, dtype=tl.int64)
    for _ in tl.static_range(TOPK):
        expert = tl.full([], 2**31 - 1, dtype=tl.int64)
        slope = 0.0
        for choice in tl.static_range(TOPK):
            place = token * TOPK + choice
            other = tl.load(experts_ptr + place)
            is_next = (other > last) & (other < expert)
            expert = tl.where(is_next, other, expert)
            other_slope = tl.load(probs_ptr + place) * (tl.load(gradient_ptr + place) - mean)
            slope = tl.where(is_next, other_slope, slope)
        # Of a token whose logits are no numbers, the same expert may be chosen twice.
        exists = mask & (expert < 2**31 - 1)
        row = tl.load(weight_ptr + expert * width + columns, mask=exists, other=0.0)
        total += slope * row.to(tl.float32)
        last = expert
    places = token * width + columns
    result = total.to(output_ptr.dtype.element_ty)
    if HAS_TOKENS:
        rest = tl.load(for_tokens_ptr + places, mask=mask, other=0.0).to(tl.float32)
        result = (rest + result.to(tl.float32)).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + places, result, mask=mask)


def route_backward(
    probs: Tensor, experts: Tensor, gradient: Tensor, weight: Tensor, for_tokens: Tensor | None
) -> Tensor:
    """Return the gradient of the tokens [tokens, hidden] from which the logits were computed with weight [experts,
    hidden], given that of the probabilities [tokens, topk], plus for_tokens [tokens, hidden]. All are contiguous.

    The gradient is cast to weight's dtype before the addition.
    """
    (tokens, topk), width = probs.shape, weight.shape[1]
    output = torch.empty(tokens, width, dtype=weight.dtype, device=weight.device)
    _route_backward_kernel[(tokens, triton.cdiv(width, COLUMNS))](
        probs,
        experts,
        gradient,
        weight,
        for_tokens if for_tokens is not None else output,
        output,
        width,
        TOPK=topk,
        COLUMNS=COLUMNS,
        HAS_TOKENS=for_tokens is not None,
    )
    return output
