"""One step of full fine-tuning: forward and backward pass, gradients reduced to slices, clipped, applied."""

from __future__ import annotations

import dataclasses

import torch

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import sum_over
from mixtral_run.train.data.samples import GlobalBatch
from mixtral_run.train.full.sharded_adamw import ShardedAdamW
from mixtral_run.train.steps.step import EagerBackward, Refuses, Step, StepResult, gradients_of, result_of


def full_step(model: MixtralModel, optimizer: ShardedAdamW, clip_grad: float, refuses: Refuses | None = None) -> Step:
    """Return a step over all weights.

    Args:
        clip_grad: largest norm of the gradient; 0 turns clipping off.
        refuses: asked before the optimizer changes anything. Default: every step is taken.
    """
    backward = EagerBackward(model)
    parameters = [each.parameter for each in optimizer.slices]

    def step(batch: GlobalBatch, rate: float) -> StepResult:
        optimizer.begin()
        total = gradients_of(batch, parameters, backward)
        if model.router_counts is not None:
            model.router_counts.end_step()
        norm = optimizer.reduce_gradients()
        found = torch.cat((sum_over(total, model.mesh.data_group), norm.double().reshape(1)))
        result = result_of(found.tolist(), batch, backward.objective)
        if refuses is not None and refuses(result.loss, result.grad_norm):
            optimizer.begin()
            return dataclasses.replace(result, taken=False)
        factor = (clip_grad / (norm + 1e-6)).clamp(max=1.0).float() if clip_grad > 0 else None
        optimizer.step(rate, factor)
        return result

    return step
