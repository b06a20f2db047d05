"""Forward and backward of a micro batch as one CUDA graph.

A layer launches some two hundred kernels; at 512 tokens the host needs longer to launch them than the GPU to run them.
A graph is recorded once and replayed. That needs fixed shapes and no wait for the GPU in between: dispatch over EP
waits for its counts, so a graph is for layouts in which every process holds all experts and whole layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral_run.config import RUNS_AGAIN
from mixtral_run.model.build import MixtralModel
from mixtral_run.model.grouped import has_grouped_product
from mixtral_run.train.data import MicroBatch
from mixtral_run.train.step import trainable

WARM_UP = 2
"""Runs before recording: kernels are compiled and libraries set up outside the graph."""


def can_record(model: MixtralModel) -> bool:
    """Whether this model's pass over a micro batch never waits for the GPU. A layer that runs again does: it reads
    the state of the random numbers."""
    here = model.processes
    probe = torch.empty(1, dtype=model.settings.dtype, device=here.device)
    rank = model.settings.lora.rank if model.settings.lora is not None else 8
    return (
        here.device.type == "cuda"
        and model.settings.recompute not in RUNS_AGAIN
        and here.tensor_size == here.expert_size == 1
        and has_grouped_product(probe, model.architecture.hidden_size, model.architecture.ffn_hidden_size, rank)
    )


class RecordedBackward:
    """As `eager_backward`, recorded at the first call. The trainable parameters' gradients stay where they are."""

    def __init__(self, model: MixtralModel) -> None:
        self._model = model
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._loss: Tensor | None = None

    def __call__(self, micro: MicroBatch, num_loss_tokens: int) -> Tensor:
        weights = micro.loss_mask / num_loss_tokens
        if self._graph is None:
            self._record(micro, weights)
        assert self._graph is not None and self._inputs is not None and self._loss is not None
        for held, new in zip(self._inputs, (micro.tokens, micro.labels, weights), strict=True):
            held.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._loss

    def _record(self, micro: MicroBatch, weights: Tensor) -> None:
        device = self._model.processes.device
        self._inputs = (micro.tokens.to(device), micro.labels.to(device), weights.to(device))
        parameters = trainable(self._model)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        kept = [gradient.clone() for gradient in gradients]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._pass()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._pass()
        # Warming up and recording left their gradients: back to what was there.
        torch._foreach_copy_(gradients, kept)
        self._graph = graph

    def _pass(self) -> Tensor:
        assert self._inputs is not None
        tokens, labels, weights = self._inputs
        loss = (self._model.losses(tokens, labels) * weights).sum()
        loss.backward()
        return loss.detach()
