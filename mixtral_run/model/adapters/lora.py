"""LoRA (Hu et al. 2021, arXiv:2106.09685) on Megatron's parallel linear layers.

The layer is `W·x + alpha / r · B·A·x` with W frozen. Over TP only the r-wide product is communicated, never a
hidden-wide one:

    column (linear_qkv):  A replicated, applied to this rank's part of the sequence, its result gathered; B's rows split
    row (linear_proj):    A's columns split, its partial result reduce-scattered; B replicated

Under sequence parallelism the replicated matrix sees only this rank's part of the sequence: its gradient is partial,
and train/steps/step.py sums it over TP (param_sharding.is_partial). Adapters are stored in fp32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mixtral_run.model.adapters.cast_adapters import cast_copy
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.kernels.decoding.few_tokens import is_one, product_of_one
from mixtral_run.model.kernels.decoding.halves import Halves
from mixtral_run.model.kernels.quantized.dense_mm import Frozen, frozen_gradient, frozen_product
from mixtral_run.model.parallel.frozen_linear import (
    FrozenColumnLinear,
    FrozenRowLinear,
    frozen_weight,
    shards_of_weight,
)
from mixtral_run.model.parallel.megatron import (
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    make_sharded_tensors_for_checkpoint,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from mixtral_run.model.parallel.param_sharding import mark
from mixtral_run.model.recompute.recipe import Recipe, drop, recomputed_linear


def initial_linear_in(rank: int, inputs: int, lora: LoraSettings, module: str, *place: int) -> Tensor:
    """Return the initial A, fp32 [rank, inputs], as PEFT draws it: kaiming uniform with a = sqrt(5), ±1/sqrt(inputs).

    It is drawn on the CPU from a generator that is seeded by the run's seed, the module and its place (layer, expert),
    so that it is the same in every layout of processes. The seed is a checksum, since torch's CPU generator uses only
    the low 32 bits of a seed.
    """
    name = " ".join(map(str, (lora.seed, module, *place)))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = 1.0 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)


def initial_linear_ins(
    rank: int, inputs: int, lora: LoraSettings, module: str, layer: int, experts: Sequence[int]
) -> list[Tensor]:
    """Return `initial_linear_in` of several experts of a layer, drawn at the same time."""
    with ThreadPoolExecutor(max(len(experts), 1)) as pool:
        return list(pool.map(lambda expert: initial_linear_in(rank, inputs, lora, module, layer, expert), experts))


class _Weight(torch.nn.Module):
    """One matrix of an adapter. partition: the axis that is split over TP; None if it is replicated."""

    def __init__(self, weight: Tensor, partition: int | None, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.to(torch.cuda.current_device()))
        self.partition = partition
        self.sequence_parallel = sequence_parallel
        mark(self.weight, split=partition is not None, partial=sequence_parallel and partition is None)

    def copy(self) -> _Weight:
        """Return a copy of its own memory."""
        return _Weight(self.weight.detach().clone(), self.partition, self.sequence_parallel)


def with_start(linear_in: Tensor, linear_out: Tensor, start_in: Tensor, start_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [.., 2r, in] and B [.., out, 2r] whose product is that of A and B less that of the start."""
    return torch.cat((linear_in, start_in), dim=-2), torch.cat((linear_out, -start_out), dim=-1)


class LinearAdapter(torch.nn.Module):
    """A and B of one parallel linear layer, this rank's parts, fp32. linear_in: [r, in]; linear_out: [out, r].

    initial_in, initial_out: the frozen copies of a start that is subtracted (start_from_weights.py); None without one.
    """

    initial_in: _Weight | None
    initial_out: _Weight | None

    def __init__(self, linear_in: _Weight, linear_out: _Weight, lora: LoraSettings) -> None:
        super().__init__()
        self.linear_in = linear_in
        self.linear_out = linear_out
        self.lora = lora
        self.initial_in = self.initial_out = None
        if lora.starts_from_weights:
            self.initial_in, self.initial_out = linear_in.copy(), linear_out.copy()

    def remember_start(self) -> None:
        """Make the present A and B the start."""
        if self.initial_in is not None and self.initial_out is not None:
            self.initial_in.weight.data.copy_(self.linear_in.weight)
            self.initial_out.weight.data.copy_(self.linear_out.weight)

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return A and B as they are multiplied: with a start that is subtracted, [A, A₀] and [B, -B₀]."""
        if self.initial_in is None or self.initial_out is None:
            return self.linear_in.weight, self.linear_out.weight
        return with_start(
            self.linear_in.weight, self.linear_out.weight, self.initial_in.weight, self.initial_out.weight
        )

    def inner(self, hidden: Tensor, recipe: Recipe | None) -> Tensor:
        """Return A·x with dropout on x, in x's dtype. With a recipe for x, x is not saved."""
        if self.lora.dropout and self.training:
            hidden, recipe = drop(hidden, self.lora.dropout, recipe)
        return recomputed_linear(hidden, self.halves()[0].to(hidden.dtype), recipe)

    def outer(self, inner: Tensor) -> Tensor:
        """Return alpha / r · B·(A·x), given A·x."""
        return linear(inner * self.lora.scale, self.halves()[1].to(inner.dtype))

    def of_one(self, dtype: torch.dtype) -> Halves:
        """Return A and B in this dtype for `product_of_one`."""
        first, second = (cast_copy(each.weight, dtype)[None] for each in (self.linear_in, self.linear_out))
        return Halves(first, second, self.lora.scale)

    def stands_alone(self, tp_group: torch.distributed.ProcessGroup) -> bool:
        """Return True if `adapted_linear` can compute the layer: it is not split over TP, and there is no dropout."""
        return tp_group.size() == 1 and not (self.lora.dropout and self.training)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: Any = None,  # noqa: ARG002
    ) -> dict[str, Any]:
        halves = {"linear_in.weight": self.linear_in, "linear_out.weight": self.linear_out}
        if self.initial_in is not None and self.initial_out is not None:
            halves |= {"initial_in.weight": self.initial_in, "initial_out.weight": self.initial_out}
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {name: half.weight for name, half in halves.items()},
            prefix,
            {name: half.partition for name, half in halves.items() if half.partition is not None},
            sharded_offsets,
        )
        return result


def adapted_linear(hidden: Tensor, weight: Frozen, adapter: LinearAdapter, recipe: Recipe | None) -> Tensor:
    """Return hidden · weightᵀ + alpha / r · (hidden · Aᵀ) · Bᵀ as one autograd node.

    The weight is frozen, in 8 bit or not, and not split, and there is no dropout. The product that computes the
    adapter's part also adds it, forward and backward. hidden [.., in], weight [out, in]. recipe: how to recompute
    hidden; None to save it.
    """
    make, saved = (recipe.make, recipe.sources) if recipe is not None else (None, (hidden.detach(),))
    halves = adapter.halves()
    output: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        hidden, *halves, weight, adapter.lora.scale, make, *saved
    )
    return output


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        linear_in: Tensor,
        linear_out: Tensor,
        weight: Frozen,
        scale: float,
        make: Callable[..., Tensor] | None,
        *saved: Tensor,
    ) -> Tensor:
        first, second = cast_copy(linear_in, hidden.dtype), cast_copy(linear_out, hidden.dtype)
        flat = hidden.flatten(0, -2)
        inner = _scaled_product(flat, first.t(), scale)
        output = frozen_product(flat, weight).addmm_(inner, second.t())
        ctx.save_for_backward(inner, first, second, *saved)
        ctx.weight, ctx.scale, ctx.make, ctx.dtype = weight, scale, make, linear_in.dtype
        return output.view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inner, first, second, *saved = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        hidden = ctx.make(*saved) if ctx.make is not None else saved[0]
        for_inner = _scaled_product(gradient, second, ctx.scale)
        for_first = _product_in(ctx.dtype, for_inner.t(), hidden.flatten(0, -2))
        for_second = _product_in(ctx.dtype, gradient.t(), inner)
        for_hidden = None
        if ctx.needs_input_grad[0]:
            for_hidden = frozen_gradient(gradient, ctx.weight).addmm_(for_inner, first).view(hidden.shape)
        return (for_hidden, for_first, for_second, None, None, None, *(None for _ in saved))


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale · left · right in one kernel."""
    unread = left.new_empty(())
    return torch.addmm(unread, left, right, beta=0, alpha=scale)


def _product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """Return left · right in dtype. A GPU's sums are fp32 already: no cast follows if dtype is."""
    if left.is_cuda and dtype is torch.float32 and left.dtype is torch.bfloat16:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


class ColumnLinear(FrozenColumnLinear):
    """Linear layer with rows split over TP and no bias; it has an adapter if `lora` targets it."""

    def __init__(
        self, inputs: int, outputs: int, name: str, config: TransformerConfig, lora: LoraSettings | None, layer: int
    ) -> None:
        super().__init__(
            inputs, outputs, config=config, init_method=config.init_method, bias=False, gather_output=False
        )
        # Megatron marks its weights only if it also initializes them.
        mark(self.weight, split=True)
        self.adapter: LinearAdapter | None = None
        if lora is not None and name in lora.target_modules:
            linear_in = initial_linear_in(lora.rank, inputs, lora, name, layer)
            linear_out = torch.zeros(self.output_size_per_partition, lora.rank)
            self.adapter = LinearAdapter(
                _Weight(linear_in, None, self.sequence_parallel), _Weight(linear_out, 0, False), lora
            )

    def forward(self, hidden: Tensor, recipe: Recipe | None = None) -> Tensor:
        """Return [sequence, batch, out / TP] for hidden [sequence (/ TP), batch, in]. recipe: how to recompute
        hidden.
        """
        if self.adapter is None or self.adapter.stands_alone(self.tp_group):
            return _computed_here(self, hidden, recipe)
        output = self.base_output(hidden)
        inner = self.adapter.inner(hidden, recipe)
        if self.sequence_parallel:
            inner = gather_from_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        return output + self.adapter.outer(inner)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return _with_adapter(self, 0, prefix, sharded_offsets, metadata)


class RowLinear(FrozenRowLinear):
    """Linear layer with columns split over TP and no bias; it has an adapter if `lora` targets it."""

    def __init__(
        self, inputs: int, outputs: int, name: str, config: TransformerConfig, lora: LoraSettings | None, layer: int
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        mark(self.weight, split=True)
        self.adapter: LinearAdapter | None = None
        if lora is not None and name in lora.target_modules:
            mine = self.input_size_per_partition
            start = mine * torch.distributed.get_rank(self.tp_group)
            linear_in = initial_linear_in(lora.rank, inputs, lora, name, layer)[:, start : start + mine].contiguous()
            self.adapter = LinearAdapter(
                _Weight(linear_in, 1, False),
                _Weight(torch.zeros(outputs, lora.rank), None, self.sequence_parallel),
                lora,
            )

    def forward(self, hidden: Tensor, recipe: Recipe | None = None) -> Tensor:
        """Return [sequence (/ TP), batch, out] for hidden [sequence, batch, in / TP]. recipe: how to recompute
        hidden.
        """
        if self.adapter is None or self.adapter.stands_alone(self.tp_group):
            return _computed_here(self, hidden, recipe)
        output = self.base_output(hidden)
        inner = self.adapter.inner(hidden, recipe)
        if self.sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)
        return output + self.adapter.outer(inner)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return _with_adapter(self, 1, prefix, sharded_offsets, metadata)


def _computed_here(layer: ColumnLinear | RowLinear, hidden: Tensor, recipe: Recipe | None) -> Tensor:
    """Return the output of a layer without an adapter, or with one that `stands_alone`; for one token by a kernel
    of its own (few_tokens.py).
    """
    weight, adapter = frozen_weight(layer), layer.adapter
    changes = adapter is not None and adapter.initial_in is not None
    if layer.tp_group.size() == 1 and isinstance(weight, Tensor) and is_one(hidden, weight) and not changes:
        return product_of_one(hidden, weight, adapter.of_one(hidden.dtype) if adapter is not None else None)
    if adapter is not None:
        return adapted_linear(hidden, weight, adapter, recipe)
    return layer.base_output(hidden)


def _with_adapter(
    layer: ColumnLinear | RowLinear,
    axis: int,
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the shards of the layer's weight under its own key, and of the adapter's matrices under `adapter.`."""
    result = shards_of_weight(layer, axis, prefix, sharded_offsets)
    if layer.adapter is not None:
        result |= layer.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)
    return result
