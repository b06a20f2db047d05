"""The tensors of an adapter checkpoint, and the HF tensors that they change (docs/formats.md). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.mapping.hf_to_megatron import (
    EMBEDDING_KEY,
    FINAL_LAYERNORM_KEY,
    INPUT_LAYERNORM_KEY,
    LINEAR_FC1_KEY,
    LINEAR_FC2_KEY,
    LINEAR_PROJ_KEY,
    LINEAR_QKV_KEY,
    OUTPUT_LAYER_KEY,
    PRE_MLP_LAYERNORM_KEY,
    ROUTER_KEY,
    RowRanges,
    Shape,
    megatron_tensors,
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


def linear_in_key(module: str, part: str = "linear") -> str:
    """Return the key of A. part: `initial` for that of the start that is subtracted."""
    return LINEAR_KEYS[module].removesuffix(".weight") + f".adapter.{part}_in.weight"


def linear_out_key(module: str, part: str = "linear") -> str:
    """Return the key of B. part: as for A."""
    return LINEAR_KEYS[module].removesuffix(".weight") + f".adapter.{part}_out.weight"


TRAINED_ALSO_KEYS = {
    "embeddings": (EMBEDDING_KEY,),
    "lm_head": (OUTPUT_LAYER_KEY,),
    "norms": (INPUT_LAYERNORM_KEY, PRE_MLP_LAYERNORM_KEY, FINAL_LAYERNORM_KEY),
    "router": (ROUTER_KEY,),
}
"""Keys of the weights of the base that are trained with an adapter; its checkpoint has them under the same keys."""


def trained_also(architecture: MixtralArchitecture, lora: LoraSettings) -> dict[str, RowRanges]:
    """Return HF tensor → its rows in the checkpoint, for the weights of the base that were trained with the adapter."""
    keys = {key for each in lora.train_also for key in TRAINED_ALSO_KEYS[each]}
    return {name: ranges for name, ranges in row_ranges(architecture).items() if ranges.key in keys} if keys else {}


def adapter_tensors(
    architecture: MixtralArchitecture, lora: LoraSettings, parts_of_vocabulary: int = 1
) -> dict[str, Shape]:
    """Return every tensor of the adapter with its global shape. parts_of_vocabulary: TP, which may pad its rows."""
    a = architecture
    layers, experts, hidden, ffn = a.num_layers, a.num_experts, a.hidden_size, a.ffn_hidden_size
    sizes: dict[str, tuple[Shape, int, int]] = {
        "linear_qkv": ((layers,), a.qkv_size, hidden),
        "linear_proj": ((layers,), hidden, a.projection_size),
        "linear_fc1": ((layers, experts), 2 * ffn, hidden),
        "linear_fc2": ((layers, experts), hidden, ffn),
    }
    tensors: dict[str, Shape] = {}
    for module in lora.target_modules:
        leading, rows, columns = sizes[module]
        leading = leading[:1] if lora.shared else leading
        rank = lora.of(module).rank
        for part in ("linear", "initial") if lora.starts_from_weights else ("linear",):
            tensors[linear_in_key(module, part)] = (*leading, rank, columns)
            tensors[linear_out_key(module, part)] = (*leading, rows, rank)
    base = megatron_tensors(architecture, parts_of_vocabulary) if lora.train_also else {}
    return tensors | {key: base[key] for each in lora.train_also for key in TRAINED_ALSO_KEYS[each]}


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
    """Return HF tensor → the part of the adapter that changes it, in the order of the layers."""
    return places_of(architecture, lora.target_modules)


def places_of(architecture: MixtralArchitecture, modules: tuple[str, ...]) -> dict[str, Place]:
    """Return the places of these modules.

    B has the rows of its layer's weight, so the weight mapping applies to both.
    """
    module_of = {LINEAR_KEYS[module]: module for module in modules}
    return {
        name: Place(module_of[ranges.key], ranges.leading, ranges.rows)
        for name, ranges in row_ranges(architecture).items()
        if ranges.key in module_of
    }
