"""Experts of a long row in chunks of its tokens, so that the experts' activations of one chunk exist at a time.

The output of linear_fc1 takes 114,688 bytes a token (bf16), fourteen times its hidden state. The router runs before,
over all tokens: what it counts, and the loss of its balance, are those of the whole row. A chunk saves its tokens and
their routing; its backward pass dispatches and computes it again, as TiledMLP does for dense layers (Bekman et al.
2025, arXiv:2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixtral_run.model.recompute.checkpoint import checkpoint

ComputeChunk = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Returns outputs [tokens, hidden] for tokens, their probs and experts, both [tokens, topk]."""


def in_chunks(
    compute: ComputeChunk,
    tokens: Tensor,
    probs: Tensor,
    experts: Tensor,
    num_chunks: int,
    *,
    unread: bool = False,
    draws_numbers: bool = False,
) -> Tensor:
    """Return `compute` of all tokens [tokens, hidden], which are cut into `num_chunks` of nearly equal size.

    Args:
        compute: of a chunk. All ranks of the expert group must call with the same number of tokens.
        tokens, probs, experts: see TokenDispatcher.dispatch.
        num_chunks: at most as many as there are tokens are made.
        unread: True if only the gradients of the result are wanted. Then it is zeros: a layer that runs again for its
            backward pass needs no output, and the backward pass of a chunk computes it anyway.
        draws_numbers: True if `compute` draws random numbers: the backward pass draws them again, and `unread` does
            not hold, since each chunk must find the state of the generator that the one before it left.
    """
    sizes = chunk_sizes(tokens.shape[0], num_chunks)
    chunks = zip(tokens.split(sizes), probs.split(sizes), experts.split(sizes), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([compute(*chunk) for chunk in chunks])

    def compute_or_skip(*chunk: Tensor) -> Tensor:
        # The forward pass of `checkpoint` runs without gradients, its backward pass with them.
        if unread and not draws_numbers and not torch.is_grad_enabled():
            return chunk[0].new_zeros(()).expand_as(chunk[0])
        return compute(*chunk)

    outputs = [
        checkpoint(compute_or_skip, *chunk, use_reentrant=True, preserve_rng_state=draws_numbers) for chunk in chunks
    ]
    return torch.cat(outputs)


def chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Return sizes that differ by at most one and add up to `num_tokens`; none of them is 0 if there is a token."""
    count = max(1, min(num_chunks, num_tokens))
    return [num_tokens // count + (each < num_tokens % count) for each in range(count)]
