"""Cross entropy in chunks of tokens, so that the logits of a long row never exist as a whole.

The logits of 65,536 tokens and 32,000 words take 4 GiB in bf16, and their exponentials, which the backward pass needs,
8 GiB in fp32. Each chunk computes its logits again in the backward pass instead: one more product of the output layer,
1 % of a forward pass of Mixtral.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixtral_run.model.parallel.megatron import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    most: int,
    *,
    sequence_parallel: bool,
) -> Tensor:
    """Return the cross entropy of each label, fp32 [batch, sequence].

    Args:
        hidden: [sequence (/ TP under sequence parallelism), batch, hidden], after the last norm.
        labels: int64 [batch, sequence].
        logits_of: returns this rank's logits [tokens, vocabulary / TP] of tokens [tokens, hidden].
        most: tokens whose logits exist at the same time.
        sequence_parallel: True if each TP rank has its part of the sequence.

    All ranks of the TP group must call.
    """
    # Each TP rank has logits of its part of the vocabulary: the gradients of a token are summed over the ranks.
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    # Labels in the order sequence, batch, as the tokens of hidden.
    targets = labels.t().reshape(-1)

    def losses_of(rows: Tensor, wanted: Tensor) -> Tensor:
        losses: Tensor = vocab_parallel_cross_entropy(logits_of(rows), wanted)
        return losses

    tokens = hidden.flatten(0, 1)
    chunks = [
        checkpoint(losses_of, rows, wanted, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted in zip(tokens.split(most), targets.split(most), strict=True)
    ]
    return torch.cat(chunks).view(labels.shape[1], labels.shape[0]).t().contiguous()
