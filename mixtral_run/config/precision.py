"""Precisions of the frozen weights, which training, generation and `plan` share. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.config.fields import MEMORY, Config, setting
from mixtral_run.config.lora import LoraShapeConfig

BASE_PRECISIONS = ("bf16", "fp8", "nf4")
"""Storage of the frozen experts: in the model's dtype (bf16), in 8 bit (fp8) or in 4 bit (nf4)."""
QUANTIZED_CACHE_MODES = ("yes", "use", "no")
"""Use of the cache of quantized experts: read it or create it, only read it, ignore it."""
ATTENTION_PRECISIONS = ("bf16", "fp8")
"""Storage of the frozen projections of attention and of the output layer: in the model's dtype (bf16), or in 8 bit."""


BASE_PRECISION_HELP = (
    "Storage of the frozen experts. bf16: as --dtype. fp8: 8 bit, multiplied in 8 bit on H100 and H200. nf4: 4 bit, "
    "for GPUs of 40 GB."
)


@dataclass(frozen=True, kw_only=True)
class StoredBaseConfig(Config):
    """Form in which a model that is not trained holds its base."""

    base_precision: str = setting("bf16", help=BASE_PRECISION_HELP, choices=BASE_PRECISIONS, section=MEMORY)
    quantized_cache: str = setting(
        "use",
        help="Cache of the fp8 or nf4 experts, in LOAD/quantised-fp8 (45 GB) or LOAD/quantised-nf4 (24 GB). use: read "
        "it if finetune left one. yes: create it if it is missing. no: ignore it.",
        choices=QUANTIZED_CACHE_MODES,
        section=MEMORY,
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.quantized_cache == "yes" and self.base_precision == "bf16":
            found.append("--quantized-cache yes: expected --base-precision fp8 or nf4 with it; found bf16")
        return found


@dataclass(frozen=True, kw_only=True)
class AttentionPrecisionConfig(LoraShapeConfig):
    """Setting of the precision of attention and of the output layer."""

    attention_precision: str = setting(
        "bf16",
        help="Storage of the frozen projections of attention (linear_qkv, linear_proj) and of the output layer (lm "
        "head). bf16: as --dtype. fp8: 8 bit, multiplied in 8 bit on H100 and H200, which is faster and needs as much "
        "memory. Other GPUs refuse fp8.",
        choices=ATTENTION_PRECISIONS,
        section=MEMORY,
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.attention_precision == "fp8" and "lm_head" in self.train_also:
            found.append(
                "--attention-precision fp8: expected --train-also without lm_head, since the output layer is stored in "
                f"8 bit and frozen; found --train-also {','.join(self.train_also)}"
            )
        return found
