"""Steps that are refused change nothing, on all ranks alike; spoiled numbers get into no checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, TrainingError
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.adapter_shards import live_states
from mixtral_run.train.checkpoints.soundness import problems_of
from mixtral_run.train.data.samples import GlobalBatch
from mixtral_run.train.steps.bad_steps import BadSteps
from mixtral_run.train.steps.step import StepResult, train_step, trainable
from tests.support.adapters import save_adapter
from tests.unit.model.attention.test_packed_attention import micro_batches
from tests.unit.model.recompute.test_recompute import model_of

ROW, _ = micro_batches()
BATCH = GlobalBatch((ROW, ROW), 20, 2)


def bad_steps(mesh: Mesh, save: Path, report: Report | None = None, **settings: object) -> BadSteps:
    config = FinetuneConfig(**{"load": Path("base"), "save": save, "mock_data": True, **settings})
    return BadSteps(config, mesh, report or Report.silent())


def test_a_refused_step_changes_neither_adapters_nor_optimizer(mesh: Mesh) -> None:
    model = model_of(mesh, "none")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train_step(model, optimizer, BATCH, 1.0)
    before = [each.clone() for each in trainable(model)]
    state = [value.clone() for each in trainable(model) for value in optimizer.state[each].values()]
    asked: list[tuple[float, float]] = []
    result = train_step(model, optimizer, BATCH, 1.0, refuses=lambda *found: not asked.append(found))
    assert not result.taken and asked == [(result.loss, result.grad_norm)] and result.loss > 0
    assert all(map(torch.equal, before, trainable(model)))
    after = [value for each in trainable(model) for value in optimizer.state[each].values()]
    assert all(map(torch.equal, state, after))
    taken = train_step(model, optimizer, BATCH, 1.0, refuses=lambda *_: False)
    # The gradients are those of the same batch, and this time they count.
    assert taken.taken and (taken.loss, taken.grad_norm) == (result.loss, result.grad_norm)
    assert not all(map(torch.equal, before, trainable(model)))


def test_one_of_the_ranks_that_share_rows_writes_them(mesh: Mesh, tmp_path: Path) -> None:
    for rank in (1, 0):
        bad = bad_steps(
            replace(mesh, context_rank=rank, context_size=2), tmp_path, max_loss_ratio=2.0, skip_bad_steps=1
        )
        assert bad.refuses(math.nan, 1.0)
        bad.note(StepResult(math.nan, 1.0, 20, taken=False), 1, BATCH)
        assert (tmp_path / "bad_batches" / "iter_0000001-data0.json").exists() == (rank == 0)


def test_a_loss_above_the_ratio_is_skipped_and_one_too_many_stops(mesh: Mesh, tmp_path: Path) -> None:
    printed = StringIO()
    bad = bad_steps(mesh, tmp_path, Report(printed), max_loss_ratio=2.0, skip_bad_steps=1)
    for iteration, loss in enumerate((1.0, 9.0, 1.2, 1.1, 0.9), 1):  # fewer than five before: no limit
        assert not bad.refuses(loss, 1.0)
        bad.note(StepResult(loss, 1.0, 20), iteration, BATCH)
    assert not bad.refuses(2.2, 1.0)  # the median is 1.1
    assert bad.refuses(2.21, 1.0) and bad.refuses(math.nan, 1.0) and bad.refuses(1.0, math.inf)
    bad.note(StepResult(2.21, 1.0, 20, taken=False), 6, BATCH)
    assert (bad.num_taken, bad.num_skipped, bad.recent) == (5, 1, (1.0, 9.0, 1.2, 1.1, 0.9))
    assert "Iteration 6 is skipped (1 of 1)" in printed.getvalue()
    written = json.loads((tmp_path / "bad_batches" / "iter_0000006-data0.json").read_text())
    assert written["iteration"] == 6 and "2.21" in written["why"]
    assert [micro["tokens"] for micro in written["micro_batches"]] == [ROW.tokens.tolist()] * 2
    with pytest.raises(TrainingError, match="risen above --max-loss-ratio") as stopped:
        bad.note(StepResult(5.0, 1.0, 20, taken=False), 7, BATCH)
    assert stopped.value.exit_code == 6 and str(tmp_path / "bad_batches") in str(stopped.value)
    assert "--skip-bad-steps 2" in str(stopped.value)


def test_without_the_flags_a_loss_that_is_no_number_stops(mesh: Mesh, tmp_path: Path) -> None:
    bad = bad_steps(mesh, tmp_path)
    assert not bad.is_active
    with pytest.raises(TrainingError, match="not a number"):
        bad.note(StepResult(math.nan, 1.0, 20), 3, BATCH)
    assert (tmp_path / "bad_batches" / "iter_0000003-data0.json").is_file()


def test_what_a_checkpoint_stores_continues(mesh: Mesh, tmp_path: Path) -> None:
    bad = bad_steps(mesh, tmp_path, max_loss_ratio=1.5, skip_bad_steps=3)
    bad.restore([1.0] * 5, num_taken=40, num_skipped=3)
    assert bad.refuses(1.6, 1.0)
    with pytest.raises(TrainingError):
        bad.note(StepResult(1.6, 1.0, 20, taken=False), 44, BATCH)


@pytest.mark.parametrize("spoil", ["nan", "infinite", "large", "moment", "update"])
def test_a_spoiled_adapter_is_not_saved(mesh: Mesh, tmp_path: Path, spoil: str) -> None:
    model = model_of(mesh, "none")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(3):
        train_step(model, optimizer, BATCH, 1.0)
    assert problems_of(live_states(model, optimizer)) == []
    description = {
        "dtype": "float32", "base": {"fingerprint": "0-0", "path": None}, "training": {}, "data_sha256": None,
        "lora": {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target_modules": ["linear_qkv"]},
    }  # fmt: skip
    save_adapter(model, optimizer, tmp_path, 3, description)
    parameter = trainable(model)[1]
    name = next(name for name, each in model.named_parameters() if each is parameter)
    state = optimizer.state[parameter]
    with torch.no_grad():
        if spoil == "moment":
            state["exp_avg_sq"].view(-1)[0] = torch.nan
        elif spoil == "update":
            state["exp_avg"].view(-1)[0], state["exp_avg_sq"].view(-1)[0] = 1.0, 1e-10
        else:
            parameter.view(-1)[-1] = {"nan": torch.nan, "infinite": -torch.inf, "large": -2e4}[spoil]
    with pytest.raises(TrainingError, match="iteration 4 is spoiled and is not saved") as refused:
        save_adapter(model, optimizer, tmp_path, 4, description)
    assert [line.split(":")[0] for line in refused.value.problems] == [name]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert [each.name for each in tmp_path.glob("iter_*")] == ["iter_0000003"]


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        FinetuneConfig(load=Path("b"), save=Path("s"), mock_data=True, keep_best=True, max_loss_ratio=1.0).check()
    assert [line.split(":")[0] for line in refused.value.problems] == ["--max-loss-ratio", "--keep-best", "--keep-best"]
