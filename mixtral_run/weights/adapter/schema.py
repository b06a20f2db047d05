"""The tensors of an adapter checkpoint, and the HF tensors that they change (docs/formats.md). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.mapping.hf_to_megatron import (
    LINEAR_FC1_KEY,
    LINEAR_FC2_KEY,
    LINEAR_PROJ_KEY,
    LINEAR_QKV_KEY,
    Shape,
    row_ranges,
)

LINEAR_KEYS = {
    "linear_qkv": LINEAR_QKV_KEY,
    "linear_proj": LINEAR_PROJ_KEY,
    "linear_fc1": LINEAR_FC1_KEY,
    "linear_fc2": LINEAR_FC2_KEY,
}
OPTIMIZER_PREFIX = "optimizer."
"""Prefix of the optimizer state in an adapter's folder, which is not part of the adapter."""


def is_of_optimizer(key: str) -> bool:
    """Return True for the key of a tensor that belongs to the optimizer."""
    return key.startswith(OPTIMIZER_PREFIX)


def linear_in_key(module: str) -> str:
    """Return the key of A."""
    return LINEAR_KEYS[module].removesuffix(".weight") + ".adapter.linear_in.weight"


def linear_out_key(module: str) -> str:
    """Return the key of B."""
    return LINEAR_KEYS[module].removesuffix(".weight") + ".adapter.linear_out.weight"


def adapter_tensors(architecture: MixtralArchitecture, lora: LoraSettings) -> dict[str, Shape]:
    """Return every tensor of the adapter with its global shape."""
    a, r = architecture, lora.rank
    layers, experts, hidden, ffn = a.num_layers, a.num_experts, a.hidden_size, a.ffn_hidden_size
    shapes: dict[str, tuple[Shape, Shape]] = {
        "linear_qkv": ((layers, r, hidden), (layers, a.qkv_size, r)),
        "linear_proj": ((layers, r, a.projection_size), (layers, hidden, r)),
        "linear_fc1": ((layers, experts, r, hidden), (layers, experts, 2 * ffn, r)),
        "linear_fc2": ((layers, experts, r, ffn), (layers, experts, hidden, r)),
    }
    tensors: dict[str, Shape] = {}
    for module in lora.target_modules:
        tensors[linear_in_key(module)], tensors[linear_out_key(module)] = shapes[module]
    return tensors


@dataclass(frozen=True)
class Place:
    """The part of an adapter that changes one HF tensor: all of A, and these rows of B in order."""

    module: str
    leading: Shape  # layer, or layer and expert
    rows: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)


def places(architecture: MixtralArchitecture, lora: LoraSettings) -> dict[str, Place]:
    """Return HF tensor → the part of the adapter that changes it, in the order of the layers.

    B has the rows of its layer's weight, so the weight mapping applies to both.
    """
    module_of = {LINEAR_KEYS[module]: module for module in lora.target_modules}
    return {
        name: Place(module_of[ranges.key], ranges.leading, ranges.rows)
        for name, ranges in row_ranges(architecture).items()
        if ranges.key in module_of
    }
