"""Permutation of tokens into rows sorted by expert, and back.

`order` [tokens·topk] lists the choices (token·topk + k) sorted by expert; `inverse` is its inverse permutation. Both
directions gather, backward too: on a GPU a scatter-add would sum in an undefined order, and autograd's gradient of an
index sorts first. Where other processes have rows too (all_gather.py), `end`, an integer on the device, is the number
of rows of this process: those whose inverse is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """The rows that a process's experts compute.

    offsets: int32 [local experts], see kernels/grouped_mm.py. source: int64 [rows], the token of each row. inverse:
    int64 [tokens·topk], see above. topk: rows of a token. Without source and inverse the tokens are the rows. partial:
    `inverse` covers more than these rows; those of other processes are at or after the last of `offsets`. order: int64
    [rows], see above; with it, probabilities of the rows are given as those of the choices, [tokens, topk].
    """

    offsets: Tensor
    source: Tensor | None = None
    inverse: Tensor | None = None
    topk: int = 1
    partial: bool = False
    order: Tensor | None = None


class SortedChoices(NamedTuple):
    """Choices sorted by expert. order, inverse: int64 [choices], see above. offsets: int32 [experts], the end of each
    expert's choices. source: int64 [choices], order // topk, the token of each row.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    source: Tensor


def sort_by_expert(chosen: Tensor, count: int, topk: int = 1) -> SortedChoices:
    """Sort choices by expert, stably. Never waits for the GPU. chosen: int64 [choices], numbers below `count`."""
    if chosen.is_cuda and chosen.numel():
        from mixtral_run.model.kernels.sort_triton import sort_choices

        return SortedChoices(*sort_choices(chosen.contiguous(), count, topk))
    order = chosen.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    counts = (chosen[:, None] == torch.arange(count, device=chosen.device)).sum(0)
    return SortedChoices(order, inverse, counts.cumsum(0).int(), order // topk)


def permute(tokens: Tensor, source: Tensor, inverse: Tensor, topk: int) -> Tensor:
    """Return rows [tokens·topk, hidden] of tokens [tokens, hidden]: each token once for each expert that it chose.

    source: int64 [tokens·topk], the token of each row.
    """
    rows: Tensor = _Permute.apply(tokens, source, inverse, topk)  # type: ignore[no-untyped-call]
    return rows


def sorted_probs(probs: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return probs [tokens, topk] of all choices in the order of the rows: [tokens·topk]."""
    rows: Tensor = _SortedProbs.apply(probs, order, inverse)  # type: ignore[no-untyped-call]
    return rows


def unpermute(
    rows: Tensor,
    probs: Tensor,
    order: Tensor,
    inverse: Tensor,
    end: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return tokens [tokens, hidden]: the sum of each token's rows [tokens·topk, hidden] times probs [tokens, topk],
    to which residual [tokens, hidden] is added if given.

    With `end` there may be fewer rows, and probs get no gradient.
    """
    assert end is None or not probs.requires_grad
    tokens: Tensor = _Unpermute.apply(rows, probs, order, inverse, end, residual)  # type: ignore[no-untyped-call]
    return tokens


def regroup(rows: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """Return rows [Σ sizes, hidden], which consist of blocks of these sizes, with the blocks in this order.

    The host knows the sizes: this takes one pass over memory and no index on the GPU, forward and backward.
    """
    if list(order) == sorted(order):
        return rows
    blocks = rows.split(list(sizes))
    return torch.cat([blocks[block] for block in order])


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, inverse: Tensor, topk: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.topk = topk
        return tokens.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return add_rows(gradients[0].contiguous(), None, inverse, ctx.topk), None, None, None


class _SortedProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape = probs.shape
        return probs.flatten().index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse).view(ctx.shape), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        probs: Tensor,
        order: Tensor,
        inverse: Tensor,
        end: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        # Only the gradient of probs needs the rows.
        ctx.save_for_backward(rows if probs.requires_grad else None, probs, order, inverse, end)
        ctx.num_rows = rows.shape[0]
        return add_rows(rows, probs, inverse, probs.shape[1], end, residual)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, probs, order, inverse, end = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        for_residual = gradients[0] if ctx.needs_input_grad[5] else None
        if gradient.is_cuda and inverse.numel():
            from mixtral_run.model.kernels.permute_triton import spread

            return *spread(gradient, rows, probs, inverse, ctx.num_rows, end), None, None, None, for_residual
        topk, order = probs.shape[1], order[: ctx.num_rows]
        for_rows = gradient.index_select(0, order // topk) * probs.flatten()[order, None].to(gradient.dtype)
        if rows is None:
            return for_rows, None, None, None, None, for_residual
        picked = rows.index_select(0, inverse).view(*probs.shape, rows.shape[1])
        for_probs = (picked * gradient[:, None]).sum(-1, dtype=probs.dtype)
        return for_rows, for_probs, None, None, None, for_residual


def add_rows(
    rows: Tensor,
    probs: Tensor | None,
    inverse: Tensor,
    topk: int,
    end: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return Σ over k of probs[t, k] · rows[inverse[t·topk + k]]: [tokens, hidden] in rows' dtype, summed in fp32.

    probs: None for ones. residual: [tokens, hidden] in rows' dtype, added to the sum after it is cast to that dtype.
    """
    if rows.is_cuda and rows.numel():
        from mixtral_run.model.kernels.permute_triton import add_rows as on_gpu

        return on_gpu(rows.contiguous(), probs, inverse, topk, end, residual)
    if end is not None:
        exists = inverse < end
        picked = rows.index_select(0, inverse.where(exists, 0)).where(exists[:, None], 0.0)
    else:
        picked = rows.index_select(0, inverse)
    picked = picked.view(-1, topk, rows.shape[1])
    output = (picked if probs is None else picked * probs[..., None].to(rows.dtype)).sum(dim=1)
    return output if residual is None else residual + output
