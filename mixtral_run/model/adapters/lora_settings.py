"""The settings of a LoRA adapter, shared by training, checkpoints and exports. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from mixtral_run.config.verbs.training import FinetuneConfig


@dataclass(frozen=True)
class LoraSettings:
    """Rank, alpha and dropout of an adapter, and the linear layers that carry it.

    scaling: "standard" or "rslora", how the scale follows from alpha and rank.
    seed: only for the initial values of A; it is not stored with an adapter.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    seed: int = 0
    scaling: str = "standard"

    @property
    def scale(self) -> float:
        """Return the factor of B·A in `W·x + scale · B·A·x`: alpha / rank, or alpha / √rank with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @classmethod
    def from_config(cls, config: FinetuneConfig) -> Self:
        """Return the settings that a training run was asked for."""
        return cls(
            config.lora_rank,
            config.lora_alpha,
            config.lora_dropout,
            config.lora_target_modules,
            config.seed,
            config.lora_scaling,
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return the settings as JSON values, in the names and the order of mixtral_run.json."""
        return {
            "lora_rank": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "lora_target_modules": list(self.target_modules),
            # Adapters of standard scaling have no such field.
            **({"lora_scaling": self.scaling} if self.scaling != "standard" else {}),
        }
