"""Evaluation: its rows on each rank, without dropout and gradients, and until a stop is requested."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mixtral_run.errors import TrainingError
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.samples import Samples
from mixtral_run.train.summary import ValidationSummary
from mixtral_run.train.validation import Validation, ValidationMetrics, rows_by_pass
from mixtral_run.trial.sizes import INSTRUCTIONS
from tests.multiprocess.conftest import SMALL
from tests.support.examples import examples_of
from tests.support.samples import samples_of
from tests.unit.model.recompute.test_recompute import model_of

VOCABULARY = 2048
"""More than the tokenizer's."""


@pytest.fixture(scope="module")
def samples(tiny_tokenizer: Any) -> Samples:
    return samples_of(examples_of(INSTRUCTIONS)[:9], tiny_tokenizer, 128)


def model(mesh: Mesh, recompute: str = "none", dropout: float = 0.0) -> MixtralModel:
    return model_of(mesh, recompute, dropout, architecture=dataclasses.replace(SMALL, vocab_size=VOCABULARY))


def never() -> bool:
    return False


def evaluated(trained: MixtralModel, samples: Samples | PackedSamples, micro_batch_size: int) -> ValidationMetrics:
    found = Validation(samples, micro_batch_size, Report.silent(), None).evaluate(trained, 0, never)
    assert found is not None
    return found


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 6, 7, 24])
def test_each_row_is_on_one_rank_and_all_ranks_make_as_many_passes(count: int, size: int, micro: int) -> None:
    ranks = [SimpleNamespace(data_rank=rank, data_size=size) for rank in range(size)]
    found = [list(rows_by_pass(count, micro, cast(Mesh, rank))) for rank in ranks]
    assert len({len(passes) for passes in found}) == 1
    assert len(found[0]) == -(-count // (micro * size))
    assert all(len(rows) == micro for passes in found for rows in passes)
    rows = [row for passes in found for each in passes for row in each if row is not None]
    assert sorted(rows) == list(range(count))


def test_the_loss_is_over_all_response_tokens_packed_or_not(mesh: Mesh, samples: Samples) -> None:
    trained = model(mesh)
    alone = evaluated(trained, samples, 1)
    assert alone.num_tokens == samples.num_loss_tokens_total
    for others, micro in ((samples, 2), (PackedSamples(samples), 1), (PackedSamples(samples), 2)):
        found = evaluated(trained, others, micro)
        assert found.num_tokens == alone.num_tokens
        assert found.loss == pytest.approx(alone.loss, rel=1e-6)


def test_evaluation_has_no_dropout_and_changes_nothing(mesh: Mesh, samples: Samples) -> None:
    """The model is in training mode before and after it, with recomputation as well."""
    expected = evaluated(model(mesh), samples, 2).loss
    for recompute in ("none", "full"):
        trained = model(mesh, recompute, 0.5)
        before = [parameter.detach().clone() for parameter in trained.parameters()]
        assert evaluated(trained, samples, 2).loss == pytest.approx(expected, rel=1e-6)
        assert trained.training and all(layer.training for layer in trained.gpt.decoder.layers)
        assert all(each.grad is None for each in trained.parameters())
        assert all(torch.equal(*pair) for pair in zip(before, trained.parameters(), strict=True))


def test_a_stop_ends_it(mesh: Mesh, samples: Samples, tmp_path: Path) -> None:
    answers = iter((False, False, True))
    validation = Validation(samples, 1, Report.silent(), tmp_path / "validation.jsonl")
    assert validation.evaluate(model(mesh), 3, lambda: next(answers)) is None
    assert not validation.results and not list(tmp_path.iterdir())


def test_evaluations_are_written(mesh: Mesh, samples: Samples, tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    validation = Validation(samples, 2, Report.silent(), file)
    for iteration in (0, 5):
        validation.evaluate(model(mesh), iteration, never)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 5]
    assert lines[0]["loss"] == validation.results[0].loss == lines[1]["loss"]
    assert f"lm loss: {lines[1]['loss']:.6E}" in validation.results[1].line(10)
    assert validation.results[1].line(10).startswith("validation  5/10 | ")


def test_an_earlier_checkpoint_that_was_better_is_named(tmp_path: Path) -> None:
    found = [ValidationMetrics(iteration, loss, 9, 1.0) for iteration, loss in ((0, 3.0), (10, 1.5), (20, 1.75))]
    summary = ValidationSummary.of(found)
    assert summary == ValidationSummary(0, 3.0, 1.75, 1.5, 10)
    assert summary.line(tmp_path).endswith(
        "lowest 1.5000 at iteration 10, of which there is no checkpoint (--save-interval)"
    )
    (tmp_path / "iter_0000010").mkdir()
    assert summary.line(tmp_path).endswith(f", which --adapter {tmp_path / 'iter_0000010'} selects")
    assert summary.best_adapter(tmp_path) == tmp_path / "iter_0000010"
    assert summary.best_adapter(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    growing = ValidationSummary.of(found[:2])
    assert growing is not None and growing.line(tmp_path) == "validation loss 3.0000 before, 1.5000 at the end"
    resumed = ValidationSummary.of(found[1:])
    assert resumed is not None
    assert resumed.line(tmp_path) == "validation loss 1.5000 at iteration 10, 1.7500 at the end; " + (
        f"lowest 1.5000 at iteration 10, which --adapter {tmp_path / 'iter_0000010'} selects"
    )
    assert ValidationSummary.of([]) is None


def test_a_loss_that_is_not_a_number_ends_the_run(mesh: Mesh, samples: Samples) -> None:
    broken = model(mesh)
    broken.gpt.output_layer.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="validation loss is not a number"):
        evaluated(broken, samples, 1)
