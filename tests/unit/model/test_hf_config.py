"""The decision about each field of config.json, and the configs that Mistral AI and others released."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.model.hf_config import DECISIONS, REFUSED, config_notes, config_problems, quantization, set_in_config
from tests.support.references.model_cases import RELEASED_CONFIGS

RELEASED = RELEASED_CONFIGS["Mixtral-8x7B-v0.1"]


def names_of_transformers() -> Iterator[str]:
    """Every name that the installed transformers reads from, or writes to, the config.json of a Mixtral."""
    from transformers import MixtralConfig

    yield from (field.name for field in fields(MixtralConfig))
    yield from MixtralConfig().to_dict()
    yield from MixtralConfig.attribute_map


def test_every_field_of_transformers_has_a_decision() -> None:
    undecided = set(names_of_transformers()) - set(DECISIONS)
    assert not undecided, f"decide about {sorted(undecided)} in model/hf_config.py"
    assert all(decision.why for decision in DECISIONS.values())


def test_the_defaults_of_transformers_are_accepted_and_nothing_is_reported() -> None:
    from transformers import MixtralConfig

    values = json.loads(MixtralConfig().to_json_string(use_diff=False))
    assert config_problems(values) == []
    assert config_notes(values) == []


@pytest.mark.parametrize("name", RELEASED_CONFIGS)
def test_released_configs_are_accepted(name: str) -> None:
    assert config_problems(RELEASED_CONFIGS[name]) == []
    assert config_notes(RELEASED_CONFIGS[name]) == []


@pytest.mark.parametrize("name", [name for name, decision in DECISIONS.items() if decision.kind == REFUSED])
def test_refused_fields_are_refused_at_any_other_value(name: str) -> None:
    for value in DECISIONS[name].accepted:
        assert config_problems({**RELEASED, name: value}) == []
    (problem,) = config_problems({**RELEASED, name: 7})
    assert problem.startswith(f"{name}: ") and "7" in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type: expected 'default'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type: expected 'default'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type: expected 'default'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: expected 1",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one object of settings for all layers"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "expected one rotary base; found rope_theta 1000000.0"),
        ({"partial_rotary_factor": 0.5}, "whole heads"),
        ({"attention_bias": True}, "attention_bias: expected false; found True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu'; found 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected false"),
        ({"router_jitter_noise": 0.1}, "set it to 0 in config.json"),
        ({"architectures": ["MixtralForSequenceClassification"]}, "in place of lm_head"),
        ({"num_experts": 4}, "num_experts: expected num_local_experts (8); found 4"),
        ({"num_key_value_heads": 5}, "expected a divisor of 32"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: expected a number above 0"),
        (
            {"rope_theta": None, "rope_scaling": {"rope_theta": -1}},
            "rope_scaling.rope_theta: expected a number above 0",
        ),
    ],
)
def test_what_is_refused_and_why(changes: dict[str, Any], said: str) -> None:
    (problem,) = config_problems({**RELEASED, **changes})
    assert said in problem


def test_every_spelling_of_the_rotary_base_is_read() -> None:
    without = {key: value for key, value in RELEASED.items() if key != "rope_theta"}
    for changes, base in (
        ({}, 1e6),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 4e5}}, 4e5),
        ({"rope_scaling": {"type": "default", "rope_theta": 3e5}}, 3e5),
        ({"rope_theta": 2e5, "rope_scaling": None, "rope_parameters": {"rope_theta": 200000}}, 2e5),
    ):
        assert MixtralArchitecture.from_hf_config({**without, **changes}, where="x").rotary_base == base


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "awq", "bits": 4}, "AWQ, 4 bit"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ, 3 bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes, 8 bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "new-one"}, "new-one"),
    ],
)
def test_quantized_models_are_refused_by_their_method(config: dict[str, Any], name: str) -> None:
    assert quantization(config) == name
    values = {**RELEASED, "quantization_config": config, "_name_or_path": "some/base"}
    with pytest.raises(WeightsError) as caught:
        MixtralArchitecture.from_hf_config(values, where="config.json")
    (problem,) = caught.value.problems
    assert f"quantized with {name}" in problem and "'some/base'" in problem and "--base-precision nf4" in problem


def test_fields_that_nobody_knows_and_losses_that_are_left_out_are_reported_by_name() -> None:
    values = {**RELEASED, "my_field": 1, "output_router_logits": True, "auto_map": {"AutoConfig": "x.Y"}}
    values["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default", "factor": 2.0}
    notes = "\n".join(config_notes(values))
    assert "not used: my_field, rope_parameters.factor" in notes
    assert "output_router_logits True" in notes and "load balancing loss" in notes and "auto_map" in notes
    assert len(config_notes(values)) == 3


def test_a_window_is_part_of_the_architecture_only_where_there_is_one() -> None:
    plain = MixtralArchitecture.from_hf_config(RELEASED, where="x")
    early = MixtralArchitecture.from_hf_config({**RELEASED, "sliding_window": 4096}, where="x")
    assert plain.sliding_window is None and early.sliding_window == 4096
    assert "sliding_window" not in plain.to_mapping() and plain.differing(early) == ["sliding_window"]
    for each in (plain, early):
        assert MixtralArchitecture.from_mapping(each.to_mapping()) == each


def test_the_printed_command_changes_config_json(tmp_path: Path) -> None:
    folder = tmp_path / "a model's"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1, "other": [2]}))
    subprocess.run(["bash", "-c", set_in_config(folder, "vocab_size", 32064)], check=True)
    assert json.loads((folder / "config.json").read_text()) == {"vocab_size": 32064, "other": [2]}


@pytest.mark.parametrize(
    ("vocabulary", "tp", "padded"),
    # As megatron/training/tokenizer pads: a multiple of 128 · TP; not at all where TP divides.
    [(32000, 2, 32000), (32000, 8, 32000), (32001, 1, 32001), (32001, 2, 32256), (32002, 4, 32256), (103, 2, 256)],
)
def test_vocabularies_that_tp_does_not_divide_are_padded(vocabulary: int, tp: int, padded: int) -> None:
    values = {**RELEASED, "vocab_size": vocabulary}
    assert MixtralArchitecture.from_hf_config(values, where="x").padded_vocab_size(tp) == padded
