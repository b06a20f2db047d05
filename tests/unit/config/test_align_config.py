"""Settings of `align` that do not fit its method, and what it counts as a row."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.config.data import CheckConfig
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.planner.choose import workload_of
from mixtral_run.planner.memory_model import execution
from mixtral_run.planner.table import PlanConfig, planned_gpu
from mixtral_run.planner.table import workload_of as planned_workload
from mixtral_run.planner.workload import Layout
from mixtral_run.train import run_checkpoints
from mixtral_run.train.checkpoints import init_adapter
from mixtral_run.train.preflight import _check_continues
from mixtral_run.train.run_checkpoints import (
    changed_draws,
    changed_loss,
    changed_reference,
)
from mixtral_run.weights.manifest.describe import BaseDescription
from mixtral_run.weights.manifest.run_state import RunState
from tests.multiprocess.conftest import SMALL

LAYOUT = Layout(1, 1, "none")


def config_of(method: str = "dpo", **settings: Any) -> AlignConfig:
    settings = {"data_path": ("pairs.jsonl",)} | settings
    return AlignConfig(load=Path("base"), save=Path("save"), method=method, **settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"method": "kto", "loss_type": "ipo"}, "--loss-type: expected --method dpo with it; found --method kto"),
        ({"method": "orpo", "label_smoothing": 0.1}, "--label-smoothing: expected --method dpo or simpo with it"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "--label-smoothing: expected --loss-type sigmoid"),
        ({"label_smoothing": 0.5}, "--label-smoothing: expected less than 0.5"),
        ({"simpo_gamma": 1.0}, "--simpo-gamma: expected --method simpo"),
        ({"desirable_weight": 2.0}, "--desirable-weight: expected --method kto"),
        ({"undesirable_weight": 2.0}, "--undesirable-weight: expected --method kto"),
        ({"data_format": "unpaired"}, "--data-format unpaired: expected --method kto"),
        ({"method": "simpo", "reference": "base"}, "--reference: expected --method dpo or kto"),
        ({"method": "ppo"}, "--method: expected one of dpo, kto, orpo, simpo; found ppo"),
        ({"data_path": ()}, "--data-path FILE: expected training data; found none"),
        ({"beta": 0.0}, "--beta: expected more than 0"),
        ({"field": ("response=x",)}, "--field: expected NAME=KEY with a NAME of prompt, chosen, rejected"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], problem: str) -> None:
    (found,) = config_of(**settings).problems()
    assert found.startswith(problem)


def test_defaults_and_fields() -> None:
    assert [config_of(method).reward_factor for method in ("dpo", "kto", "orpo", "simpo")] == [0.1, 0.1, 0.1, 2.0]
    assert not config_of(field=("chosen=good", "rejected=bad"), lr_scheduler="constant").problems()
    assert CheckConfig(data_path=("x",), method="kto", field=("label=good",)).problems() == []
    mock = AlignConfig(load=Path("base"), save=Path("save"), mock_data=True, method="dpo").problems()
    assert mock == ["--mock-data: expected --data-path; random tokens have no preferences"]


@pytest.mark.parametrize(
    ("method", "pack", "rows"),
    [("dpo", False, 2), ("dpo", True, 1), ("kto", False, 1), ("kto", True, 1), ("orpo", False, 2)],
)
def test_the_memory_of_a_pair_is_that_of_two_rows(method: str, pack: bool, rows: int) -> None:
    base = BaseDescription(Path("base"), SMALL, "bfloat16", "")
    found = workload_of(config_of(method, pack=pack, micro_batch_size=3), base, 1, (9, 0))
    supervised = FinetuneConfig(load=Path("base"), save=Path("save"), mock_data=True, micro_batch_size=3)
    assert found.tokens(LAYOUT) == 3 * rows * 512
    assert workload_of(supervised, base, 1, (9, 0)).tokens(LAYOUT) == 3 * 512
    # The reference is computed without gradients, as an evaluation is.
    assert found.has_validation == (method in ("dpo", "kto"))
    assert execution(found, LAYOUT).captured
    eager = workload_of(config_of(method, pack=pack, cuda_graphs=False), base, 1, (9, 0))
    assert not execution(eager, LAYOUT).captured
    if not pack:
        plan = PlanConfig(method=method, micro_batch_size=3)
        planned = planned_workload(plan, planned_gpu(plan))
        assert planned.tokens(LAYOUT) == 3 * rows * 512
        assert (planned.cuda_graphs, planned.has_validation) == (True, found.has_validation)


def test_a_run_continues_with_its_own_loss_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapter:
        folder, training = Path("save/iter_0000002"), {"method": "dpo"}

    monkeypatch.setattr("mixtral_run.train.preflight.check_adapter_fits", lambda *_: None)
    base: Any = None
    finetune = FinetuneConfig(load=Path("base"), save=Path("save"), mock_data=True)
    for config, found in ((config_of("orpo"), "align --method orpo"), (finetune, "finetune")):
        with pytest.raises(ConfigError) as caught:
            _check_continues(config, base, Adapter())  # type: ignore[arg-type]
        assert (caught.value.expected, caught.value.found) == ("align --method dpo", found)


def test_a_plan_for_align_takes_what_align_takes() -> None:
    assert PlanConfig(method="dpo", context_parallel_size=2, train_also=("router",)).problems() == [
        "--context-parallel-size: expected 1 with --method, since `align` needs whole rows; found 2",
        "--train-also: expected none with --method, since `align` trains adapters only; found router",
    ]
    plan = PlanConfig(method="dpo")
    assert plan.problems() == [] and planned_workload(plan, planned_gpu(plan)).has_validation


@pytest.mark.parametrize(("method", "found"), [("dpo", ["--init-adapter None (was first)"]), ("simpo", [])])
def test_another_adapter_to_start_from_is_another_reference(method: str, found: list[str]) -> None:
    class Adapter:
        training = config_of(method, init_adapter=Path("first")).to_mapping()

    adapter: Any = Adapter()
    assert changed_loss(config_of(method, init_adapter=Path("first")), adapter) == []
    assert changed_loss(config_of(method), adapter) == found


def test_a_default_that_is_written_out_is_the_same_loss() -> None:
    class Adapter:
        training = config_of().to_mapping()

    adapter: Any = Adapter()
    assert changed_loss(config_of(beta=0.1, loss_type="sigmoid", reference="start"), adapter) == []
    assert changed_loss(config_of(beta=0.2), adapter) == ["--beta 0.2 (was None)"]


def resumed(now: FinetuneConfig, training: dict[str, Any], **more: Any) -> Any:
    """Return a run that goes on from a checkpoint of iteration 2 with these settings, and its warning."""
    values = {"iteration": 2, "validation": {}, "former": (), "files": {}, "folder": Path("save/iter_0000002")} | more
    adapter = SimpleNamespace(training=training, state=RunState(), data_sha256=None, **values)
    warnings: list[str] = []
    report = SimpleNamespace(say=lambda _: None, warn=warnings.append)
    run: Any = SimpleNamespace(
        model=None, mesh=SimpleNamespace(is_first=False), report=report, best=None, former=(),
        bad_steps=SimpleNamespace(restore=lambda *_: None), data=SimpleNamespace(sha256=None, chat_template=None),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name in ("report_without_checksums", "load_adapter", "load_optimizer", "restore_random_state"):
            patch.setattr(run_checkpoints, name, lambda *_: None)
        patch.setattr(run_checkpoints, "check_resume", lambda *_: adapter)
        run.start = run_checkpoints.resume_run(run, None, now, None)  # type: ignore[arg-type]
    run.warning = warnings[0] if warnings else None
    run.record = run_checkpoints.describe(run, now, BaseDescription(Path("base"), SMALL, "bfloat16", "f"))
    return run


@pytest.mark.parametrize("config_class", [FinetuneConfig, AlignConfig])
def test_another_precision_is_another_loss_and_is_recorded(config_class: type[FinetuneConfig]) -> None:
    more: Any = {"method": "dpo"} if config_class is AlignConfig else {}
    places: Any = {"load": Path("base"), "save": Path("save"), "data_path": ("pairs.jsonl",)}
    config = config_class(**places, **more)
    in_8_bit = dataclasses.replace(config, attention_precision="fp8", base_precision="nf4")
    run = resumed(config, in_8_bit.to_mapping())
    changes = "--base-precision bf16 (was nf4), --attention-precision bf16 (was fp8)"
    assert run.warning == f"The loss is another one than before: {changes}"
    assert run.record["former_settings"] == [
        {"iteration": 2, "settings": {"base_precision": "nf4", "attention_precision": "fp8"}}
    ]
    assert changed_reference(run, config) == changes
    # The record of an earlier version, which had one precision.
    earlier = config.to_mapping()
    del earlier["attention_precision"], earlier["base_precision"]
    assert resumed(config, earlier).warning is None and resumed(config, earlier).former == ()
    assert "--attention-precision fp8 (was bf16)" in resumed(in_8_bit, earlier).warning
    # A checkpoint after the change keeps the record of it.
    later = resumed(config, config.to_mapping(), former=run.former)
    assert (later.warning, later.record["former_settings"]) == (None, run.record["former_settings"])
    assert changed_reference(SimpleNamespace(start=4, former=run.former), config) is None  # type: ignore[arg-type]
    # A run without the settings in its record at all is not compared.
    assert resumed(in_8_bit, {}).warning is None


def test_what_still_is_of_the_former_loss_is_named() -> None:
    config = FinetuneConfig(
        load=Path("base"), save=Path("save"), mock_data=True, early_stopping_patience=3, keep_best=True,
        init_lora="pissa", attention_precision="fp8",
    )  # fmt: skip
    before = dataclasses.replace(config, attention_precision="bf16").to_mapping()
    best = {"iteration": 4, "loss": 2.0, "best_iteration": 3, "best_loss": 1.5, "num_without_improvement": 1}
    assert resumed(config, before, validation=best).warning == (
        "The loss is another one than before: --attention-precision fp8 (was bf16). The lowest validation loss so far, "
        "1.5000 of iteration 3, is of the former one, and --early-stopping-patience and --keep-best compare with it. "
        "The start of --init-lora pissa stays that of the former precision"
    )
    kept = dataclasses.replace(config, early_stopping_patience=0, init_lora="default")
    assert resumed(kept, before, validation=best).warning.endswith(
        "is of the former one, and --keep-best compares with it"
    )


def test_other_chunks_or_micro_batches_draw_other_dropout() -> None:
    class Adapter:
        training = config_of(expert_chunks=4, micro_batch_size=2).to_mapping()

    adapter: Any = Adapter()
    assert changed_draws(config_of(expert_chunks=4, micro_batch_size=2), adapter) is None
    assert changed_draws(config_of(expert_chunks=1, micro_batch_size=2), adapter) == "--expert-chunks 1 (was 4)"
    del Adapter.training["expert_chunks"]  # an earlier version's
    assert changed_draws(config_of(), adapter) == "--micro-batch-size 1 (was 2)"


def test_what_an_adapter_brings_must_suit_align(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapter:
        lora = LoraSettings(16, 32.0, 0.0, ("linear_qkv",), train_also=("router",))

    monkeypatch.setattr(init_adapter, "describe_base", lambda _: None)
    monkeypatch.setattr(init_adapter, "describe_init_adapter", lambda *_: Adapter())
    with pytest.raises(ConfigError, match="--train-also: align trains adapters only"):
        init_adapter.with_adapter_settings(config_of(init_adapter=Path("first")))
