"""Steps of `align` as CUDA graphs against launched ones: losses, figures and gradients of each method."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.model.without_adapters import without_adapters
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.cache.token_arrays import TokenArrays
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.data.samples import batches
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.train.preferences.objective import PreferenceObjective
from mixtral_run.train.preferences.passes import training_passes
from mixtral_run.train.preferences.reference import add_references
from mixtral_run.train.steps.cuda_graph import CapturedBackward, backward_of
from mixtral_run.train.steps.step import StepResult, train_step, trainable
from mixtral_run.train.validation import Validation
from tests.gpu.kernels.test_kernels import SEQ_LENGTH, small_model

STEPS = 4
FIRST_LOSS = {"dpo": math.log(2), "kto": 0.5}


def config_of(method: str, *, pack: bool) -> AlignConfig:
    return AlignConfig(
        load=Path("base"), save=Path("save"), data_path=("x",), method=method, pack=pack, seq_length=SEQ_LENGTH,
        micro_batch_size=2, global_batch_size=4, train_iters=STEPS, beta=0.5,
    ).check()  # fmt: skip


def samples_of(config: AlignConfig, folder: Path) -> PreferenceSamples:
    """Return answers of different lengths, so that packed rows have different numbers of them."""
    draw = np.random.default_rng(7)
    encoded = []
    for number in range(40):
        prompt = draw.integers(3, 1024, draw.integers(2, 12))
        for _ in ("chosen", "rejected"):
            answer = draw.integers(3, 1024, draw.integers(30, 45) if number % 3 == 0 else draw.integers(1, 12))
            tokens = np.concatenate([prompt, answer]).astype(np.int32)
            encoded.append(EncodedExample(tokens, ((len(prompt), len(tokens)),)))
    arrays = TokenArrays.of([f"line {number // 2 + 1}" for number in range(len(encoded))], encoded)
    return PreferenceSamples(
        arrays, SEQ_LENGTH, 2, "x", None, paired=config.method != "kto", packs=config.pack, folder=folder
    )


def steps_of(
    mesh: Mesh, config: AlignConfig, folder: Path, base_precision: str, *, captured: bool
) -> tuple[list[StepResult], list[Tensor], float]:
    """Return the results of the steps, the gradients of the last one, and the loss of an evaluation between them."""
    model = model_without_effect(mesh, base_precision)
    samples, objective = samples_of(config, folder), PreferenceObjective(config)
    if config.has_reference:
        folder.mkdir()
        as_reference, passes = partial(without_adapters, model), training_passes(samples, config, 0, 1)
        add_references(config, "base", as_reference, model, samples, passes, Report.silent())
    validation = Validation(samples_known(samples), 2, Report.silent(), None, PreferenceObjective(config))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
    stream = batches(samples, seed=config.seed, micro_batch_size=2, global_batch_size=4)
    tokens = 2 * config.rows_per_sample * SEQ_LENGTH
    results: list[StepResult] = []
    with backward_of(model, tokens, captured=captured, most=samples.most, objective=objective) as backward:
        assert isinstance(backward, CapturedBackward) == captured
        for step in range(STEPS):
            results.append(train_step(model, optimizer, next(stream), 1.0, backward))
            if step == 1:
                between = validation.evaluate(model, step, lambda: False)
                assert between is not None
        if isinstance(backward, CapturedBackward):
            # The pass for KTO's divergence is a graph too.
            assert (backward._losses is not None) == (config.method == "kto" and not config.pack)
            assert set(backward._graphs) == {False, True}
        # Some of them are in the memory of the graphs, which ends with the context.
        gradients = [each.grad.clone() for each in trainable(model) if each.grad is not None]
    return results, gradients, between.loss


def model_without_effect(mesh: Mesh, base_precision: str) -> MixtralModel:
    """Return a model whose adapters change nothing yet, as at the start of a run."""
    torch.manual_seed(5)
    model = small_model(mesh, "none", base_precision)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".linear_out" in name:
                parameter.zero_()
    return model


def samples_known(samples: PreferenceSamples) -> Any:
    """Return the samples themselves: an evaluation takes all of them, and what is not known of them is set."""
    for values in (samples.reference, samples.mismatched_reference):
        if values is not None:
            values[np.isnan(values)] = -50.0
    return samples


@pytest.mark.parametrize(
    ("method", "pack", "base_precision"),
    [
        *((method, pack, "bf16") for method in ("dpo", "kto", "orpo", "simpo") for pack in (False, True)),
        ("dpo", False, "fp8"),
        ("kto", False, "fp8"),
    ],
)
def test_a_captured_step_is_the_launched_one(tmp_path: Path, method: str, pack: bool, base_precision: str) -> None:
    config = config_of(method, pack=pack)
    with open_mesh(LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")) as mesh:
        launched, expected_gradients, expected_loss = steps_of(
            mesh, config, tmp_path / "launched", base_precision, captured=False
        )
        found, gradients, loss = steps_of(mesh, config, tmp_path / "captured", base_precision, captured=True)
    assert len({step.loss for step in launched}) == STEPS
    if method in FIRST_LOSS:
        assert launched[0].loss == pytest.approx(FIRST_LOSS[method], abs=1e-3 if pack else 1e-6)
    if pack:
        # The backward pass of attention over packed rows adds in any order.
        assert found[0].loss == pytest.approx(launched[0].loss, rel=1e-5)
        assert found[0].grad_norm == pytest.approx(launched[0].grad_norm, rel=1e-2)
        assert [step.loss for step in found] == pytest.approx([step.loss for step in launched], rel=2e-2)
        return
    assert found == launched and loss == expected_loss
    assert len(gradients) == len(expected_gradients) > 0
    assert all(map(torch.equal, gradients, expected_gradients))
