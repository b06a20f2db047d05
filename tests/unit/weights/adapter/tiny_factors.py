"""A tiny model and factors that are held in memory, with Megatron's rows written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.adapter.lora_factors import Factors
from mixtral_run.weights.adapter.schema import Place

TINY = MixtralArchitecture(
    num_layers=2, hidden_size=8, ffn_hidden_size=6, num_attention_heads=4, num_query_groups=2, kv_channels=4,
    num_experts=3, moe_router_topk=2, vocab_size=10, max_position_embeddings=64, rotary_base=1e6,
    layernorm_epsilon=1e-5,
)  # fmt: skip
SIZES = {"linear_qkv": (32, 8), "linear_proj": (8, 16), "linear_fc1": (12, 8), "linear_fc2": (8, 6)}
"""Rows and columns of each linear layer. Queries: 4 heads of 4; keys and values: 2 of 4."""
ROWS: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    # Two groups of two queries, a key and a value, with four rows each.
    "self_attn.q_proj": ("linear_qkv", ((0, 8), (16, 24))),
    "self_attn.k_proj": ("linear_qkv", ((8, 12), (24, 28))),
    "self_attn.v_proj": ("linear_qkv", ((12, 16), (28, 32))),
    "self_attn.o_proj": ("linear_proj", ((0, 8),)),
    "w1": ("linear_fc1", ((0, 6),)),
    "w3": ("linear_fc1", ((6, 12),)),
    "w2": ("linear_fc2", ((0, 8),)),
}


def places(*modules: str) -> dict[str, Place]:
    """Return HF tensor → module, layer (and expert), and rows."""
    found = {}
    for layer in range(2):
        for name, (module, rows) in ROWS.items():
            if module not in modules:
                continue
            if name.startswith("self_attn"):
                found[f"model.layers.{layer}.{name}.weight"] = Place(module, (layer,), rows)
                continue
            for expert in range(3):
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                found[key] = Place(module, (layer, expert), rows)
    return found


class Held(Factors):
    """Random factors of some modules. ranks, scales: of each module."""

    def __init__(
        self,
        ranks: Mapping[str, int],
        scales: Mapping[str, float],
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        also: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(TINY, places(*ranks))
        self.ranks, self.scales, self.kind, self.also = dict(ranks), dict(scales), dtype, dict(also or {})
        generator = torch.Generator().manual_seed(seed)
        self.held: dict[tuple[str, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}
        for module, rank in ranks.items():
            rows, columns = SIZES[module]
            experts = [(layer, expert) for layer in range(2) for expert in range(3)]
            for leading in experts if "fc" in module else [(0,), (1,)]:
                a = torch.randn(rank, columns, generator=generator).to(dtype)
                b = torch.randn(rows, rank, generator=generator).to(dtype)
                self.held[module, leading] = a, b

    @property
    def target_modules(self) -> tuple[str, ...]:
        return tuple(self.ranks)

    @property
    def dtype(self) -> tuple[str, int]:
        return str(self.kind).removeprefix("torch."), self.kind.itemsize

    def rank(self, module: str) -> int:
        return self.ranks[module]

    def scale(self, module: str) -> float:
        return self.scales[module]

    def inner(self, module: str, leading: tuple[int, ...]) -> torch.Tensor:
        return self.held[module, leading][0]

    def outer(
        self, module: str, leading: tuple[int, ...], rows: Sequence[tuple[int, int]] | None = None
    ) -> torch.Tensor:
        b = self.held[module, leading][1]
        return b if rows is None else torch.cat([b[start:stop] for start, stop in rows])

    @property
    def trained_also(self) -> tuple[str, ...]:
        return tuple(self.also)

    def trained(self, name: str) -> torch.Tensor:
        return self.also[name]

    def added(self, name: str) -> torch.Tensor:
        """Return what the adapter adds to an HF tensor: scale · B·A, its rows."""
        place = self.places[name]
        a, b = self.held[place.module, place.leading]
        whole = self.scales[place.module] * b.float() @ a.float()
        return torch.cat([whole[start:stop] for start, stop in place.rows])
