"""What a run minimizes: from the losses of a micro batch's tokens to its part of the loss of the global batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.attention.packed_attention import Packed, PackedSizes
from mixtral_run.model.dispatch.base import TokenDispatcher
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.routing.router_loss import RouterLoss
from mixtral_run.train.data.samples import MicroBatch

Losses = Callable[[MicroBatch], Tensor]
"""Returns the cross entropy of each label, fp32 [rows, sequence] on the device. Another call may overwrite it."""


class Objective(ABC):
    """A loss over the tokens of a global batch. The pass over a micro batch computes its parts.

    A pass that is captured as a CUDA graph needs inputs of the same shapes in all micro batches.
    """

    def prepare(
        self,
        model: MixtralModel,
        micros: Iterable[MicroBatch],
        count: int,
        num_text_tokens: int,
        losses_of: Losses | None = None,
    ) -> None:
        """Prepare for the passes over a global batch. All ranks must call.

        Args:
            model: before the step.
            micros: this rank's micro batches.
            count: by which the loss of the global batch is divided, on all ranks together.
            num_text_tokens: `GlobalBatch.num_text_tokens`.
            losses_of: forward pass of a model that is evaluated. Default: eager.
        """
        del model, micros, count, num_text_tokens, losses_of

    @abstractmethod
    def inputs(self, micro: MicroBatch, count: int, most: PackedSizes | None = None) -> list[Tensor]:
        """Return the tensors that `parts` needs, on the host or the device.

        Args:
            micro: the micro batch.
            count: by which the loss of the global batch is divided.
            most: the largest sizes of the run's packed rows, if all micro batches must have tensors of the same shapes.

        Returns:
            The tensors. The first one is 0 where a token does not count.
        """

    @abstractmethod
    def parts(self, losses: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Return the micro batch's part of the loss of the global batch, and sums for `figures`: [1 + sums].

        Args:
            losses: cross entropy of each label, fp32 [rows, sequence].
            inputs: of the micro batch, on the device.
        """

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Return figures of a global batch, by name, from the sums over all of its micro batches."""
        del sums
        return {}


class NextToken(Objective):
    """The mean cross entropy of the tokens that are learned."""

    def inputs(self, micro: MicroBatch, count: int, most: PackedSizes | None = None) -> list[Tensor]:
        del most
        return [micro.loss_mask / count]

    def parts(self, losses: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        return (losses * inputs[0]).sum().reshape(1)


def backward(parts: Tensor, balance: RouterLoss | None) -> Tensor:
    """Run the backward pass of a micro batch. Return its parts, the first of them with the routers' loss.

    Args:
        parts: of an objective, [1 + sums], with a gradient.
        balance: the routers' loss, which has counted the forward pass; None without one. All ranks must call.
    """
    loss = parts[0] if balance is None else parts[0] + balance.value()
    loss.backward()
    return torch.cat((loss.detach().reshape(1), parts[1:].detach()))


def parts_of(
    model: MixtralModel,
    micro: MicroBatch,
    objective: Objective,
    count: int,
    dispatcher: TokenDispatcher[Any] | None = None,
) -> Tensor:
    """Return `Objective.parts` of a micro batch. dispatcher: as for `token_losses`. All ranks must call."""
    inputs = [each.to(model.mesh.device) for each in objective.inputs(micro, count)]
    return objective.parts(token_losses(model, micro, dispatcher), inputs)


def token_losses(
    model: MixtralModel,
    micro: MicroBatch,
    dispatcher: TokenDispatcher[Any] | None = None,
    *,
    count_choices: bool = True,
) -> Tensor:
    """Return the cross entropy of each label of a micro batch, fp32 [rows, sequence] on the device.

    All ranks must call.

    Args:
        model: in any mode.
        micro: the micro batch.
        dispatcher: of this pass; None for the layers' own.
        count_choices: count the routers' choices of this pass, if the model counts them.
    """
    device = model.mesh.device
    packed = Packed.of(micro.lengths, device) if micro.lengths is not None else None
    positions = micro.position_ids.to(device) if packed is not None else None
    tokens, labels = micro.tokens.to(device), micro.labels.to(device)
    counts = model.router_counts if count_choices else None
    with counts.counting(micro.loss_mask.to(device)) if counts is not None else nullcontext():
        return model.losses(tokens, labels, positions=positions, packed=packed, dispatcher=dispatcher)
