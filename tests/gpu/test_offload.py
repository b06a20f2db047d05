"""Inputs of layers in pinned memory: steps equal to full recomputation bit by bit, also when the host runs ahead."""

import gc

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.parallel.mesh import open_mesh, seed_everything
from mixtral_run.model.recompute.offload import Offload
from mixtral_run.train.data.samples import MockSamples, batches
from mixtral_run.train.steps.step import StepResult, train_step, trainable
from tests.gpu.kernels.test_kernels import small_model

LAYERS = 8


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base_precision", ["bf16", "fp8"])
def test_steps_are_those_of_full_recomputation(base_precision: str, dropout: float) -> None:
    """Four micro batches a step: nothing waits for the GPU between them, and buffers are written to again."""
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    runs: list[tuple[list[StepResult], list[torch.Tensor]]] = []
    with open_mesh(config) as mesh:
        for recompute in ("full", "offload"):
            model = small_model(mesh, "none", base_precision, LAYERS, dropout)
            for layer in model.gpt.decoder.layers:
                layer.recompute = recompute
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
            stream = batches(MockSamples(1024, 128, 1), seed=1, micro_batch_size=8, global_batch_size=32)
            seed_everything(3, 0)
            results = [train_step(model, optimizer, next(stream), 1.0) for _ in range(3)]
            runs.append((results, [each.detach().clone() for each in trainable(model)]))
            offload = model.gpt.decoder.layers[0].offload
            gc.collect()
            assert offload.num_spare == (LAYERS if recompute == "offload" else 0)
            assert all(buffer.is_pinned() for buffer in offload._spare)
    (expected, weights), (found, other_weights) = runs
    assert found == expected
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(other_weights, weights, strict=True))
    assert expected[0].loss != expected[-1].loss


def test_copies_keep_their_order_while_the_gpu_is_far_behind() -> None:
    """The host gives memory and buffers away before the GPU has written or read them."""
    offload = Offload(torch.device("cuda", torch.cuda.current_device()))
    size = 16 * 1024**2
    torch.cuda.synchronize()
    for turn in range(3):
        torch.cuda._sleep(200_000_000)
        saved = []
        for number in range(6):
            # Each takes the memory that the one before left, as soon as the allocator has it again.
            tensor = torch.full((size,), float(10 * turn + number), device="cuda")
            saved.append(offload._keep(tensor))
            del tensor
        sums = []
        for number in reversed(range(6)):
            tensor = saved.pop().take()
            sums.append(((tensor - float(10 * turn + number)).abs().max(), number))
            del tensor
        assert [(float(error), number) for error, number in sums if float(error) != 0] == []
    assert offload.num_spare == 6


def test_no_more_than_two_stay_on_the_gpu() -> None:
    offload = Offload(torch.device("cuda", torch.cuda.current_device()))
    mib = 1024**2
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    saved = []
    for number in range(8):
        saved.append(offload._keep(torch.full((8 * mib,), float(number), device="cuda")))
        assert torch.cuda.memory_allocated() - before <= 32 * mib
    while saved:
        given = saved.pop().take()
        assert torch.cuda.memory_allocated() - before <= 2 * 32 * mib
        del given
    assert torch.cuda.memory_allocated() == before
    # While one is made the one before is still leaving.
    assert torch.cuda.max_memory_allocated() - before <= 2 * 32 * mib
