"""Cross entropy in chunks of tokens, so that the logits of a long row never exist as a whole.

The logits of 65,536 tokens and 32,000 words take 4 GiB in bf16, and their exponentials, which the backward pass needs,
8 GiB in fp32. Each chunk computes its logits again in the backward pass instead: one more product of the output layer,
1 % of a forward pass of Mixtral.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixtral_run.model.parallel.megatron import gather_from_sequence_parallel_region


def chunked_cross_entropy(hidden: Tensor, labels: Tensor, gpt: Any, most: int) -> Tensor:
    """Return the cross entropy of each label, fp32 [batch, sequence].

    Args:
        hidden: [sequence (/ TP under sequence parallelism), batch, hidden], after the last norm.
        labels: int64 [batch, sequence].
        gpt: Megatron's GPTModel, whose output layer and loss are those of a row that is not cut.
        most: tokens whose logits exist at the same time.

    All ranks of the TP group must call.
    """
    if gpt.output_layer.sequence_parallel:
        # The layer sums the gradients over TP, as all ranks then have the same tokens.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    # In the order sequence, batch, as the tokens of hidden.
    targets = labels.t().reshape(-1)

    def losses_of(rows: Tensor, wanted: Tensor) -> Tensor:
        with _whole_sequence(gpt.output_layer):
            logits: Tensor = gpt.output_layer(rows[:, None])[0]
        losses: Tensor = gpt.compute_language_model_loss(wanted[None], logits)
        return losses[0]

    chunks = [
        checkpoint(losses_of, rows, wanted, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted in zip(hidden.flatten(0, 1).split(most), targets.split(most), strict=True)
    ]
    return torch.cat(chunks).view(labels.shape[1], labels.shape[0]).t().contiguous()


@contextmanager
def _whole_sequence(output_layer: Any) -> Iterator[None]:
    """Let the layer take all tokens of a chunk on every TP rank within the block."""
    split = output_layer.sequence_parallel
    output_layer.sequence_parallel = False
    try:
        yield
    finally:
        output_layer.sequence_parallel = split
