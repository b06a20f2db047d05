"""Self-attention by torch's fused scaled_dot_product_attention, with rotary positions and a key-value cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mixtral_run.model.adapters.lora import ColumnLinear, RowLinear
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.attention.cached_attention import cached_attention
from mixtral_run.model.attention.context_attention import ContextInputs, attention_of_chunks
from mixtral_run.model.attention.packed_attention import Packed, packed_attention
from mixtral_run.model.attention.rotary import split_and_rotate
from mixtral_run.model.parallel.megatron import MegatronModule, TransformerConfig
from mixtral_run.model.recompute.kept_attention import KeptAttention
from mixtral_run.model.recompute.recipe import Recipe


@dataclass
class KeyValueCache:
    """Keys and values of the tokens so far, for the query groups of one process. A forward pass appends to it.

    keys[layer], values[layer]: [batch, groups / TP, max_length, head size], in the model's dtype. place: int64 [1] on
    the device; if given, a pass writes one token at this index and attends to all of the memory, so that shapes are
    constant.
    """

    max_length: int
    length: int = 0
    place: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [batch, groups, new, head size]; return those of all tokens."""
        assert self.place is None, "with a place, cached_attention.py writes into the cache"
        if layer not in self.keys:
            batch, groups, _, size = key.shape
            self.keys[layer] = key.new_zeros(batch, groups, self.max_length, size)
            self.values[layer] = torch.zeros_like(self.keys[layer])
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def repeated(self, rows: int, length: int, max_length: int) -> KeyValueCache:
        """Return a cache in which each of `rows` rows begins with the first `length` tokens of this one's only row.

        For a single row this cache is emptied layer by layer, so that both are never held at once.
        """
        result = KeyValueCache(max_length, length)
        for mine, its in ((self.keys, result.keys), (self.values, result.values)):
            for layer in list(mine):
                one = mine.pop(layer) if rows == 1 else mine[layer]
                its[layer] = one.new_zeros(rows, one.shape[1], max_length, one.shape[3])
                its[layer][:, :, :length] = one[:, :, :length]
        return result


@dataclass
class AttentionInputs:
    """Inputs that all layers share in one forward pass.

    cosine, sine: [batch or 1, sequence, head size], in the model's dtype. mask: bool [batch, 1, queries, keys], True
    where attention is allowed; None means causal. packed: boundaries of samples within rows, on GPUs; elsewhere they
    are part of the mask. context: of rows that are split over ranks, in place of mask and packed.
    """

    cosine: Tensor
    sine: Tensor
    mask: Tensor | None = None
    cache: KeyValueCache | None = None
    packed: Packed | None = None
    context: ContextInputs | None = None


class Attention(MegatronModule):
    """Grouped-query attention with heads split over TP.

    The rows of linear_qkv are interleaved by query group, as in Megatron: the queries of a group, its key, its value.
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

    def forward(
        self,
        hidden: Tensor,
        inputs: AttentionInputs,
        recipe: Recipe | None = None,
        kept: KeptAttention | None = None,
    ) -> Tensor:
        """Return the output for hidden [sequence (/ TP under sequence parallelism), batch, hidden], of the same shape.

        recipe: how to recompute `hidden` in the backward pass; None to save it. kept: results of attention itself, if
        the layer runs again except attention.
        """
        mixed = self.linear_qkv(hidden, recipe)
        if inputs.cache is not None and inputs.cache.place is not None:
            return self._decode_one(mixed, inputs, inputs.cache, inputs.cache.place)
        query, key, value = self._split_heads(mixed, inputs)
        if inputs.cache is not None:
            key, value = inputs.cache.append(self.layer_number, key, value)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self._attend(query, key, value, inputs)

        context = kept(attend, query, key, value) if kept is not None else attend(query, key, value)
        # Attention saves its result for its own gradient; with positions first it is a copy, which can be recomputed.
        again = Recipe.of(_positions_first, context) if recipe is not None else None
        projected: Tensor = self.linear_proj(_positions_first(context), again)
        return projected

    def _decode_one(self, mixed: Tensor, inputs: AttentionInputs, cache: KeyValueCache, place: Tensor) -> Tensor:
        """Return `forward`'s output for one new token of each row, mixed [1, batch, rows / TP]."""
        assert inputs.mask is not None, "what is filled of the cache is known on the device only"
        keys, values = cache.keys[self.layer_number], cache.values[self.layer_number]
        mixed = mixed.view(*mixed.shape[:2], self.groups, self.heads_per_group + 2, self.head_size)
        context = cached_attention(mixed, inputs.cosine, inputs.sine, keys, values, place, inputs.mask)
        projected: Tensor = self.linear_proj(context)
        return projected

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        """Return attention for query [batch, heads, queries, head size], of the same shape; key, value: [batch, groups,
        keys, head size].
        """
        if inputs.packed is not None:
            return packed_attention(query, key, value, inputs.packed)
        if inputs.context is not None and inputs.context.bounds is not None:
            return attention_of_chunks(query, key, value, inputs.context.bounds)
        mask = inputs.context.mask if inputs.context is not None else inputs.mask
        alone, shape = query.shape[2] == 1, query.shape
        if alone:
            # The heads of a group become queries of one head, so that keys need not be repeated, with a mask either.
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
        """Return rotated query, rotated key and value, each [batch, heads or groups, sequence, head size], of mixed
        [sequence, batch, rows / TP]. Under context parallelism keys and values are those of the whole row.
        """
        sequence, batch, _ = mixed.shape
        mixed = mixed.view(sequence, batch, self.groups, self.heads_per_group + 2, self.head_size)
        query, key, value = split_and_rotate(mixed, inputs.cosine, inputs.sine)
        if inputs.context is not None:
            # One message carries both.
            key, value = inputs.context.part.gather(torch.cat((key, value), dim=2)).chunk(2, dim=2)
        return query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)


def _positions_first(context: Tensor) -> Tensor:
    """Return context [batch, heads, sequence, head size] as [sequence, batch, heads · head size]."""
    return context.permute(2, 0, 1, 3).flatten(2)
