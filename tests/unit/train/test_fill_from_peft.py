"""An adapter to start from: the settings that it brings, and a rank's part of a PEFT adapter, numbers written out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints import checkpoint, init_adapter
from mixtral_run.train.checkpoints.checkpoint import _fill_from_peft
from mixtral_run.weights.load.read_parts import Target

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.adapter."


def factors() -> Any:
    """STAND-IN for a PEFT adapter: an element is 1000 · layer + 100 · expert + 10 · row + column, A's are negative."""

    def matrix(_: str, place: tuple[int, int]) -> torch.Tensor:
        layer, expert = place
        return 1000.0 * layer + 100 * expert + 10 * torch.arange(6.0)[:, None] + torch.arange(5.0)

    return SimpleNamespace(linear_in=lambda *given: -matrix(*given), linear_out=matrix)


def test_rows_and_columns_of_two_experts() -> None:
    """Layer 1, experts 2 and 3, rows 3 and 4, columns 1 … 3."""
    for half, sign in (("linear_in", -1.0), ("linear_out", 1.0)):
        target = Target(f"{FC1}{half}.weight", (1, 2, 3, 1), (1, 2, 2, 3), torch.zeros(12))
        _fill_from_peft(target, factors())
        assert (sign * target.data.view(2, 2, 3)).tolist() == [
            [[1231.0, 1232.0, 1233.0], [1241.0, 1242.0, 1243.0]],
            [[1331.0, 1332.0, 1333.0], [1341.0, 1342.0, 1343.0]],
        ]


def config(**values: Any) -> FinetuneConfig:
    return FinetuneConfig(load=Path("base"), save=Path("s"), mock_data=True, **{"init_adapter": Path("a"), **values})


def brings(monkeypatch: pytest.MonkeyPatch, lora: LoraSettings) -> None:
    monkeypatch.setattr(init_adapter, "describe_base", lambda _: None)
    monkeypatch.setattr(init_adapter, "describe_init_adapter", lambda *_: SimpleNamespace(lora=lora))


def test_the_settings_that_an_adapter_brings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = LoraSettings(
        5, 7.0, 0.5, ("linear_fc1",), scaling="rslora", expert_rank=3, expert_alpha=9.0, train_also=("router",)
    )
    brings(monkeypatch, lora)
    for rank in (1, 0):
        monkeypatch.setattr(init_adapter.processes, "rank", lambda rank=rank: rank)
        found = init_adapter.with_adapter_settings(config(lora_dropout=0.25, train_also=("norms",)))
        printed = " ".join(capsys.readouterr().out.split())
        assert printed == (
            "" if rank else "LoRA settings of a: rank 5 (3 for experts), alpha 7 (9 for experts), rslora, trained "
            "with router, linear_fc1"
        )  # fmt: skip
    assert (found.lora_rank, found.lora_alpha, found.lora_scaling) == (5, 7.0, "rslora")
    assert (found.lora_rank_experts, found.lora_alpha_experts) == (3, 9.0)
    assert found.lora_target_modules == ("linear_fc1",) and found.lora_dropout == 0.25
    assert set(found.train_also) == {"router", "norms"} and found.init_lora == "default"
    # Settings that are the run's already are no news.
    assert init_adapter.with_adapter_settings(found) == found and capsys.readouterr().out == ""
    assert init_adapter.with_adapter_settings(config(init_adapter=None)) == config(init_adapter=None)


def test_an_adapter_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    brings(monkeypatch, LoraSettings(4, 8.0, 0.0, ("linear_qkv",)))
    with pytest.raises(ConfigError) as caught:
        init_adapter.with_adapter_settings(config(expert_adapters="shared"))
    assert (caught.value.expected, caught.value.found) == (
        "--expert-adapters each, or none", "--expert-adapters shared",
    )  # fmt: skip

    def unreadable(_: Path) -> None:
        raise WeightsError("No base.")

    monkeypatch.setattr(init_adapter, "describe_base", unreadable)
    assert init_adapter.with_adapter_settings(config()) == config()


def test_a_resumed_run_does_not_start_from_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    brings(monkeypatch, LoraSettings(4, 8.0, 0.0, ("linear_qkv",)))
    loaded: list[object] = []
    monkeypatch.setattr(checkpoint, "load_adapter", lambda *given: loaded.append(given[0]))
    for values in ({"resume": "yes"}, {"init_adapter": None}, {}):
        init_adapter.load_init_adapter(config(**values), None, "model", Report())  # type: ignore[arg-type]
    assert loaded == ["model"]
    assert capsys.readouterr().out == "Starting from the adapter a\n"
