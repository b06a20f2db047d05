"""Tokens to rows sorted by expert, and experts' outputs back to tokens.

`order` [tokens·topk] lists the choices (token·topk + which) sorted by expert; `position` is its inverse. Both ways are
gathers, backward too: a scatter that adds would do so in an order of its own on a GPU, and autograd's gradient of an
index sorts first. Where other processes have rows too (all_gather.py), `end`, an integer on the device, says how
many are
here: those whose position is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sorted_by_expert(chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """chosen int64 [choices], numbers below `count` → order and position, int64 [choices], and ends, int32 [count],
    where each number's choices end. Equal ones stay as they were. Nothing waits for the GPU."""
    if chosen.is_cuda and chosen.numel():
        from mixtral_run.model.kernels.sort_triton import sort_choices

        return sort_choices(chosen, count)
    order = chosen.argsort(stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    counts = (chosen[:, None] == torch.arange(count, device=chosen.device)).sum(0)
    return order, position, counts.cumsum(0).int()


def to_rows(tokens: Tensor, order: Tensor, position: Tensor, topk: int) -> Tensor:
    """tokens [tokens, hidden] → rows [tokens·topk, hidden], each token once for each expert it chose."""
    rows: Tensor = _ToRows.apply(tokens, order, position, topk)  # type: ignore[no-untyped-call]
    return rows


def to_tokens(rows: Tensor, weights: Tensor, order: Tensor, position: Tensor, end: Tensor | None = None) -> Tensor:
    """rows [tokens·topk, hidden] → tokens [tokens, hidden]: each token's rows added, times weights [tokens, topk].

    With `end`, fewer rows will do, and weights get no gradient.
    """
    assert end is None or not weights.requires_grad
    tokens: Tensor = _ToTokens.apply(rows, weights, order, position, end)  # type: ignore[no-untyped-call]
    return tokens


def regroup(rows: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """rows [Σ sizes, hidden], which lie in blocks of these sizes → the same with the blocks in this order.

    For blocks whose sizes the host knows: one pass over memory and no index on the GPU, forward and backward.
    """
    if list(order) == sorted(order):
        return rows
    blocks = rows.split(list(sizes))
    return torch.cat([blocks[block] for block in order])


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, position: Tensor, topk: int) -> Tensor:
        ctx.save_for_backward(position)
        ctx.topk = topk
        return tokens.index_select(0, order // topk)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (position,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        ones = torch.ones(position.numel() // ctx.topk, ctx.topk, device=gradient.device)
        return add_rows(gradient, ones, position), None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, position: Tensor, end: Tensor | None) -> Tensor:
        # The rows are for the gradient of the weights alone.
        ctx.save_for_backward(rows if weights.requires_grad else None, weights, order, position, end)
        ctx.num_rows = rows.shape[0]
        return add_rows(rows, weights, position, end)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        rows, weights, order, position, end = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        if gradient.is_cuda and position.numel():
            from mixtral_run.model.kernels.permute_triton import spread

            return *spread(gradient, rows, weights, position, ctx.num_rows, end), None, None, None
        topk, order = weights.shape[1], order[: ctx.num_rows]
        for_rows = gradient.index_select(0, order // topk) * weights.flatten()[order, None].to(gradient.dtype)
        if rows is None:
            return for_rows, None, None, None, None
        picked = rows.index_select(0, position).view(*weights.shape, rows.shape[1])
        for_weights = (picked * gradient[:, None]).sum(-1, dtype=weights.dtype)
        return for_rows, for_weights, None, None, None


def add_rows(rows: Tensor, weights: Tensor, position: Tensor, end: Tensor | None = None) -> Tensor:
    """Σ over k of weights[t, k] · rows[position[t·topk + k]]: [tokens, hidden] in rows' dtype, added in fp32."""
    if rows.is_cuda and rows.numel():
        from mixtral_run.model.kernels.permute_triton import add_rows as on_gpu

        return on_gpu(rows.contiguous(), weights, position, end)
    if end is not None:
        mesh = position < end
        picked = rows.index_select(0, position.where(mesh, 0)).where(mesh[:, None], 0.0)
    else:
        picked = rows.index_select(0, position)
    picked = picked.view(*weights.shape, rows.shape[1])
    return (picked * weights[..., None].to(rows.dtype)).sum(dim=1)
