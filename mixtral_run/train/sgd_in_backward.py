"""A step of full training that is taken within the backward pass, so that no more than a layer's gradients are there.

Kept until the end, the gradients of all weights need as much memory as the weights. SGD without momentum needs a
gradient once: as soon as a layer's are whole they are summed over processes, applied and dropped. What needs all of
them first cannot go this way: several micro batches an iteration, and clipping by their common norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import sum_over
from mixtral_run.train.data.samples import GlobalBatch
from mixtral_run.train.step import EagerBackward, StepResult, norm_of, squared_gradients, sum_gradients, trainable


class SgdInBackward:
    """SGD without state over all of a model's trainable weights. Gradients are freed layer by layer."""

    def __init__(self, model: MixtralModel, weight_decay: float) -> None:
        self._model = model
        self._weight_decay = weight_decay
        self._rate = 0.0
        self._squares: list[dict[str, Tensor]] = []
        self._rest: list[torch.nn.Parameter] = []
        self.peak_gradient_bytes = 0
        """Most bytes of gradients of one piece so far."""
        self._watch()

    def step(self, batch: GlobalBatch, rate: float) -> StepResult:
        """Take one step over this rank's share of a global batch: one micro batch. All ranks must call."""
        (micro,) = batch.micro_batches
        mesh = self._model.mesh
        self._rate, self._squares = rate, []
        loss = EagerBackward(self._model)(micro, batch.num_loss_tokens).double()
        self._apply(self._rest)
        totals = {kind: torch.stack([each[kind] for each in self._squares]).sum() for kind in self._squares[0]}
        norm = norm_of(totals, mesh)
        mean_loss, grad_norm = torch.stack((sum_over(loss, mesh.data_group), norm.double())).tolist()
        return StepResult(mean_loss, grad_norm, batch.num_loss_tokens)

    def _watch(self) -> None:
        """Apply a piece when the last of its gradients is there.

        That is its first norm's: all else of the layer comes before it in the backward pass. All ranks come by there
        at the same place between their other exchanges, also one whose experts got no token.
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
