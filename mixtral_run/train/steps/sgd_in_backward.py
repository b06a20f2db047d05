"""An optimizer step of full training within the backward pass, so that only one layer's gradients exist at a time.

The gradients of all weights together need as much memory as the weights. SGD without momentum needs each gradient only
once: as soon as a layer's gradients are complete they are summed over ranks, applied and freed. Several micro batches
an iteration, or clipping by the global norm, need all gradients first and cannot use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import sum_over
from mixtral_run.train.data.samples import GlobalBatch
from mixtral_run.train.steps.step import EagerBackward, StepResult, norm_of, squared_gradients, sum_gradients, trainable


class SgdInBackward:
    """SGD without state over all of a model's trainable weights. Gradients are freed layer by layer."""

    def __init__(self, model: MixtralModel, weight_decay: float) -> None:
        self._model = model
        self._weight_decay = weight_decay
        self._rate = 0.0
        self._squares: list[dict[str, Tensor]] = []
        self._rest: list[torch.nn.Parameter] = []
        self.peak_gradient_bytes = 0
        """Largest size of one piece's gradients so far, in bytes."""
        self._watch()

    def step(self, batch: GlobalBatch, rate: float) -> StepResult:
        """Take one step over this rank's share of a global batch: one micro batch. All ranks must call."""
        (micro,) = batch.micro_batches
        mesh = self._model.mesh
        self._rate, self._squares = rate, []
        loss = EagerBackward(self._model)(micro, batch.num_loss_tokens)[0].double()
        self._apply(self._rest)
        totals = {kind: torch.stack([each[kind] for each in self._squares]).sum() for kind in self._squares[0]}
        norm = norm_of(totals, mesh)
        mean_loss, grad_norm = torch.stack((sum_over(loss, mesh.data_group), norm.double())).tolist()
        return StepResult(mean_loss, grad_norm, batch.num_loss_tokens)

    def _watch(self) -> None:
        """Apply the gradients of a piece, such as a layer, when the last of them is complete.

        The last is that of the layer's first norm: everything else in the layer precedes it in the backward pass. All
        ranks reach it at the same point between their other collectives, even a rank whose experts got no token.
        """
        gpt = self._model.gpt
        pieces: list[tuple[torch.nn.Parameter, Sequence[torch.nn.Module]]] = [
            (layer.input_layernorm.weight, (layer,)) for layer in gpt.decoder.layers
        ]
        pieces.append((gpt.decoder.final_layernorm.weight, (gpt.decoder.final_layernorm, gpt.output_layer)))
        watched: set[torch.nn.Parameter] = set()
        for last, modules in pieces:
            parameters = [each for module in modules for each in module.parameters()]
            watched.update(parameters)
            last.register_post_accumulate_grad_hook(lambda _, piece=parameters: self._apply(piece))
        self._rest = [each for each in trainable(self._model) if each not in watched]

    @torch.no_grad()
    def _apply(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        mesh = self._model.mesh
        sum_gradients(parameters, mesh)
        gradients = [each.grad for each in parameters if each.grad is not None]
        size = sum(each.numel() * each.element_size() for each in gradients)
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, size)
        self._squares.append(squared_gradients(parameters, mesh.device))
        weights = [each.data for each in parameters]
        torch._foreach_mul_(weights, 1 - self._rate * self._weight_decay)
        torch._foreach_add_(weights, gradients, alpha=-self._rate)
        for parameter in parameters:
            parameter.grad = None
