"""The experts of one layer as two stacked weights, with one adapter an expert.

Keys and shapes in a checkpoint are those of Megatron's SequentialMLP (megatron-core 0.16.1,
transformer/moe/experts.py), independent of the storage here: `experts.experts.linear_fc1.weight` [layers, experts,
2·ffn, hidden], gate rows then up rows in two chunks, and `linear_fc2.weight` [layers, experts, hidden, ffn].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.adapters.cast_adapters import cast_copy
from mixtral_run.model.adapters.lora import initial_linear_in, initial_linear_ins, with_start
from mixtral_run.model.adapters.lora_experts import Adapters, adapted_experts
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.dispatch.permute import Permutation
from mixtral_run.model.kernels.decoding import few_tokens
from mixtral_run.model.kernels.decoding.halves import Halves
from mixtral_run.model.kernels.grouped_mm import (
    add_product,
    added_linear,
    frozen_gradient,
    frozen_product,
    grouped_linear,
)
from mixtral_run.model.kernels.quantized.quantized_mm import (
    dequantize,
    forward_product,
    has_scaled_product,
    quantize_to,
    quantized_layout,
    quantized_linear,
    quantized_with_inner,
    rows_gradient,
)
from mixtral_run.model.kernels.requirements import QUANTIZED_AT_ONCE
from mixtral_run.model.kernels.routing.router_probs import with_probs
from mixtral_run.model.kernels.swiglu import swiglu, swiglu_with_adapter
from mixtral_run.model.parallel.megatron import MegatronModule, ShardedTensor, TransformerConfig, parallel_state
from mixtral_run.model.parallel.param_sharding import mark
from mixtral_run.model.recompute.recipe import Once, Recipe, drop


class ExpertLinear(torch.nn.Module):
    """One linear layer of all local experts. weight: [experts / EP, out, in]; adapters [.., r, in] and [.., out, r].

    Adapters that the experts share are [1, r, in] and [1, out, r], the same on all ranks.

    With a base precision of fp8 or nf4 the weight has no memory until `allocate`; `quantize` replaces it by `values`
    and `scales` (quantized_mm.py). MixtralModel.quantize_experts does this for one linear layer after the other.
    """

    values: Tensor | None
    scales: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        name: str,
        config: TransformerConfig,
        lora: LoraSettings | None,
        layer_number: int,
        base_precision: str = "bf16",
    ) -> None:
        super().__init__()
        count = config.num_moe_experts // config.expert_model_parallel_size
        first = parallel_state.get_expert_model_parallel_rank() * count
        device = torch.cuda.current_device()
        self.base_precision = base_precision
        self.num_local = count
        place = device if base_precision == "bf16" else "meta"
        self.weight: torch.nn.Parameter | None = torch.nn.Parameter(
            torch.empty(count, outputs, inputs, dtype=config.params_dtype, device=place)
        )
        mark(self.weight, expert=True)
        self.register_buffer("values", None)
        self.register_buffer("scales", None)
        self.lora = lora.of(name) if lora is not None and name in lora.target_modules else None
        self.initial_in: torch.nn.Parameter | None = None
        self.initial_out: torch.nn.Parameter | None = None
        if self.lora is not None:
            shared = self.lora.shared
            halves = (
                [initial_linear_in(self.lora.rank, inputs, self.lora, name, layer_number)]
                if shared
                else initial_linear_ins(
                    self.lora.rank, inputs, self.lora, name, layer_number, range(first, first + count)
                )
            )
            self.linear_in = torch.nn.Parameter(torch.stack(halves).to(device))
            self.linear_out = torch.nn.Parameter(torch.zeros(len(halves), outputs, self.lora.rank, device=device))
            for half in (self.linear_in, self.linear_out):
                mark(half, expert=not shared, shared=shared)
            if self.lora.starts_from_weights:
                # start_from_weights.py fills them.
                self.initial_in, self.initial_out = (
                    torch.nn.Parameter(torch.zeros_like(each), requires_grad=False)
                    for each in (self.linear_in, self.linear_out)
                )

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return A and B of all local experts as they are multiplied; see LinearAdapter.halves."""
        if self.lora is not None and self.lora.shared:
            return self.linear_in.repeat(self.num_local, 1, 1), self.linear_out.repeat(self.num_local, 1, 1)
        if self.initial_in is None or self.initial_out is None:
            return self.linear_in, self.linear_out
        return with_start(self.linear_in, self.linear_out, self.initial_in, self.initial_out)

    def takes_one(self, token: Tensor) -> bool:
        """Return True if `outputs_of_one` takes this layer, whose adapter may have no more than A and B."""
        if self.lora is not None and (self.initial_in is not None or (self.lora.dropout and self.training)):
            return False
        if self.weight is None:
            return few_tokens.takes_quantized(token, self.stored[0])
        return few_tokens.is_one(token, self.weight)

    def halves_of_one(self, dtype: torch.dtype) -> Halves | None:
        """Return A and B in this dtype for `outputs_of_one`; None without an adapter."""
        if self.lora is None:
            return None
        return Halves(cast_copy(self.linear_in, dtype), cast_copy(self.linear_out, dtype), self.lora.scale)

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Return the values and scales of quantized weights."""
        assert self.values is not None
        assert self.scales is not None
        return self.values, self.scales

    def dense_weight(self, index: int) -> Tensor:
        """Return the weight of one local expert [out, in]; a quantized one as fp32."""
        if self.weight is None:
            values, scales = self.stored
            return dequantize(values[index], scales[index], torch.float32)
        return self.weight[index].detach()

    def forward(self, rows: Tensor, offsets: Tensor, recipe: Recipe | None = None) -> Tensor:
        """Return the layer's output without its adapter, [tokens, out], for rows [tokens, in] sorted by expert.
        offsets: see grouped_mm.py.
        """
        if self.values is not None and self.scales is not None:
            return quantized_linear(rows, self.values, self.scales, offsets)
        assert self.weight is not None
        return grouped_linear(rows, self.weight, offsets, recipe)

    def product(
        self,
        rows: Tensor,
        offsets: Tensor,
        source: Tensor | None = None,
        adapter: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute `forward` outside autograd. source: see grouped_mm.product; adapter: see
        grouped_mm.frozen_product.
        """
        if self.values is not None and self.scales is not None:
            base = forward_product(rows, self.values, self.scales, offsets, source)
            return base if adapter is None else add_product(base, adapter[0], adapter[1].transpose(1, 2), 1.0, offsets)
        assert self.weight is not None
        return frozen_product(rows, self.weight.detach(), offsets, source, adapter)

    def factors(self, gradient: Tensor) -> Tensor | None:
        """Return the factors fp32 [experts, out] of the columns of a gradient that `gradient` quantizes; None if it
        does not.
        """
        if self.values is None or not has_scaled_product(gradient, self.values):
            return None
        return self.scales

    def gradient(
        self, gradient: Tensor, offsets: Tensor, inner: Tensor, linear_in: Tensor, row_scales: Tensor | None = None
    ) -> Tensor:
        """Return the gradient of `forward`'s rows, given that of its result [tokens, out], plus inner [tokens, r] ·
        linear_in. row_scales: see quantized_mm.rows_gradient.
        """
        if self.values is not None and self.scales is not None:
            return rows_gradient(gradient, self.values, self.scales, offsets, inner, linear_in, row_scales)
        assert self.weight is not None
        return frozen_gradient(gradient, self.weight.detach(), offsets, inner, linear_in)

    @property
    def has_weight(self) -> bool:
        """Return True if the weight has memory, which `allocate` gives to one that will be quantized."""
        return self.weight is not None and not self.weight.is_meta

    def allocate(self, memory: Tensor | None = None) -> None:
        """Give the weight memory, uninitialized: the first elements of `memory`, which is flat, or its own."""
        assert self.weight is not None
        if memory is None:
            memory = torch.empty(self.weight.numel(), dtype=self.weight.dtype, device=torch.cuda.current_device())
        place = memory[: self.weight.numel()].view(self.weight.shape)
        self.weight = torch.nn.Parameter(place, requires_grad=False)
        mark(self.weight, expert=True)

    def quantize(self) -> None:
        """Replace the weight by quantized values and scales, some rows of an expert at a time.

        The weight's memory may be used again afterwards.
        """
        assert self.weight is not None
        weight = self.weight.detach()
        self.allocate_quantized()
        assert self.values is not None
        assert self.scales is not None
        rows = max(1, QUANTIZED_AT_ONCE // weight.shape[-1])
        for expert, values, scales in zip(weight, self.values, self.scales, strict=True):
            for begin in range(0, len(expert), rows):
                part = slice(begin, begin + rows)
                values[part], scales[part] = quantize_to(expert[part], self.base_precision)
        self.weight = None

    def allocate_quantized(self) -> None:
        """Allocate values and scales, uninitialized. The weight gets no memory."""
        assert self.weight is not None
        count, outputs, inputs = self.weight.shape
        device = torch.cuda.current_device()
        self.values, self.scales = (
            torch.empty(count, *shape, dtype=dtype, device=device)
            for dtype, shape in quantized_layout(outputs, inputs, self.base_precision)
        )

    def finish_quantized(self, *, whole: bool) -> None:
        """Finish after `allocate_quantized`: keep the values and scales if they are whole, otherwise free them."""
        if whole:
            self.weight = None
        else:
            self.values = self.scales = None

    def with_inner(self, rows: Tensor, offsets: Tensor, recipe: Recipe | None = None) -> tuple[Tensor, Tensor]:
        """Return `forward` and `inner` of the same rows."""
        assert self.lora is not None
        if self.values is None or self.scales is None or (self.lora.dropout and self.training):
            return self(rows, offsets, recipe), self.inner(rows, offsets, recipe)
        return quantized_with_inner(rows, self.values, self.scales, offsets, self.halves()[0].to(rows.dtype), recipe)

    def inner(self, rows: Tensor, offsets: Tensor, recipe: Recipe | None = None) -> Tensor:
        """Return A·x of each row's expert, with dropout on x: [tokens, r]."""
        assert self.lora is not None
        if self.lora.dropout and self.training:
            rows, recipe = drop(rows, self.lora.dropout, recipe)
        return grouped_linear(rows, self.halves()[0].to(rows.dtype), offsets, recipe)


class Experts(MegatronModule):
    """SwiGLU experts: linear_fc2(silu(gate) · up), where gate and up are the two halves of linear_fc1's output.

    The adapter of an expert without rows gets a gradient of zeros.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, lora: LoraSettings | None, base_precision: str = "bf16"
    ) -> None:
        super().__init__(config)
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        self.linear_fc1 = ExpertLinear(hidden, 2 * ffn, "linear_fc1", config, lora, layer_number, base_precision)
        self.linear_fc2 = ExpertLinear(ffn, hidden, "linear_fc2", config, lora, layer_number, base_precision)

    @property
    def adapted(self) -> bool:
        """Return True if `adapted_forward` can be used: both layers have an adapter, and there is no dropout."""
        lora = self.linear_fc1.lora
        return lora is not None and self.linear_fc2.lora is not None and not (lora.dropout and self.training)

    def adapted_forward(
        self,
        tokens: Tensor,
        permutation: Permutation,
        recipe: Recipe | None = None,
        probs: Tensor | None = None,
        *,
        unread: bool = False,
    ) -> Tensor:
        """Compute `forward` with fewer saved activations, by lora_experts.adapted_experts; see there for the
        arguments.
        """
        first, second = self.linear_fc1, self.linear_fc2
        assert first.lora is not None
        parts = (*first.halves(), *second.halves())
        adapters = Adapters(*parts, first.lora.scale)
        return adapted_experts(tokens, permutation, first, second, adapters, recipe, probs, unread=unread)

    @property
    def linears(self) -> dict[str, ExpertLinear]:
        """Return both linear layers by name."""
        return {"linear_fc1": self.linear_fc1, "linear_fc2": self.linear_fc2}

    def forward(
        self, rows: Tensor, offsets: Tensor, recipe: Recipe | None = None, probs: Tensor | None = None
    ) -> Tensor:
        """Return the experts' outputs for rows [tokens, hidden], sorted by local expert, of the same shape.

        Args:
            offsets: int32 [local experts], see grouped_mm.py.
            recipe: how to recompute the rows; then neither they nor the activation are saved for the backward pass.
            probs: fp32 [tokens], the routing probability of each row; its gradient then needs no outputs
                (router_probs.py).
        """
        second = self.linear_fc2
        active, recomputed = self._activate(rows, offsets, recipe)
        if probs is not None and recomputed is not None:
            again = Once(recomputed)
            active, recomputed = with_probs(active, probs, again), again.as_recipe()
        if second.lora is None:
            alone: Tensor = second(active, offsets, recomputed)
            return alone
        output, inner = second.with_inner(active, offsets, recomputed)
        return added_linear(output, inner, second.halves()[1].to(rows.dtype), second.lora.scale, offsets)

    def takes_one(self, token: Tensor) -> bool:
        """Return True if `outputs_of_one` can compute `forward` for this token [1, hidden], without a permutation."""
        return all(each.takes_one(token) for each in self.linears.values())

    def outputs_of_one(self, token: Tensor, experts: Tensor, probs: Tensor) -> Tensor:
        """Return the sum of the experts' outputs times probs for one token; see few_tokens.outputs_of_one."""
        first, second = self.linear_fc1, self.linear_fc2
        adapters = first.halves_of_one(token.dtype), second.halves_of_one(token.dtype)
        if first.weight is None or second.weight is None:
            return few_tokens.quantized_outputs_of_one(token, experts, probs, first.stored, second.stored, adapters)
        return few_tokens.outputs_of_one(token, experts, probs, first.weight, second.weight, adapters)

    def _activate(self, rows: Tensor, offsets: Tensor, recipe: Recipe | None) -> tuple[Tensor, Recipe | None]:
        """Return linear_fc1 followed by SwiGLU, [tokens, ffn], and, given the rows' recipe, the recipe of the
        result.
        """
        first = self.linear_fc1
        if first.lora is None:
            hidden = first(rows, offsets, recipe)
            return swiglu(hidden, offsets), Recipe.of(swiglu, hidden, offsets) if recipe is not None else None
        scale = first.lora.scale
        hidden, inner = first.with_inner(rows, offsets, recipe)
        outer = first.halves()[1].to(rows.dtype)

        def activate(hidden: Tensor, inner: Tensor, outer: Tensor, offsets: Tensor) -> Tensor:
            return swiglu_with_adapter(hidden, inner, outer, scale, offsets)

        recomputed = Recipe.of(activate, hidden, inner, outer, offsets) if recipe is not None else None
        return activate(hidden, inner, outer, offsets), recomputed

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return one ShardedTensor for each expert and chunk of rows (gate and up are two), views of the stacked
        weight.
        """
        del metadata
        result: dict[str, Any] = {}
        for name, layer in self.linears.items():
            halves = 2 if name == "linear_fc1" else 1
            key = f"{prefix}experts.{name}"
            # A quantized weight is not part of a checkpoint; before `allocate` there is no memory to load into.
            if layer.weight is not None and layer.has_weight:
                result |= self._shards(f"{key}.weight", layer.weight, halves, sharded_offsets)
            if layer.lora is not None and layer.lora.shared:
                result |= self._shared_shard(f"{key}.adapter.linear_in.weight", layer.linear_in, sharded_offsets)
                result |= self._shared_shard(f"{key}.adapter.linear_out.weight", layer.linear_out, sharded_offsets)
            elif layer.lora is not None:
                result |= self._shards(f"{key}.adapter.linear_in.weight", layer.linear_in, 1, sharded_offsets)
                result |= self._shards(f"{key}.adapter.linear_out.weight", layer.linear_out, halves, sharded_offsets)
            if layer.initial_in is not None and layer.initial_out is not None:
                result |= self._shards(f"{key}.adapter.initial_in.weight", layer.initial_in, 1, sharded_offsets)
                result |= self._shards(f"{key}.adapter.initial_out.weight", layer.initial_out, halves, sharded_offsets)
        return result

    def _shared_shard(self, key: str, half: Tensor, sharded_offsets: tuple[Any, ...]) -> dict[str, ShardedTensor]:
        """Return the shard of a matrix that all experts share, and that every rank has: the first rank's is saved."""
        replica = (0, 0, torch.distributed.get_rank())
        axis = len(sharded_offsets)
        return {
            key: ShardedTensor.from_rank_offsets(
                key, half.detach()[0], *sharded_offsets, replica_id=replica, prepend_axis_num=axis
            )
        }

    def _shards(
        self, key: str, stacked: Tensor, chunks_of_rows: int, sharded_offsets: tuple[Any, ...]
    ) -> dict[str, ShardedTensor]:
        count = stacked.shape[0]
        size = parallel_state.get_expert_model_parallel_world_size()
        first = parallel_state.get_expert_model_parallel_rank() * count
        replica = (0, 0, parallel_state.get_expert_data_parallel_rank())
        axis = len(sharded_offsets)
        result = {}
        for index, expert in enumerate(stacked.detach().unbind(0)):
            for chunk, part in enumerate(expert.chunk(chunks_of_rows)):
                # This name only has to be unique; the checkpoint uses `key`.
                result[f"{key}.{first + index}.{chunk}"] = ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *sharded_offsets,
                    (axis, first + index, count * size),
                    (axis + 1, chunk, chunks_of_rows),
                    replica_id=replica,
                    prepend_axis_num=axis + 1,
                )
        return result
