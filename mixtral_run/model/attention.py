"""Self-attention on torch's fused scaled_dot_product_attention, with rotary positions and a key-value cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mixtral_run.model.lora import ColumnLinear, RowLinear
from mixtral_run.model.lora_settings import LoraSettings
from mixtral_run.model.packed_attention import Packed, packed_attention
from mixtral_run.model.parallel.megatron import MegatronModule, TransformerConfig
from mixtral_run.model.recompute.recipe import Recipe
from mixtral_run.model.rotary import split_and_rotate


@dataclass
class KeyValueCache:
    """Keys and values of the tokens seen so far, of one process's query groups; grows by `forward`.

    `keys[layer]`, `values[layer]`: [batch, groups / TP, max_length, head size], the model's dtype. place: int64 [1] on
    the device; where given, one token is written there and all memory is seen, so that shapes stay.
    """

    max_length: int
    length: int = 0
    place: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens behind the old ones; return all. key, value: [batch, groups, new, head size]."""
        if self.place is not None:
            self.keys[layer].index_copy_(2, self.place, key)
            self.values[layer].index_copy_(2, self.place, value)
            return self.keys[layer], self.values[layer]
        if layer not in self.keys:
            batch, groups, _, size = key.shape
            self.keys[layer] = key.new_zeros(batch, groups, self.max_length, size)
            self.values[layer] = torch.zeros_like(self.keys[layer])
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


@dataclass
class AttentionInputs:
    """What all layers share in one forward pass.

    cosine, sine: [batch or 1, sequence, head size], the model's dtype. mask: bool [batch, 1, queries, keys], True where
    attention is allowed; None means causal. packed: samples within rows, for GPUs (elsewhere they are in the mask).
    """

    cosine: Tensor
    sine: Tensor
    mask: Tensor | None = None
    cache: KeyValueCache | None = None
    packed: Packed | None = None


class Attention(MegatronModule):
    """Grouped-query attention; heads are split over TP.

    linear_qkv's rows are interleaved by query group, as in Megatron: the queries of a group, its key, its value.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, lora: LoraSettings | None, **_: Any) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.head_size: int = config.kv_channels
        self.groups = config.num_query_groups // config.tensor_model_parallel_size
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        rows = (config.num_attention_heads + 2 * config.num_query_groups) * self.head_size
        columns = config.num_attention_heads * self.head_size
        self.linear_qkv = ColumnLinear(config.hidden_size, rows, "linear_qkv", config, lora, layer_number)
        self.linear_proj = RowLinear(columns, config.hidden_size, "linear_proj", config, lora, layer_number)

    def forward(self, hidden: Tensor, inputs: AttentionInputs, recipe: Recipe | None = None) -> Tensor:
        """hidden: [sequence (/ TP under sequence parallelism), batch, hidden]; returns the same shape.

        recipe: of hidden, when it shall be made again in the backward pass.
        """
        query, key, value = self._split_heads(self.linear_qkv(hidden, recipe), inputs)
        if inputs.cache is not None:
            key, value = inputs.cache.append(self.layer_number, key, value)
        if inputs.packed is not None:
            context = packed_attention(query, key, value, inputs.packed)
        else:
            context = self._attend(query, key, value, inputs.mask)
        # Attention keeps its result for its own gradient; positions first, it is another copy.
        again = Recipe.of(_positions_first, context) if recipe is not None else None
        projected: Tensor = self.linear_proj(_positions_first(context), again)
        return projected

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query: [batch, heads, queries, head size] → the same shape; key, value: [batch, groups, keys, head size]."""
        alone, shape = query.shape[2] == 1, query.shape
        if alone:
            # The heads of a group are as many queries of one head: with a mask, too, nothing is repeated.
            query = query.reshape(shape[0], self.groups, self.heads_per_group, self.head_size)
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and not alone,
            scale=1.0 / math.sqrt(self.head_size),
            enable_gqa=self.heads_per_group > 1 and not alone,
        )
        return context.reshape(shape)

    def _split_heads(self, mixed: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Turn by position and part.

        [sequence, batch, rows / TP] → query, key, value, each [batch, heads or groups, sequence, head size].
        """
        sequence, batch, _ = mixed.shape
        mixed = mixed.view(sequence, batch, self.groups, self.heads_per_group + 2, self.head_size)
        query, key, value = split_and_rotate(mixed, inputs.cosine, inputs.sine)
        return query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)


def _positions_first(context: Tensor) -> Tensor:
    """[batch, heads, sequence, head size] → [sequence, batch, heads · head size]."""
    return context.permute(2, 0, 1, 3).flatten(2)
