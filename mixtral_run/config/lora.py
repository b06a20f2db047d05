"""Settings of the adapters, which `finetune` and `plan` share. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from mixtral_run.config.fields import LORA, Config, flag_of, setting

LORA_SCALINGS = ("standard", "rslora")
EXPERT_ADAPTERS = ("each", "shared")
TRAINED_ALSO = ("embeddings", "lm_head", "norms", "router")
"""Weights of the base that may be trained with the adapters."""
LORA_INITS = ("default", "pissa", "olora")
LORA_TARGET_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The linear layers that can have an adapter, by Megatron's names."""
LORA_EXPERT_MODULES = ("linear_fc1", "linear_fc2")
"""Those of them that every expert has."""


class LoraShape(Protocol):
    """What decides how large the adapters are: the settings of a run, or a workload of the planner."""

    @property
    def lora_rank(self) -> int: ...
    @property
    def lora_rank_experts(self) -> int | None: ...
    @property
    def lora_target_modules(self) -> tuple[str, ...]: ...
    @property
    def init_lora(self) -> str: ...
    @property
    def train_also(self) -> tuple[str, ...]: ...
    @property
    def expert_adapters(self) -> str: ...


def shares_expert_adapters(shape: LoraShape) -> bool:
    """Return True if all experts of a layer have one adapter together."""
    return shape.expert_adapters == EXPERT_ADAPTERS[1]


def has_frozen_start(shape: LoraShape) -> bool:
    """Return True if every adapter has a frozen copy of its start next to it."""
    return shape.init_lora != LORA_INITS[0]


def module_rank(shape: LoraShape, module: str) -> int:
    """Return the rank of the adapters of a linear layer."""
    of_experts = shape.lora_rank_experts if module in LORA_EXPERT_MODULES else None
    return of_experts or shape.lora_rank


@dataclass(frozen=True, kw_only=True)
class LoraShapeConfig(Config):
    """Settings of the adapters that decide how much memory they take."""

    lora_rank: int = setting(16, help="Rank r of the adapters.", minimum=1, section=LORA)
    lora_rank_experts: int | None = setting(
        None, help="Rank of the adapters of the experts. Default: that of --lora-rank.", minimum=1, section=LORA
    )
    init_lora: str = setting(
        "default",
        help="default: A is random and B is 0. pissa, olora: A and B start as the largest part of the weight, by its "
        "singular values (arXiv:2404.02948) or by QR (arXiv:2406.01775). The base stays as it is, and a frozen copy of "
        "this start is subtracted. The copy doubles the rank of what is computed and exported.",
        choices=LORA_INITS,
        section=LORA,
    )
    lora_dropout: float = setting(
        0.0, help="Dropout on the input of every adapter.", minimum=0, maximum=0.99, section=LORA
    )
    lora_target_modules: tuple[str, ...] = setting(
        LORA_TARGET_MODULES,
        help="Layers that get an adapter, separated by commas.",
        choices=LORA_TARGET_MODULES,
        section=LORA,
    )

    expert_adapters: str = setting(
        EXPERT_ADAPTERS[0],
        help="each: every expert has its own adapter. shared: all experts of a layer have one together, as in "
        "Megatron-Bridge.",
        choices=EXPERT_ADAPTERS,
        section=LORA,
    )
    train_also: tuple[str, ...] = setting(
        (),
        help="Weights of the base to train with the adapters, separated by commas: embeddings, lm_head, norms, router. "
        "They are saved with the adapter in fp32, and exported as PEFT's modules_to_save.",
        choices=TRAINED_ALSO,
        section=LORA,
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if not set(LORA_EXPERT_MODULES) & set(self.lora_target_modules):
            wanted = " or ".join(LORA_EXPERT_MODULES)
            found += [
                f"{flag_of(item.name)}: expected {wanted} in --lora-target-modules; found none"
                for item in fields(self)
                if item.name in ("lora_rank_experts", "lora_alpha_experts") and getattr(self, item.name) is not None
            ]
            if shares_expert_adapters(self):
                found.append(f"--expert-adapters shared: expected {wanted} in --lora-target-modules; found none")
        elif shares_expert_adapters(self) and has_frozen_start(self):
            found.append(
                f"--init-lora {self.init_lora}: expected --expert-adapters each, since a shared adapter cannot start "
                "from the weights of every expert; found shared"
            )
        return found


LORA_SHAPE = tuple(item.name for item in fields(LoraShapeConfig))
"""Names of the settings that decide how much memory adapters take."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LoraShapeConfig):
    """All settings of the adapters."""

    lora_alpha: float = setting(
        32.0, help="Adapters are scaled by alpha / rank; see --lora-scaling.", above=0, section=LORA
    )
    lora_alpha_experts: float | None = setting(
        None, help="Alpha of the adapters of the experts. Default: that of --lora-alpha.", above=0, section=LORA
    )
    lora_scaling: str = setting(
        "standard",
        help="standard: adapters are scaled by alpha / rank. rslora (rank-stabilized LoRA, arXiv:2312.03732): by "
        "alpha / √rank, so that larger ranks do not learn more slowly.",
        choices=LORA_SCALINGS,
        section=LORA,
    )
    router_aux_loss: float = setting(
        0.0,
        help="Coefficient of the load balancing loss of the routers, as HF's router_aux_loss_coef (Mixtral: 0.02). It "
        "needs --train-also router.",
        minimum=0,
        section=LORA,
    )
    lora_plus_ratio: float = setting(
        1.0,
        help="Learning rate of B as a multiple of that of A (LoRA+, arXiv:2402.12354). Its authors take 16, with a "
        "lower --lr.",
        above=0,
        section=LORA,
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.router_aux_loss and "router" not in self.train_also:
            found.append("--router-aux-loss: expected --train-also router with it; found a frozen router")
        return found


@dataclass(frozen=True)
class WeightedPath:
    """One `--adapter PATH[:WEIGHT]`. text_after: what follows the path, with its colon."""

    path: Path
    weight: float = 1.0
    text_after: str = ""


def weighted_path(text: str) -> WeightedPath:
    """Return the adapter that a text names. A folder that exists is taken as it is written."""
    path, _, tail = text.rpartition(":")
    if not path or _is_there(text):
        return WeightedPath(Path(text))
    try:
        return WeightedPath(Path(path), float(tail), f":{tail}")
    except ValueError:
        return WeightedPath(Path(text))


def adapter_problems(texts: Sequence[str]) -> list[str]:
    """Return a line for each `--adapter PATH[:WEIGHT]` that cannot be meant as it is written."""
    found = []
    given = [weighted_path(text) for text in texts]
    for text, each in zip(texts, given, strict=True):
        path, _, tail = text.rpartition(":")
        if not text or str(each.path) in ("", "."):
            found.append(f"--adapter: expected PATH[:WEIGHT]; found {text!r}")
        elif each.text_after and (not math.isfinite(each.weight) or each.weight == 0):
            found.append(f"--adapter {text}: expected a finite weight other than 0; found {tail}")
        elif path and not each.text_after and _is_there(text) and _is_there(path):
            found.append(
                f"--adapter {text}: {text} and {path} are both there, so it may mean a folder with a colon, or a "
                f"weight; write {text}:1 for the folder, or rename it"
            )
        elif path and not each.text_after and _is_there(path):
            found.append(f"--adapter {text}: expected a number after the last colon, as in {path}:0.5; found {tail!r}")
    without = [text for text, each in zip(texts, given, strict=True) if not each.text_after]
    if 0 < len(without) < len(texts):
        found.append(f"--adapter: expected a weight for every adapter or for none; found none for {without[0]}")
    return found


def _is_there(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False
