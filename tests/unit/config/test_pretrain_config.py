"""Settings of pretrain: what depends on --save, and what is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import merged_config, setting_options
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig, RunConfig, UpConfig, can_resume
from mixtral_run.errors import ConfigError


def parsed(config_class: type[RunConfig], *words: str) -> RunConfig:
    """Return the settings of a command line."""
    found: list[RunConfig] = []

    @click.command(cls=VerbCommand)
    @setting_options(config_class)
    def verb(**flags: Any) -> None:
        found.append(merged_config(config_class, flags.pop("config"), flags, on_hosts=True))

    verb.main([*words], standalone_mode=False)
    return found[0]


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


@pytest.mark.parametrize(
    ("config_class", "needs"),
    [(FinetuneConfig, "--valid-data-path or --valid-fraction"), (PretrainConfig, "--save")],
)
def test_only_new_flags_that_would_be_ignored_are_refused(
    config_class: type[RunConfig], needs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions took these settings, and wrote commands and files with them."""
    file = tmp_path / "config.json"
    save = {"save": "s"} if config_class is FinetuneConfig else {}
    file.write_text(json.dumps({"load": "b", "mock_data": True, "eval_interval": 5, "report_tokens": 7, **save}))
    found = parsed(config_class, "--config", str(file))
    assert (found.eval_interval, found.report_tokens) == (100, 32)
    lines = capsys.readouterr().err.splitlines()
    shown = f"is not used: expected {needs} with it"
    assert len(lines) == 2
    assert lines[0].startswith(f"! --eval-interval {shown}") and lines[1].startswith(f"! --report-tokens {shown}")
    with pytest.raises(ConfigError) as caught:
        parsed(config_class, "--config", str(file), "--eval-interval", "6")
    (problem,) = caught.value.problems
    assert problem.startswith("--eval-interval: expected ")


@pytest.mark.parametrize(("config_class", "resume"), [(FinetuneConfig, ("--resume",)), (UpConfig, ())])
def test_the_command_that_the_kit_wrote_continues_an_old_run(
    config_class: type[RunConfig], resume: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--load", "b", "--save", "s", "--mock-data", "--eval-interval", "50", "--report-prompts", "4", *resume)
    found = parsed(config_class, *words)
    assert (found.eval_interval, found.report_prompts) == (100, 2) and found.problems() == []
    assert capsys.readouterr().err.count("is not used") == 2
    # With a validation set they are used.
    found = parsed(config_class, *words, "--valid-data-path", "v.jsonl")
    assert (found.eval_interval, found.report_prompts, capsys.readouterr().err) == (50, 4, "")
    # What is wrong otherwise is an error as before, and alone.
    with pytest.raises(ConfigError) as caught:
        parsed(config_class, *words, "--log-interval", "0")
    assert [each.partition(":")[0] for each in caught.value.problems] == ["--log-interval"]


def test_only_runs_that_save_are_resumed_by_a_scheduler() -> None:
    assert not can_resume(config().to_mapping())
    assert can_resume(config(save=Path("tuned")).to_mapping())
    assert can_resume(FinetuneConfig(load=Path("base"), mock_data=True, save=Path("a")).to_mapping())
    assert not can_resume({"save": "x"})
