"""A forward pass without gradients as a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.train.data.samples import MicroBatch


class CapturedLosses:
    """The forward pass of micro batches of one shape, to the cross entropy of each label. All ranks must construct one.

    The graph reads the adapters' values when it is replayed, so that it computes by the model as it is then.
    """

    def __init__(self, model: MixtralModel, micro: MicroBatch, pool: Any) -> None:
        """Capture the pass. It must have run eagerly before, which compiles its kernels.

        Args:
            model: in evaluation mode, with gradients disabled.
            micro: a micro batch whose rows are not packed.
            pool: memory of other graphs. They must not run at the same time, and what they leave there must be held.
        """
        assert not model.training and not torch.is_grad_enabled(), "the pass is that of a model that is evaluated"
        self._model, device = model, model.mesh.device
        self._inputs = [each.to(device, copy=True) for each in (micro.tokens, micro.labels)]
        model.refresh_adapters()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._losses = model.losses(*self._inputs)

    def __call__(self, micro: MicroBatch) -> Tensor:
        """Return the losses of the labels, fp32 [rows, sequence], which the next call overwrites."""
        copy_into(self._inputs, (micro.tokens, micro.labels))
        # The optimizer has changed the adapters. The graph reads their copies, and need not contain their update.
        self._model.refresh_adapters()
        self._graph.replay()
        return self._losses

    def release(self) -> None:
        """Free the graph. The GPU must have finished it."""
        self._graph.reset()


def copy_into(static: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Copy the inputs of a pass into those that its graph reads, without waiting for the GPU."""
    for inputs, values in zip(static, new, strict=True):
        inputs.copy_(pinned(values, inputs.device), non_blocking=True)


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor from which the driver copies to a GPU at once.

    From other memory of the host it may copy only after all that the GPU was given before.
    """
    return values.pin_memory() if device.type == "cuda" and not values.is_cuda else values
