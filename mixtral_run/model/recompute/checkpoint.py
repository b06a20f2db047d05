"""torch's activation checkpointing without the wrapper that is for torch's compiler, and the input that it needs.

The wrapper imports the compiler at the first call, a second and more, in order to tell it not to compile the function.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint

checkpoint: Any = inspect.unwrap(torch_checkpoint.checkpoint)


def with_gradient(tensor: Tensor) -> Tensor:
    """Return the tensor as one that requires a gradient, which is then dropped: reentrant checkpointing needs such an
    input.

    `tensor.detach().requires_grad_()` would be a leaf. Autograd's graph holds its leaves, so that offloading what is
    saved would not free its memory, and the backward pass would keep its gradient.
    """
    result: Tensor = _WithGradient.apply(tensor, tensor.new_empty(0, requires_grad=True))  # type: ignore[no-untyped-call]
    return result


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor, _leaf: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(_: Any, *_gradients: Tensor) -> tuple[None, None]:
        return None, None
