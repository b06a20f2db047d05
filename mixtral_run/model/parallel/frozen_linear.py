"""Megatron's linear layers, whose frozen weight may be stored in 8 bit (kernels/quantized/dense_mm.py).

Until `quantize` they are Megatron's. Afterwards the weight is no parameter any more, and the layer exchanges what
Megatron's exchanges: hidden states in the model's dtype.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.kernels.quantized.dense_mm import EightBitWeight, Frozen, eight_bit_linear
from mixtral_run.model.parallel.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    make_sharded_tensors_for_checkpoint,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


class FrozenColumnLinear(ColumnParallelLinear):
    """Linear layer with rows split over TP."""

    weight: Any
    quantized: EightBitWeight | None

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.quantized = None

    def quantize(self) -> None:
        """Replace the weight by its values and scales in 8 bit."""
        self.quantized = EightBitWeight.of(self.weight.detach())
        self.weight = None

    def base_output(self, hidden: Tensor, *, gathered: bool | None = None) -> Tensor:
        """Return [sequence, batch, out / TP] for hidden [sequence (/ TP), batch, in].

        gathered: True for [sequence, batch, out]; default: as the layer was made.
        """
        if self.quantized is None:
            output: Tensor = super().forward(hidden, runtime_gather_output=gathered)[0]
            return output
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        output = eight_bit_linear(hidden, self.quantized)
        if self.gather_output if gathered is None else gathered:
            output = gather_from_tensor_model_parallel_region(output, group=self.tp_group)
        return output


class FrozenRowLinear(RowParallelLinear):
    """Linear layer with columns split over TP."""

    weight: Any
    quantized: EightBitWeight | None

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.quantized = None

    def quantize(self) -> None:
        """Replace the weight by its values and scales in 8 bit. All ranks of the TP group must call."""
        self.quantized = EightBitWeight.of(self.weight.detach(), self.tp_group)
        self.weight = None

    def base_output(self, hidden: Tensor) -> Tensor:
        """Return [sequence (/ TP), batch, out] for hidden [sequence, batch, in / TP]."""
        if self.quantized is None:
            output: Tensor = super().forward(hidden)[0]
            return output
        output = eight_bit_linear(hidden, self.quantized)
        summed: Tensor
        if self.sequence_parallel:
            summed = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        else:
            summed = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        return summed


class OutputLayer(FrozenColumnLinear):
    """The output layer of a GPTModel."""

    def quantize(self) -> None:
        """Replace the weight by its values and scales in 8 bit."""
        self.quantized = EightBitWeight.of(self.weight.detach(), uneven_gradients=True)
        self.weight = None

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Return logits [sequence, batch, vocabulary (/ TP)] for hidden [sequence (/ TP), batch, hidden], and no bias.

        weight: in place of the layer's own; not of a quantized one, which is frozen.
        """
        if weight is not None:
            assert self.quantized is None, "a quantized output layer is frozen"
            output, _ = super().forward(hidden, weight, runtime_gather_output)
            return output, None
        return self.base_output(hidden, gathered=runtime_gather_output), None

    @classmethod
    def in_place_of(cls, layer: ColumnParallelLinear) -> OutputLayer:
        """Return a layer with the weight and the settings of the one that GPTModel made."""
        made = cls(
            layer.input_size,
            layer.output_size,
            config=layer.config,
            init_method=layer.config.init_method,
            bias=False,
            gather_output=layer.gather_output,
            skip_weight_param_allocation=True,
            tp_group=layer.tp_group,
        )
        made.weight = layer.weight
        return made

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if self.quantized is None:
            shards: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            return shards
        # A quantized weight is not part of a checkpoint. GPTModel sets an attribute of the entry, which it expects.
        return {f"{prefix}weight": SimpleNamespace()}


def shards_of_weight(
    layer: FrozenColumnLinear | FrozenRowLinear, axis: int, prefix: str, sharded_offsets: tuple[Any, ...]
) -> dict[str, Any]:
    """Return the shard of the weight, which is split along `axis`; of a quantized weight none."""
    tensors: dict[str, torch.Tensor] = {} if layer.weight is None else {"weight": layer.weight}
    result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        tensors, prefix, dict.fromkeys(tensors, axis), sharded_offsets
    )
    return result


def frozen_weight(layer: FrozenColumnLinear | FrozenRowLinear) -> Frozen:
    """Return the weight of this rank as products read it."""
    if layer.quantized is not None:
        return layer.quantized
    weight: Tensor = layer.weight.detach()
    return weight


def dense_weight(layer: FrozenColumnLinear | FrozenRowLinear) -> Tensor:
    """Return the weight of this rank [out, in]; a quantized one as fp32."""
    weight = frozen_weight(layer)
    return weight.dequantized(torch.float32) if isinstance(weight, EightBitWeight) else weight
