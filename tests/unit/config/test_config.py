"""Configs: the way to JSON and back, limits, all problems at once."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.fields import Config
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.verbs import plan, training, trial, weights
from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import ConfigError

DECLARED = vars(training) | vars(weights) | vars(plan) | vars(trial)
ALL = [
    value
    for value in DECLARED.values()
    if isinstance(value, type) and issubclass(value, Config) and value is not Config
]
REQUIRED: dict[str, Any] = {
    "hf_model_path": "model",
    "output_path": Path("out"),
    "load": Path("checkpoint"),
    "save": Path("adapter"),
    "adapter": ("adapter",),
}


def filled(config_class: type[Config]) -> Config:
    """A config with its required fields set."""
    names = [item.name for item in dataclasses.fields(config_class) if item.default is dataclasses.MISSING]
    return config_class(**{name: REQUIRED[name] for name in names})


def test_an_output_layer_in_8_bit_is_not_trained() -> None:
    given: dict[str, Any] = {"load": Path("base"), "save": Path("adapter"), "mock_data": True}
    assert FinetuneConfig(**given, attention_precision="fp8", train_also=("norms", "embeddings")).problems() == []
    (problem,) = FinetuneConfig(**given, attention_precision="fp8", train_also=("norms", "lm_head")).problems()
    assert problem.startswith("--attention-precision fp8") and problem.endswith("found --train-also norms,lm_head")


@pytest.mark.parametrize("config_class", ALL)
def test_json_round_trip(config_class: type[Config]) -> None:
    config = filled(config_class)
    assert config_class.from_json(config.to_json()) == config


def test_round_trip_keeps_every_kind_of_value() -> None:
    config = FinetuneConfig(
        load=Path("a b"),
        save=Path("ü"),
        data_path=("x.jsonl",),
        lora_target_modules=("linear_qkv",),
        lr=3e-4,
        nproc_per_node=4,
        resume="yes",
    )
    assert FinetuneConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("config_class", ALL)
def test_every_help_text_ends_a_sentence(config_class: type[Config]) -> None:
    for item in dataclasses.fields(config_class):
        assert item.metadata["help"].strip().endswith("."), item.name


def test_unknown_missing_and_mistyped_keys_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig.from_mapping(
            {"lod": "x", "train_iters": "ten", "save": "s", "lora_target_modules": "linear_qkv"}
        )
    text = str(caught.value)
    assert "unknown setting 'lod'" in text
    assert "--load is required" in text
    assert "--train-iters: expected a whole number; found 'ten'" in text
    assert "--lora-target-modules: expected a list" in text
    with pytest.raises(ConfigError, match="--lora-rank: expected at least 1; found 0"):
        FinetuneConfig.from_mapping({"save": "s", "lora_rank": 0})


def test_former_names_are_accepted_as_keys_but_not_with_the_current_one() -> None:
    values = {"load": "a", "save": "s", "mock_data": True, "keep_quantised": "use"}
    config = FinetuneConfig.from_mapping(values)
    assert config.quantized_cache == "use"
    assert "keep_quantised" not in config.to_mapping()
    with pytest.raises(ConfigError, match="'keep_quantised' is another name of 'quantized_cache'"):
        FinetuneConfig.from_mapping(values | {"quantized_cache": "use"})


@pytest.mark.parametrize("config_class", ALL)
def test_no_alias_hides_a_field(config_class: type[Config]) -> None:
    fields = dataclasses.fields(config_class)
    aliases = [alias for item in fields for alias in item.metadata["aliases"]]
    assert len({*aliases, *(item.name for item in fields)}) == len(aliases) + len(fields)


def test_broken_limits_are_reported_together() -> None:
    config = FinetuneConfig(
        load=Path("a"),
        save=Path("b"),
        tensor_model_parallel_size=2,
        expert_tensor_parallel_size=2,
        lora_rank=0,
        lora_dropout=1.5,
        lr=1e-5,
        min_lr=1e-4,
        lora_target_modules=("linear_kv",),
        lr_warmup_iters=10,
        seq_length=33,
    )
    problems = "\n".join(config.problems())
    for flag in (
        "--expert-tensor-parallel-size: expected 1",
        "--lora-rank: expected at least 1",
        "--lora-dropout: expected at most 0.99",
        "--min-lr: expected at most --lr",
        "--lora-target-modules: expected one of",
        "--lr-warmup-iters: expected fewer",
        "--seq-length: expected a multiple",
        "--data-path FILE or --mock-data",
    ):
        assert flag in problems
    with pytest.raises(ConfigError):
        config.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_invalid_learning_rate_is_refused(value: float) -> None:
    config = FinetuneConfig(load=Path("a"), save=Path("b"), mock_data=True, lr=value)
    assert any(problem.startswith("--lr:") for problem in config.problems())


@pytest.mark.parametrize("recompute", ["full", "except-attention", "offload"])
def test_some_layers_run_again_only_where_layers_do(recompute: str) -> None:
    given: dict[str, Any] = {"load": Path("b"), "save": Path("s"), "mock_data": True}
    assert FinetuneConfig(**given, recompute=recompute, recompute_layers=3).problems() == []
    assert FinetuneConfig(**given, recompute_activations=True, recompute_layers=3).problems() == []
    for others, found in (({"recompute": "selective"}, "--recompute selective"), ({}, "no --recompute")):
        (problem,) = FinetuneConfig(**given, **others, recompute_layers=3).problems()
        assert problem.startswith("--recompute-layers: expected --recompute full, except-attention or offload with it")
        assert problem.endswith(f"; found {found}")
    (problem,) = FinetuneConfig(**given, recompute=recompute, recompute_layers=3, expert_chunks=2).problems()
    assert problem.startswith("--recompute-layers: expected without --expert-chunks")
    assert FinetuneConfig(**given, recompute=recompute, expert_chunks=2).problems() == []
    assert PretrainConfig(load=Path("b"), mock_data=True, recompute=recompute, recompute_layers=3).problems() == []
    (problem,) = FinetuneConfig(**given, recompute=recompute, recompute_layers=0).problems()
    assert problem.startswith("--recompute-layers")


def test_world_size_problems() -> None:
    layout = LaunchConfig(tensor_model_parallel_size=2, expert_model_parallel_size=4)
    assert layout.world_size_problems(4) == []
    assert layout.world_size_problems(8) == []
    assert len(layout.world_size_problems(2)) == 1
    assert len(layout.world_size_problems(3)) == 2


def test_generate_needs_a_prompt() -> None:
    assert GenerateConfig(load=Path("x")).problems()
    assert not GenerateConfig(load=Path("x"), prompt=("a",)).problems()
    assert GenerateConfig(load=Path("x"), prompt=("",)).problems()


def test_default_layout() -> None:
    config = ConvertConfig(hf_model_path="m", output_path=Path("o"))
    assert (config.tensor_model_parallel_size, config.expert_model_parallel_size) == (2, 4)
    assert config.expert_tensor_parallel_size == 1


def test_a_number_that_no_float_holds_is_a_problem_of_its_setting() -> None:
    with pytest.raises(ConfigError, match="--lr: "):
        FinetuneConfig.from_mapping({"load": "a", "save": "b", "mock_data": True, "lr": 10**400})
