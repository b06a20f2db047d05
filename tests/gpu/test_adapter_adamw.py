"""The optimizer's kernel next to torch's fused AdamW: tensors alone, and the steps of a model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.adapters.cast_adapters import cast_copy, refresh
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.train.data.samples import MockSamples, batches
from mixtral_run.train.steps.adapter_adamw import AdapterAdamW, apply_gradients
from mixtral_run.train.steps.cuda_graph import backward_of
from mixtral_run.train.steps.step import StepResult, train_step, trainable
from tests.gpu.kernels.test_kernels import SEQ_LENGTH, small_model

STEPS = 20
SHAPES = ((16, 4096), (6144, 16), (8, 16, 4096), (3, 5), (1,), (8197,), (8192,))
MOMENTS = ("exp_avg", "exp_avg_sq")
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}


def groups_of(tensors: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": tensors[:2]},
        {"params": tensors[2:5], "weight_decay": 0.0},
        {"params": tensors[5:], "betas": (0.8, 0.99), "eps": 1e-3},
    ]


@pytest.mark.parametrize("clips", [True, False])
def test_twenty_steps_are_those_of_torchs_fused_kernel(clips: bool) -> None:
    """Also a tensor that gets no gradient at times, and learning rates that change."""
    generator = torch.Generator("cuda").manual_seed(torch.seed() % 2**31)
    starts = [torch.randn(shape, generator=generator, device="cuda") for shape in SHAPES]
    sides = [[torch.nn.Parameter(each.clone()) for each in starts] for _ in range(2)]
    optimizers = [
        kind(groups_of(side), **SETTINGS) for kind, side in zip((AdapterAdamW, torch.optim.AdamW), sides, strict=True)
    ]
    refresh(sides[0], torch.bfloat16)
    ran = []
    for number in range(STEPS):
        factor = torch.rand((), generator=generator, device="cuda") if clips else None
        gradients = [torch.randn(shape, generator=generator, device="cuda") for shape in SHAPES]
        for side, optimizer in zip(sides, optimizers, strict=True):
            for index, (each, gradient) in enumerate(zip(side, gradients, strict=True)):
                each.grad = gradient.clone() if index != 3 or number % 3 else None
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (number + 1)
            apply_gradients(optimizer, factor)
        ran.append(getattr(optimizers[0], "_prepared", None) is not None)
        assert all(torch.equal(cast_copy(each, torch.bfloat16), each.bfloat16()) for each in sides[0])
    assert all(ran)
    other = count = 0
    for mine, right in zip(*sides, strict=True):
        states = [optimizer.state[each] for optimizer, each in zip(optimizers, (mine, right), strict=True)]
        assert float(states[0]["step"]) == float(states[1]["step"])
        pairs = [(mine.detach(), right.detach()), *((states[0][name], states[1][name]) for name in MOMENTS)]
        for first, second in pairs:
            other += int((first != second).sum())
            count += first.numel()
            # Where torch's kernel computes in fp64, its betas differ by a rounding: 1.3e-5 of 1 - beta2.
            torch.testing.assert_close(first, second, rtol=3e-5, atol=2e-6)
    print(json.dumps({"clips": clips, "other_bits": other / count}))


@pytest.mark.parametrize("captured", [True, False])
def test_a_models_steps_are_those_of_torchs_fused_kernel(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro batches a step. The adapters are copied before the first pass alone, and by each step of torch's."""
    copied: list[int] = []
    copy = torch._foreach_copy_

    def counting(to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
        copied.append(len(to))
        copy(to, source)

    monkeypatch.setattr(torch, "_foreach_copy_", counting)
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    found: list[list[StepResult]] = []
    weights, copies = [], []
    with open_mesh(config) as mesh:
        for kind in (AdapterAdamW, torch.optim.AdamW):
            model = small_model(mesh, "none", "bf16")
            optimizer = kind(trainable(model), lr=1e-3, fused=True)
            stream = batches(MockSamples(1024, SEQ_LENGTH, 1), seed=1, micro_batch_size=2, global_batch_size=4)
            with backward_of(model, 2 * SEQ_LENGTH, captured=captured) as backward:
                found.append([train_step(model, optimizer, next(stream), 0.1, backward) for _ in range(STEPS)])
                weights.append([each.detach().clone() for each in trainable(model)])
            copies.append(len(copied))
            if isinstance(optimizer, AdapterAdamW):
                assert optimizer._prepared is not None
    mine, torchs = found
    assert copies == [1, 1 + STEPS]
    print(json.dumps({"captured": captured, "same": mine == torchs, "losses": [mine[-1].loss, torchs[-1].loss]}))
    assert mine[0] == torchs[0]
    assert [each.loss for each in mine] == pytest.approx([each.loss for each in torchs], rel=1e-2)
    assert abs(mine[0].loss - mine[-1].loss) > 0.01
    apart = max(float((first - second).abs().max()) for first, second in zip(*weights, strict=True))
    assert apart < STEPS * 1e-3
