"""Write a PEFT directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path

from mixtral_run.errors import WeightsError
from mixtral_run.weights.adapter.lora_factors import Factors, UniformFactors, as_bytes
from mixtral_run.weights.adapter.peft_layouts import (
    adapter_config,
    completed,
    fused_entries,
    per_expert_entries,
    trained_entries,
)
from mixtral_run.weights.hf.safetensors_files import header_of
from mixtral_run.weights.io.files import write_atomically


def check_peft(folder: Path, installed: str) -> None:
    """Raise WeightsError if the installed PEFT would read the directory's stacked experts in another axis order.

    Only `peft-fused` depends on it. PEFT itself reports a config that cannot be read.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        written, stacked = config.get("peft_version"), config.get("target_parameters")
    except (OSError, ValueError, AttributeError):
        return
    if stacked and written and _numbers(installed) < _numbers(written):
        raise WeightsError(
            "The installed PEFT reads stacked experts in another axis order.",
            where=str(folder / "adapter_config.json"),
            expected=f"PEFT {written} or later",
            found=f"PEFT {installed}",
            next_command="pip install --upgrade peft, or mixtral-run export --format peft, which has no such order",
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Return major and minor: '0.21.2.dev0@abc' → (0, 21)."""
    return tuple(int(part) for part in version.split(".")[:2])


class PeftDirectory:
    """The tensors of a PEFT directory that is to be written. layout: `peft`, `peft-fused` or `vllm`."""

    def __init__(self, factors: Factors, layout: str) -> None:
        self.fused = layout == "peft-fused"
        # Engines read one rank and one scale, and no patterns.
        self.factors = UniformFactors(factors) if layout == "vllm" else factors
        trained = factors.target_modules
        self.target_modules = trained if self.fused else completed(trained, layout)
        self.max_rank = max(map(self.factors.rank, trained))
        self.entries = (
            fused_entries(self.factors) if self.fused else per_expert_entries(self.factors, self.target_modules)
        )
        self.entries += trained_entries(factors)
        self.dtype, item_size = self.factors.dtype
        self.num_bytes = item_size * sum(prod(entry.shape) for entry in self.entries)

    def write(self, folder: Path, base_model: str | None, advance: Callable[[int], None]) -> None:
        """Write both files; they are on the disk when this returns. The factors' bits do not change."""
        with (folder / "adapter_model.safetensors").open("wb") as stream:
            stream.write(header_of({entry.key: entry.shape for entry in self.entries}, self.dtype))
            for entry in self.entries:
                data = as_bytes(entry.read())
                stream.write(data)
                advance(len(data))
            stream.flush()
            os.fsync(stream.fileno())
        config = adapter_config(self.factors, self.target_modules, base_model, fused=self.fused)
        write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
