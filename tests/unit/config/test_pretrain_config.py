"""Settings of pretrain: what depends on --save, and what is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig, can_resume

VALIDATED = {"save": Path("tuned"), "valid_data_path": ("v.jsonl",), "report": False}
"""A run with a validation set and without a report, for which no prompts are answered."""


def config(**settings: Any) -> PretrainConfig:
    return PretrainConfig(load=Path("base"), mock_data=True, **settings)


def test_defaults_follow_from_save() -> None:
    plain, saved = config(), config(save=Path("tuned"))
    assert (plain.uses_adamw, plain.max_norm, saved.uses_adamw, saved.max_norm) == (False, 0.0, True, 1.0)
    assert config(clip_grad=0.5).max_norm == 0.5 and config(save=Path("tuned"), clip_grad=0.0).max_norm == 0.0
    assert config(optimizer="adamw").uses_adamw
    assert plain.problems() == saved.problems() == []
    # Nothing is ignored where answers, or copies for saves, are turned off that do not exist.
    off: dict[str, Any]
    for off in ({"report_prompts": 0}, {"report_prompts": 0, "report_tokens": 16}, {"save_in_background": False}):
        assert config(save=Path("tuned"), **off).problems() == config(**off).problems() == []
        assert config(save=Path("tuned"), report=False, **off).problems() == []
    assert config(save=Path("tuned"), context_parallel_size=2).problems() == []


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"resume": "auto"}, "--resume"),
        ({"keep_last": 2}, "--keep-last"),
        ({"valid_data_path": ("v.jsonl",)}, "--valid-data-path"),
        ({"skip_bad_steps": 1}, "--skip-bad-steps"),
        ({"save_interval": 5}, "--save-interval"),
        ({"report_prompts": 1}, "--report-prompts"),
        ({"report_tokens": 5}, "--report-tokens"),
        ({"offload_optimizer": True}, "--offload-optimizer"),
        ({"save": Path("tuned"), "eval_interval": 5}, "--eval-interval"),
        ({"save": Path("tuned"), "report_prompts": 5}, "--report-prompts"),
        ({"save": Path("tuned"), "report_tokens": 5}, "--report-tokens"),
        ({**VALIDATED, "report_prompts": 5}, "--report-prompts"),
        ({**VALIDATED, "report_tokens": 16}, "--report-tokens"),
        ({"save": Path("tuned"), "optimizer": "sgd"}, "--optimizer"),
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"save": Path("tuned"), "context_parallel_size": 2, "router_aux_loss": 0.1}, "--context-parallel-size"),
        ({"save": Path("tuned"), "metrics_file": Path("m.jsonl")}, "--metrics-file"),
    ],
)
def test_what_would_be_ignored_is_refused(settings: dict[str, Any], flag: str) -> None:
    (problem,) = config(**settings).problems()
    assert problem.startswith(f"{flag}: ")


def test_only_runs_that_save_are_resumed_by_a_scheduler() -> None:
    assert not can_resume(config().to_mapping())
    assert can_resume(config(save=Path("tuned")).to_mapping())
    assert can_resume(FinetuneConfig(load=Path("base"), mock_data=True, save=Path("a")).to_mapping())
    assert not can_resume({"save": "x"})
