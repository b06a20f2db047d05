"""Layers that run again except attention: the steps of full recomputation bit by bit, from fresh random inputs."""

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.attention.packed_attention import PackedSizes
from mixtral_run.model.parallel.mesh import Mesh, open_mesh, seed_everything
from mixtral_run.train.data.samples import GlobalBatch, MicroBatch, MockSamples, batches
from mixtral_run.train.steps.cuda_graph import CapturedBackward, backward_of
from mixtral_run.train.steps.step import EagerBackward, StepResult, train_step, trainable
from tests.gpu.kernels.test_kernels import small_model

LAYERS, LENGTH, VOCABULARY = 4, 128, 1024
CONFIG = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")


def steps_of(
    mesh: Mesh, recompute: str, layers: int | None, seed: int, *, precision: str = "bf16", captured: bool = True
) -> tuple[list[StepResult], list[torch.Tensor]]:
    """Return three steps of two micro batches, and the adapters and their gradients afterwards."""
    model = small_model(mesh, "none", precision, LAYERS, 0.0 if captured else 0.3)
    model.recompute(recompute, layers)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
    stream = batches(MockSamples(VOCABULARY, LENGTH, seed), seed=seed, micro_batch_size=4, global_batch_size=8)
    seed_everything(seed, 0)
    with backward_of(model, 4 * LENGTH, captured=captured) as backward:
        assert isinstance(backward, CapturedBackward) == captured
        results = [train_step(model, optimizer, next(stream), 1.0, backward) for _ in range(3)]
        tensors = [tensor.detach().clone() for each in trainable(model) for tensor in (each, each.grad)]
    return results, tensors


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("layers", [None, 2])
def test_steps_are_those_of_full_recomputation(precision: str, captured: bool, layers: int | None) -> None:
    """Without a CUDA graph also with dropout."""
    seed = torch.seed() % 2**31
    with open_mesh(CONFIG) as mesh:
        for again in ("full", "offload"):
            if again == "offload" and captured:
                continue
            expected, tensors = steps_of(mesh, again, layers, seed, precision=precision, captured=captured)
            found, others = steps_of(mesh, "except-attention", layers, seed, precision=precision, captured=captured)
            assert found == expected, seed
            assert found[0].loss != found[-1].loss
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(others, tensors, strict=True)), seed


class Operators(TorchDispatchMode):
    """Counts the operators of attention that run forward, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if ("attention" in name or "attn" in name) and "backward" not in name:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_attention_runs_once_and_keeps_its_result_alone(packed: bool) -> None:
    """Whole rows take cuDNN's or flash attention, packed ones variable-length attention."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    length, lengths = 1024, (1, 500, 300, 223)
    tokens, labels = (torch.randint(0, VOCABULARY, (2, length), generator=generator) for _ in range(2))
    positions = torch.cat([torch.arange(each) for each in lengths]).expand(2, -1)
    micro = MicroBatch(tokens, labels, torch.ones(2, length), positions, (lengths, lengths) if packed else None)
    if not packed:
        micro = MicroBatch(tokens, labels, torch.ones(2, length), torch.arange(length).expand(2, -1))
    held, gradients, names = {}, {}, {}
    with open_mesh(CONFIG) as mesh:
        model = small_model(mesh, "none", "bf16", LAYERS)
        for mode in ("full", "except-attention"):
            model.recompute(mode)
            for each in trainable(model):
                each.grad = None
            gc.collect()
            with Operators() as operators:
                EagerBackward(model)(micro, 2 * length)
            names[mode] = operators.names
            gradients[mode] = [each.grad.clone() for each in trainable(model) if each.grad is not None]
            whole = tokens.cuda()
            before = torch.cuda.memory_allocated()
            losses = model.losses(whole, whole)
            held[mode] = torch.cuda.memory_allocated() - before
            del losses
    (name,) = names["full"]
    assert names == {"full": {name: 2 * LAYERS}, "except-attention": {name: LAYERS}}
    assert ("varlen" in name) == packed
    # 8 heads of 64 numbers in bf16, and log-sum-exps in fp32; states of random numbers take a block each.
    more = held["except-attention"] - held["full"]
    assert 0 <= more - LAYERS * 2 * length * 8 * (64 * 2 + 4) <= LAYERS * 4096
    for mine, theirs in zip(gradients["except-attention"], gradients["full"], strict=True):
        # The backward pass of attention over several blocks adds in any order.
        assert float((mine - theirs).norm()) <= 1e-2 * float(theirs.norm())


def test_a_step_of_packed_rows_is_captured() -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    tokens, labels = (torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator) for _ in range(2))
    positions = torch.cat([torch.arange(60), torch.arange(68)])[None]
    batch = GlobalBatch((MicroBatch(tokens, labels, torch.ones(1, LENGTH), positions, ((60, 68),)),), LENGTH, 1)
    losses = {}
    with open_mesh(CONFIG) as mesh:
        for mode in ("full", "except-attention"):
            model = small_model(mesh, "none", "bf16", LAYERS)
            model.recompute(mode)
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
            with backward_of(model, LENGTH, most=PackedSizes(3, LENGTH)) as backward:
                assert isinstance(backward, CapturedBackward)
                losses[mode] = [train_step(model, optimizer, batch, 1.0, backward).loss for _ in range(3)]
    assert losses["full"] == losses["except-attention"] and losses["full"][0] != losses["full"][-1]
