"""The reference computes in the passes of training, so that the first loss is that of two equal models."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.without_adapters import without_adapters
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.data.samples import batches
from mixtral_run.train.preferences.objective import PreferenceObjective
from mixtral_run.train.preferences.passes import passes_with_new_samples, training_passes
from mixtral_run.train.preferences.reference import ReferenceFile, add_references
from mixtral_run.train.steps.step import EagerBackward, train_step, trainable
from tests.unit.model.recompute.test_recompute import model_of
from tests.unit.train.test_preferences import config_of, pairs_of, samples_of


def samples_for(config: AlignConfig, folder: Path, pairs: int = 8) -> PreferenceSamples:
    return samples_of([answer for pair in pairs_of(pairs) for answer in pair], folder, config)


@pytest.mark.parametrize(("method", "loss", "pack"), [
    ("dpo", math.log(2), False), ("dpo", math.log(2), True), ("kto", 0.5, False), ("kto", 0.5, True),
])  # fmt: skip
def test_the_reference_sees_the_rows_of_training_and_the_first_loss_is_exact(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, loss: float, pack: bool
) -> None:
    model = model_of(mesh, "none")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".linear_out" in name:
                parameter.zero_()
    batch = {"micro_batch_size": 1, "global_batch_size": 2} if pack else {"micro_batch_size": 2, "global_batch_size": 4}
    config = config_of(method, pack=pack, train_iters=3, seed=5, **batch)
    samples = samples_for(config, tmp_path, 24 if pack else 8)
    seen: list[tuple[bool, Any]] = []
    losses = MixtralModel.losses

    def recorded(self: MixtralModel, tokens: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), tokens.tolist()))
        return losses(self, tokens, *others, **named)

    monkeypatch.setattr(MixtralModel, "losses", recorded)
    passes = training_passes(samples, config, 0, 1)
    add_references(config, "base", partial(without_adapters, model), model, samples, passes, Report.silent())
    of_reference, seen[:] = [tokens for _, tokens in seen], []
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    backward = EagerBackward(model, objective=PreferenceObjective(config))
    stream = batches(
        samples, seed=5, micro_batch_size=batch["micro_batch_size"], global_batch_size=batch["global_batch_size"]
    )
    results = [train_step(model, optimizer, next(stream), 0.0, backward) for _ in range(2)]
    assert [result.loss for result in results] == pytest.approx([loss, loss], abs=1e-15)
    figures = [{"kl": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0} | result.figures for result in results]
    assert all(each["kl"] == each["rewards/chosen"] == each["rewards/rejected"] == 0.0 for each in figures)
    of_training = [tokens for with_gradient, tokens in seen if with_gradient]
    number = 2 if method == "kto" else 1  # with KTO a pass over other answers follows each
    assert of_training == of_reference[: number * len(of_training) : number] and len(of_training) == 4


@pytest.mark.parametrize("size", [1, 2])
def test_passes_are_those_of_the_global_batches(tmp_path: Path, size: int) -> None:
    """From the second of five iterations on, over the end of an epoch of 8 pairs."""
    config = config_of("dpo", micro_batch_size=2, global_batch_size=8, train_iters=3, seed=4)
    samples = samples_for(config, tmp_path, pairs=9)
    passes = list(training_passes(samples, config, 1, size))
    assert len(passes) == 2 * 4 // size
    for rank in range(size):
        stream = batches(
            samples, seed=4, micro_batch_size=2, global_batch_size=8, data_parallel_rank=rank, data_parallel_size=size,
            consumed_samples=8,
        )  # fmt: skip
        micros = [micro for _ in range(2) for micro in next(stream).micro_batches]
        expected = [micro.tokens.tolist() for micro in micros]
        assert [samples.micro_batch(each[rank]).tokens.tolist() for each in passes] == expected


def test_a_sample_is_new_once_and_only_if_a_value_is_missing(tmp_path: Path) -> None:
    samples = samples_for(config_of("dpo"), tmp_path, pairs=5)
    known = np.ones(10, bool)
    known[[2, 6, 7]] = False  # of the samples 1 and 3
    passes = [((0, 2), (4, None)), ((1, 0), (1, 2)), ((None, 1), (3, 3)), ((3, 1), (2, 0))]
    found, count = passes_with_new_samples(passes, samples, known)
    assert [each.samples for each in found] == passes[1:3]
    assert [each.is_new for each in found] == [((True, False), (False, False)), ((False, False), (True, False))]
    assert [each.num_new for each in found] == [1, 1] and count == 5
    assert known.sum() == 7


def test_a_pass_that_is_computed_again_keeps_known_values(mesh: Mesh, tmp_path: Path) -> None:
    model, config = model_of(mesh, "none"), config_of("dpo")
    samples = samples_for(config, tmp_path, pairs=4)

    def add(*pairs: int) -> list[float]:
        passes = [(pairs,)]
        add_references(config, "base", partial(without_adapters, model), model, samples, passes, Report.silent())
        assert samples.reference is not None
        return samples.reference.tolist()

    first = add(1, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    second = add(2, 3)
    assert second[2:6] == first[2:6] and math.isnan(first[6])
    assert np.isfinite(second[2:]).all() and math.isnan(second[0])


def test_of_a_sample_that_is_known_in_part_the_known_value_stays(mesh: Mesh, tmp_path: Path) -> None:
    model, config = model_of(mesh, "none"), config_of("dpo")
    samples = samples_for(config, tmp_path, pairs=2)
    ReferenceFile.of(config, "base", model, samples).write(np.asarray([math.nan, math.nan, -1.25, math.nan]))
    passes = [((1,),)]
    add_references(config, "base", partial(without_adapters, model), model, samples, passes, Report.silent())
    assert samples.reference is not None
    assert samples.reference[2] == -1.25 and math.isfinite(samples.reference[3]) and math.isnan(samples.reference[0])
