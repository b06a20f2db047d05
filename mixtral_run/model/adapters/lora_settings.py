"""The settings of a LoRA adapter, shared by training, checkpoints and exports. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

from mixtral_run.config.lora import EXPERT_ADAPTERS, LORA_EXPERT_MODULES, TRAINED_ALSO, shares_expert_adapters
from mixtral_run.config.verbs.training import FinetuneConfig


@dataclass(frozen=True)
class LoraSettings:
    """Rank, alpha and dropout of an adapter, and the linear layers that carry it.

    scaling: "standard" or "rslora", how the scale follows from alpha and rank.
    shared: True if all experts of a layer have one adapter together.
    train_also: weights of the base that are trained as well, see trained_also.py.
    init: how A and B start, see start_from_weights.py.
    expert_rank, expert_alpha: of the adapters of the experts where they differ; None if they do not.
    seed: only for the initial values of A; it is not stored with an adapter.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    seed: int = 0
    scaling: str = "standard"
    expert_rank: int | None = None
    expert_alpha: float | None = None
    init: str = "default"
    train_also: tuple[str, ...] = ()
    shared: bool = False

    @property
    def starts_from_weights(self) -> bool:
        """Return True if A and B start as a part of the weight, of which a frozen copy is subtracted."""
        return self.init != "default"

    @property
    def computed_rank(self) -> int:
        """Return the rank of the products: twice the rank with a frozen start."""
        return 2 * self.rank if self.starts_from_weights else self.rank

    @property
    def scale(self) -> float:
        """Return the factor of B·A in `W·x + scale · B·A·x`: alpha / rank, or alpha / √rank with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    def of(self, module: str) -> LoraSettings:
        """Return the settings of one linear layer: its own rank and alpha, and so its own scale."""
        if module not in LORA_EXPERT_MODULES:
            return replace(self, expert_rank=None, expert_alpha=None)
        rank, alpha = self.expert_rank or self.rank, self.expert_alpha or self.alpha
        return replace(self, rank=rank, alpha=alpha, expert_rank=None, expert_alpha=None)

    def describe(self) -> str:
        """Return rank, alpha and scaling as reports name them."""
        experts = self.of(LORA_EXPERT_MODULES[0])
        rank = f"rank {self.rank}" + (f" ({experts.rank} for experts)" if experts.rank != self.rank else "")
        alpha = f"alpha {self.alpha:g}" + (f" ({experts.alpha:g} for experts)" if experts.alpha != self.alpha else "")
        others = [self.scaling] if self.scaling != "standard" else []
        others += [f"start {self.init}"] if self.starts_from_weights else []
        others += ["shared by the experts of a layer"] if self.shared else []
        others += [f"trained with {' + '.join(self.train_also)}"] if self.train_also else []
        return ", ".join([rank, alpha, *others])

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
            config.lora_rank_experts if config.lora_rank_experts != config.lora_rank else None,
            config.lora_alpha_experts if config.lora_alpha_experts != config.lora_alpha else None,
            config.init_lora,
            tuple(each for each in TRAINED_ALSO if each in config.train_also),
            shares_expert_adapters(config),
        )

    def all_values(self) -> dict[str, Any]:
        """Return the settings as JSON values by their names in the config of a run, which resuming compares."""
        return {
            "lora_rank": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "lora_target_modules": list(self.target_modules),
            "lora_scaling": self.scaling,
            "lora_rank_experts": self.expert_rank,
            "lora_alpha_experts": self.expert_alpha,
            "init_lora": self.init,
            "train_also": list(self.train_also),
            "expert_adapters": EXPERT_ADAPTERS[self.shared],
        }

    def to_mapping(self) -> dict[str, Any]:
        """Return the settings as JSON values, in the names and the order of mixtral_run.json.

        Settings that are newer than format 1 are left out where they have their default.
        """
        return {name: value for name, value in self.all_values().items() if value != _DEFAULTS.get(name, _NO_DEFAULT)}


LORA_SETTINGS = frozenset(LoraSettings(1, 1.0, 0.0, ()).all_values())
"""Names of the settings that mixtral_run.json may have of an adapter."""
_NO_DEFAULT = object()
_DEFAULTS: dict[str, Any] = {
    "lora_scaling": "standard",
    "lora_rank_experts": None,
    "lora_alpha_experts": None,
    "init_lora": "default",
    "train_also": [],
    "expert_adapters": "each",
}
