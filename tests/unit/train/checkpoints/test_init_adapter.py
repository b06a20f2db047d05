"""Settings next to --init-adapter that the adapter replaces are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.train.checkpoints.init_adapter import _not_used

CONFIG = FinetuneConfig(load=Path("base"), save=Path("adapter"), mock_data=True, init_adapter=Path("first"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, {}),
        ({"lora_rank": 4}, {"lora_rank": 4}),
        ({"lora_rank": 8, "lora_alpha": 7}, {"lora_alpha": 7}),
        ({"lora_rank_experts": 2}, {"lora_rank_experts": 2}),
    ],
)
def test_a_rank_that_is_not_that_of_the_adapter_is_named(given: dict[str, Any], named: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **given)
    assert _not_used(config, dataclasses.replace(config, lora_rank=8, lora_alpha=24, lora_rank_experts=None)) == named
