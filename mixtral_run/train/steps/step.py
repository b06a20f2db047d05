"""One optimizer step: forward and backward, gradients summed over the right groups, clipped, applied.

The loss (objective.py) is a sum over the global batch divided by the number of what counts in it, by default of its
response tokens, so that gradients and losses are the same in every layout and for every micro batch size.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.launch.heartbeat import note_progress
from mixtral_run.model.adapters.trained_also import is_norm
from mixtral_run.model.dispatch.base import TokenDispatcher
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, sum_over
from mixtral_run.model.parallel.param_sharding import is_expert, is_partial, is_shared, is_split
from mixtral_run.train.data.samples import GlobalBatch, MicroBatch
from mixtral_run.train.steps.adapter_adamw import AdapterAdamW, apply_gradients
from mixtral_run.train.steps.exchange import GradientExchange
from mixtral_run.train.steps.objective import NextToken, Objective, backward, parts_of, token_losses

MOST_SHORT = 3
"""Consecutive steps that exceeded the dispatch's capacity, after which all further steps use all-to-all."""

BUCKET_BYTES = 256 * 1024**2
"""Gradients are summed over ranks in buckets of about this size."""


@dataclass(frozen=True)
class StepResult:
    """Result of the whole job, the same on every rank. loss: mean over the `num_tokens` response tokens.

    taken: False if the step was refused and changed nothing. figures: of the objective.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    taken: bool = True
    figures: Mapping[str, float] = field(default_factory=dict)


Refuses = Callable[[float, float], bool]
"""Decides by loss and gradient norm, alike on all ranks, that a step is not taken. All ranks call it."""


class Step(Protocol):
    """One step at a learning rate over this rank's part of a global batch. All ranks must call."""

    def __call__(self, batch: GlobalBatch, rate: float) -> StepResult: ...


class Backward(ABC):
    """Forward and backward pass of a micro batch. num_retaken: steps that `was_whole` had taken again.

    dispatcher: the exchange with experts of other ranks; None for the layers' own, which has no limit of capacity.
    objective: the loss; the cross entropy of the response tokens by default.
    exchange: sums gradients over ranks while the last pass of a step runs; None to sum them after it.
    """

    def __init__(
        self,
        model: MixtralModel,
        dispatcher: TokenDispatcher[Any] | None = None,
        objective: Objective | None = None,
        exchange: GradientExchange | None = None,
    ) -> None:
        assert exchange is None or dispatcher is None, (
            "a step that may be taken again sums its gradients after the pass"
        )
        self.model = model
        self.dispatcher = dispatcher
        self.objective = objective or NextToken()
        self.exchange = exchange
        self.num_short = 0
        self.num_retaken = 0

    @abstractmethod
    def __call__(self, micro: MicroBatch, num_loss_tokens: int) -> Tensor:
        """Add one micro batch's gradients. Return its part of the loss and its sums, [1 + sums] on the device."""

    def evaluated(self, micro: MicroBatch) -> Tensor:
        """Return the cross entropy of each label, fp32 [rows, sequence] on the device. Another call may overwrite it.

        The model is in evaluation mode, and gradients are disabled. All ranks must call.
        """
        return token_losses(self.model, micro, count_choices=False)

    def was_whole(self) -> bool:
        """Return True if no dispatch since the last call exceeded its capacity. All ranks must call.

        Otherwise the gradients are wrong.
        """
        whole = self.dispatcher is None or not self.dispatcher.overflowed(self.model.mesh)
        self.num_retaken += not whole
        self.num_short = 0 if whole else self.num_short + 1
        return whole


class EagerBackward(Backward):
    """The eager pass."""

    def __call__(self, micro: MicroBatch, num_loss_tokens: int) -> Tensor:
        balance = self.model.router_loss
        weights = micro.loss_mask.to(self.model.mesh.device).float() / num_loss_tokens
        with balance.counting(weights) if balance is not None else nullcontext():
            parts = parts_of(self.model, micro, self.objective, num_loss_tokens, self.dispatcher)
        exchange = self.exchange
        with exchange.watching(starts=exchange.is_last) if exchange is not None else nullcontext():
            return backward(parts, balance)


def losses_of(model: MixtralModel, micro: MicroBatch, dispatcher: TokenDispatcher[Any] | None = None) -> Tensor:
    """Return the sum of a micro batch's losses under its mask, an fp32 scalar on the device.

    dispatcher: of this pass; None for the layers' own. All ranks must call.
    """
    return (token_losses(model, micro, dispatcher) * micro.loss_mask.to(model.mesh.device)).sum()


LR_RATIO = "lr_ratio"
"""Key of a parameter group: its learning rate as a multiple of the schedule's."""


def adapter_optimizer(model: MixtralModel, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Return AdamW over the adapters, and over the weights of the base that are trained with them.

    With --lora-plus-ratio, B is a group with a learning rate of its own. Norms have no weight decay: it would pull them
    to 0 from 1.
    """
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    norms = [each for name, each in named if is_norm(name)]
    others = [(name, each) for name, each in named if not is_norm(name)]
    groups: list[dict[str, Any]] = [{"params": [each for _, each in others]}]
    if config.lora_plus_ratio != 1:
        groups = [
            {"params": [each for name, each in others if ".linear_out" not in name]},
            {"params": [each for name, each in others if ".linear_out" in name], LR_RATIO: config.lora_plus_ratio},
        ]
    groups += [{"params": norms, "weight_decay": 0.0}] if norms else []
    return AdapterAdamW(groups, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999), fused=True)


def optimizer_step(
    model: MixtralModel,
    optimizer: torch.optim.Optimizer,
    clip_grad: float,
    backward: Backward | None = None,
    refuses: Refuses | None = None,
) -> Step:
    """Return `train_step` as a Step."""

    def step(batch: GlobalBatch, rate: float) -> StepResult:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get(LR_RATIO, 1.0)
        return train_step(model, optimizer, batch, clip_grad, backward, refuses)

    return step


def train_step(
    model: MixtralModel,
    optimizer: torch.optim.Optimizer,
    batch: GlobalBatch,
    clip_grad: float,
    backward: Backward | None = None,
    refuses: Refuses | None = None,
) -> StepResult:
    """Take one step over this rank's part of a global batch. All ranks must call.

    Args:
        backward: the pass over a micro batch. Default: eager, with all-to-all dispatch.
        refuses: asked before the optimizer changes anything, which waits for the GPU. Default: every step is taken.
    """
    mesh = model.mesh
    # The same as `trainable`, whose search through the model would let the GPU wait for a millisecond.
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if backward is None or backward.num_short >= MOST_SHORT:
        backward = EagerBackward(model, objective=backward.objective if backward is not None else None)
    objective, exchange = backward.objective, backward.exchange
    objective.prepare(model, batch.micro_batches, batch.num_loss_tokens, batch.num_text_tokens, backward.evaluated)
    total = gradients_of(batch, parameters, backward)
    if not backward.was_whole():
        total = gradients_of(batch, parameters, EagerBackward(model, objective=objective))
    if model.router_counts is not None:
        model.router_counts.end_step()
    if exchange is not None:
        exchange.wait()
    else:
        sum_gradients(parameters, mesh)
    norm = gradient_norm(parameters, mesh)
    read = begin_reading(torch.cat((sum_over(total, mesh.data_group), norm.double().reshape(1))))
    result: StepResult | None = None
    if refuses is not None:
        result = result_of(read(), batch, objective)
        if refuses(result.loss, result.grad_norm):
            return dataclasses.replace(result, taken=False)
    factor = (clip_grad / (norm + 1e-6)).clamp(max=1.0).float() if clip_grad > 0 else None
    apply_gradients(optimizer, factor)
    # The GPU may still be at the optimizer while the host prepares the next step.
    return result or result_of(read(), batch, objective)


def begin_reading(found: Tensor) -> Callable[[], list[float]]:
    """Begin to copy numbers to the host. Return a function that waits for them, but not for what follows on the GPU."""
    if not found.is_cuda:
        return found.tolist
    # Only a copy to pinned memory does not let the host wait here.
    copy = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
    ready = torch.cuda.current_stream(found.device).record_event()

    def read() -> list[float]:
        ready.synchronize()
        numbers: list[float] = copy.tolist()
        return numbers

    return read


def result_of(found: Sequence[float], batch: GlobalBatch, objective: Objective) -> StepResult:
    """Return the result of a step. found: its loss, the objective's sums, and the norm of the gradient."""
    mean_loss, *sums, grad_norm = found
    return StepResult(mean_loss, grad_norm, batch.num_loss_tokens, figures=objective.figures(sums))


def gradients_of(batch: GlobalBatch, parameters: Sequence[torch.nn.Parameter], backward: Backward) -> Tensor:
    """Compute the gradients of a batch. Return this rank's part of the loss and sums, fp64. All ranks must call."""
    # The first micro batch sets the gradients; adding to zeros would write and read them for nothing.
    for parameter in parameters:
        parameter.grad = None
    if backward.model.router_counts is not None:
        backward.model.router_counts.begin_step()
    exchange = backward.exchange
    if exchange is not None:
        exchange.begin_step()
    total = torch.zeros(1, dtype=torch.float64, device=backward.model.mesh.device)
    for number, micro in enumerate(batch.micro_batches, start=1):
        if exchange is not None:
            exchange.begin_pass(is_last=number == len(batch.micro_batches))
        total = total + backward(micro, batch.num_loss_tokens)
        note_progress()
    return total


def trainable(model: MixtralModel) -> list[torch.nn.Parameter]:
    """Return the parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sum_gradients(parameters: Sequence[torch.nn.Parameter], mesh: Mesh) -> None:
    """Sum every gradient over the ranks that share its parameter. All ranks must call.

    Experts: over the ranks that hold the same experts. What all experts share: over all ranks. Other parameters: over
    data-parallel replicas, and also over TP if a replicated parameter saw only its rank's part of the sequence. A
    parameter that no token reached gets zeros.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    experts = [_gradient(each) for each in parameters if is_expert(each)]
    partial = [_gradient(each) for each in parameters if is_partial(each)]
    dense = [_gradient(each) for each in parameters if not is_expert(each) and not is_shared(each)]
    shared = [_gradient(each) for each in parameters if is_shared(each)]
    _sum_all(experts, mesh.expert_data_group)
    # Both together are all ranks.
    _sum_all(shared, mesh.expert_group)
    _sum_all(shared, mesh.expert_data_group)
    _sum_all(partial, mesh.tensor_group)
    _sum_all(dense, mesh.data_group)


def gradient_norm(parameters: Sequence[torch.nn.Parameter], mesh: Mesh) -> Tensor:
    """Return the L2 norm of the model's gradient, fp32 scalar, each parameter counted once. All ranks must call."""
    return norm_of(squared_gradients(parameters, mesh.device), mesh)


def squared_gradients(parameters: Sequence[torch.nn.Parameter], device: torch.device) -> dict[str, Tensor]:
    """Return the sums of this rank's squared gradients, fp32 scalars by kind of sharding. Rank-local."""
    grouped: dict[str, list[Tensor]] = {"experts": [], "split": [], "replicated": []}
    for parameter in parameters:
        kind = "experts" if is_expert(parameter) else "split" if is_split(parameter) else "replicated"
        grouped[kind].append(_gradient(parameter))
    return {
        kind: torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum()
        if gradients
        else torch.zeros((), device=device)
        for kind, gradients in grouped.items()
    }


def norm_of(squares: dict[str, Tensor], mesh: Mesh) -> Tensor:
    """Reduce the sums of `squared_gradients` in place to the norm, fp32 scalar. All ranks must call."""
    sum_over(squares["experts"], mesh.expert_group)
    sum_over(squares["split"], mesh.tensor_group)
    return torch.stack(tuple(squares.values())).sum().sqrt()


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _sum_all(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    if group.size() == 1:
        return
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size >= BUCKET_BYTES or gradient.dtype is not bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
    if bucket:
        yield bucket
