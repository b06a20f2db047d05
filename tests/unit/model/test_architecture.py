"""Sizes of the model as published, and the configurations that are rejected."""

import pytest

from mixtral_run.config.lora import LoraShapeConfig
from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MIXTRAL_8X7B, MixtralArchitecture

RELEASED = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def test_the_released_config() -> None:
    assert MixtralArchitecture.from_hf_config(RELEASED, where="x") == MIXTRAL_8X7B


def test_transformers_5_writes_rope_elsewhere() -> None:
    newer = {key: value for key, value in RELEASED.items() if key != "rope_theta"}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert MixtralArchitecture.from_hf_config(newer, where="x").rotary_base == 5e5


def test_parameter_counts_are_mixtrals() -> None:
    # The sums of the released checkpoint's tensors, and the paper's 12.9 billion active (arXiv:2401.04088).
    assert MIXTRAL_8X7B.num_parameters == 46_702_792_704
    assert MIXTRAL_8X7B.num_active_parameters == pytest.approx(12.9e9, rel=0.02)


def test_adapter_parameter_counts() -> None:
    # In bf16 these are the 19 MB and 438 MB of adapters of rank 16.
    attention = MIXTRAL_8X7B.num_adapter_parameters(LoraShapeConfig(lora_target_modules=("linear_qkv", "linear_proj")))
    everything = MIXTRAL_8X7B.num_adapter_parameters(LoraShapeConfig(lora_rank=8, lora_rank_experts=16))
    everything += attention / 2
    assert 2 * attention / 1e6 == pytest.approx(19, abs=1)
    assert 2 * everything / 1e6 == pytest.approx(438, abs=20)


def test_everything_that_is_not_mixtral_is_named() -> None:
    with pytest.raises(WeightsError) as caught:
        MixtralArchitecture.from_hf_config(
            {
                **RELEASED,
                "model_type": "llama",
                "num_local_experts": None,
                "hidden_act": "gelu",
            },
            where="config.json",
        )
    assert len(caught.value.problems) == 3


def test_layout_problems() -> None:
    assert MIXTRAL_8X7B.layout_problems(2, 4) == []
    assert len(MIXTRAL_8X7B.layout_problems(3, 3)) == 3
    assert any("query groups" in problem for problem in MIXTRAL_8X7B.layout_problems(16, 8))
