"""Run under torchrun: eager steps that dispatch by all-to-all, and captured steps that dispatch through symmetric
memory and by all-gather, in several layouts, written as JSON.

torchrun … captured_worker.py OUT.json TPxEP:RECOMPUTE:PRECISION …
"""

from __future__ import annotations

import torch

from benchmarks.lora import exchanged_by
from mixtral_run.model.dispatch.all_gather import AllGatherDispatcher
from mixtral_run.model.dispatch.symmetric_memory import SymmetricMemoryDispatcher
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.train.data.samples import MockSamples, batches
from mixtral_run.train.steps.cuda_graph import CapturedBackward, backward_of, execution_of
from mixtral_run.train.steps.step import EagerBackward, train_step, trainable
from tests.gpu.kernels.test_kernels import SEQ_LENGTH, small_model
from tests.gpu.workers.cases import run_cases

STEPS = 6


def train(mesh: Mesh, recompute: str, precision: str, way: str) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step of two micro batches."""
    model = small_model(mesh, recompute, precision)
    assert execution_of(model, 2 * SEQ_LENGTH).captured
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
    stream = batches(
        MockSamples(1024, SEQ_LENGTH, 1),
        seed=1,
        micro_batch_size=2,
        global_batch_size=8,
        data_parallel_rank=mesh.data_rank,
        data_parallel_size=mesh.data_size,
    )
    captured = way != "eager"
    with (
        exchanged_by(collectives=way == "all-gather"),
        backward_of(model, 2 * SEQ_LENGTH, captured=captured) as backward,
    ):
        assert isinstance(backward, CapturedBackward) == captured
        if captured and mesh.expert_size > 1:
            kind = SymmetricMemoryDispatcher if way == "symmetric memory" else AllGatherDispatcher
            assert isinstance(backward.dispatcher, kind)
        if not captured:
            backward = EagerBackward(model)
        results = [train_step(model, optimizer, next(stream), 1.0, backward) for _ in range(STEPS)]
    return [(result.loss, result.grad_norm) for result in results]


def run(mesh: Mesh, recompute: str, precision: str) -> list[list[tuple[float, float]]]:
    """Return the steps of each way, the eager one first."""
    return [train(mesh, recompute, precision, way) for way in ("eager", "symmetric memory", "all-gather")]


if __name__ == "__main__":
    run_cases(run)
