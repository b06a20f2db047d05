"""Scale, version and settings of PEFT's adapter_config.json, by values written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.errors import WeightsError
from mixtral_run.weights.adapter.peft_config import (
    is_peft_directory,
    peft_config_problems,
    read_peft_config,
    scale_of,
    version_of,
)

Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("values", "module", "rank", "expected"),
    [
        ({"lora_alpha": 6}, Q, 4, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, Q, 4, 3.0),
        ({"lora_alpha": 6, "alpha_pattern": {"q_proj": 2}}, Q, 4, 0.5),
        # The whole name, or its end after a dot; the first pattern that matches.
        ({"lora_alpha": 6, "alpha_pattern": {"proj": 2}}, Q, 4, 1.5),
        ({"lora_alpha": 6, "alpha_pattern": {"model": 2}}, Q, 4, 1.5),
        ({"lora_alpha": 6, "alpha_pattern": {Q: 2}}, Q, 4, 0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"k_proj": 1, "layers.1.*.q_proj": 2, "q_proj": 8}}, Q, 4, 0.5),
    ],
)
def test_scales(values: dict[str, Any], module: str, rank: int, expected: float) -> None:
    assert scale_of(values, module, rank) == expected


def test_versions() -> None:
    texts = ("0.21.2.dev0@abc", "1.0", "0.9.10", "x", "", None, "21")
    found = [version_of({"peft_version": text}) for text in texts]
    assert found == [(0, 21), (1, 0), (0, 9), None, None, None, None] and version_of({}) is None


GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task_type": "CAUSAL_LM"},
        {"task_type": None, "bias": "none"},
        {"lora_alpha": 0.5},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {r".*\.(q|k)_proj": 0.5}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": True},
        {"something_new": None, "other": [], "third": 0, "fourth": "", "fifth": {}, "sixth": False},
        {"use_rslora": True, "peft_version": "x", "lora_dropout": 0.5, "target_modules": ["q_proj"]},
    ],
)
def test_settings_that_can_be_represented(changes: dict[str, Any]) -> None:
    assert peft_config_problems({**GOOD, **changes}) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": None}, "peft_type: expected 'LORA'; found None"),
        ({"task_type": "SEQ_CLS"}, "task_type: expected 'CAUSAL_LM'; found 'SEQ_CLS'"),
        ({"bias": "all"}, "bias: expected 'none', since a Mixtral has no biases; found 'all'"),
        ({"r": 4.0}, "r: expected a number above 0; found 4.0"),
        ({"r": True}, "r: expected a number above 0; found True"),
        ({"r": 0}, "r: expected a number above 0; found 0"),
        ({"r": -1}, "r: expected a number above 0; found -1"),
        ({"lora_alpha": None}, "lora_alpha: expected a number above 0; found None"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a number above 0; found inf"),
        ({"rank_pattern": [1]}, "rank_pattern: expected numbers above 0 by names of modules; found [1]"),
        ({"alpha_pattern": {"q": 0}}, "alpha_pattern: expected numbers above 0 by names of modules; found {'q': 0}"),
        (
            {"alpha_pattern": {"(a)+": 1}},
            "alpha_pattern: expected names, or regular expressions without a repeated group; found '(a)+'",
        ),
        ({"later": 7}, "later: expected nothing, since only plain LoRA can be represented; found 7"),
        ({"long": "x" * 99}, f"long: expected nothing, since only plain LoRA can be represented; found {'x' * 60}"),
    ],
)
def test_settings_that_cannot(changes: dict[str, Any], problem: str) -> None:
    assert peft_config_problems({**GOOD, **changes}) == [problem]


def test_a_config_is_a_json_object(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    assert not is_peft_directory(tmp_path)
    with pytest.raises(WeightsError) as caught:
        read_peft_config(tmp_path)
    assert (caught.value.where, caught.value.found) == (str(file), "No such file or directory")
    for text, what in (("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[]", "not a JSON object")):
        file.write_text(text)
        with pytest.raises(WeightsError, match=what):
            read_peft_config(tmp_path)
    file.write_text(json.dumps(GOOD))
    assert is_peft_directory(tmp_path) and read_peft_config(tmp_path) == GOOD
