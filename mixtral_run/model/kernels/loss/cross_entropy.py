"""Cross entropy of logits in 16 bit, without copies of them in fp32.

Megatron's cross entropy copies the logits to fp32 and passes over them eight times. Here they are read once forward,
and once backward, where their gradient is written; sums are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_cross_entropy(logits: Tensor) -> bool:
    """Return True if `cross_entropy` takes these logits: bf16 on a GPU."""
    return logits.is_cuda and logits.dtype is torch.bfloat16 and logits.numel() > 0


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each label, fp32 [..], for logits [.., vocabulary] and labels int64 [..].

    As in Megatron, a label outside of the vocabulary counts as one whose logit is the largest, without a gradient.
    """
    losses: Tensor = _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten())  # type: ignore[no-untyped-call]
    return losses.view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        from mixtral_run.model.kernels.loss.cross_entropy_triton import forward

        logits, labels = logits.contiguous(), labels.contiguous()
        losses, sums = forward(logits, labels)
        ctx.save_for_backward(logits, labels, sums)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        from mixtral_run.model.kernels.loss.cross_entropy_triton import backward

        logits, labels, sums = ctx.saved_tensors
        return backward(logits, labels, sums, gradients[0].contiguous()), None
