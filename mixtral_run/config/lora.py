"""Settings of the adapters, which `finetune` and `plan` share. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.config.fields import LORA, Config, setting

LORA_SCALINGS = ("standard", "rslora")
LORA_TARGET_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The linear layers that can have an adapter, by Megatron's names."""


@dataclass(frozen=True, kw_only=True)
class LoraShapeConfig(Config):
    """Settings of the adapters that decide how much memory they take."""

    lora_rank: int = setting(16, help="Rank r of every adapter.", minimum=1, section=LORA)
    lora_dropout: float = setting(
        0.0, help="Dropout on the input of every adapter.", minimum=0, maximum=0.99, section=LORA
    )
    lora_target_modules: tuple[str, ...] = setting(
        LORA_TARGET_MODULES,
        help="Layers that get an adapter, separated by commas.",
        choices=LORA_TARGET_MODULES,
        section=LORA,
    )


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LoraShapeConfig):
    """All settings of the adapters."""

    lora_alpha: float = setting(
        32.0, help="Adapters are scaled by alpha / rank; see --lora-scaling.", above=0, section=LORA
    )
    lora_scaling: str = setting(
        "standard",
        help="standard: adapters are scaled by alpha / rank. rslora (rank-stabilized LoRA, arXiv:2312.03732): by "
        "alpha / √rank, so that larger ranks do not learn more slowly.",
        choices=LORA_SCALINGS,
        section=LORA,
    )
    lora_plus_ratio: float = setting(
        1.0,
        help="Learning rate of B as a multiple of that of A (LoRA+, arXiv:2402.12354). Its authors take 16, with a "
        "lower --lr.",
        above=0,
        section=LORA,
    )
