"""Products with one frozen weight in 8 bit: the projections of attention and the output layer (--attention-precision).

As with the experts (quantized_mm.py), the weight is float8 e4m3 with one fp32 scale an output channel, and

    forward         y  = x̂·Ŵᵀ       x quantized by row; its scales and those of the weight multiply the result
    input gradient  dx = ĝ·Ŵ         g times the weight's scales, which run along the sum, then quantized by row

Both are torch._scaled_mm with a scale for each row and column: cuBLAS's product on compute capability 9.0. There it
takes operands that are contiguous along the sum. So there is a second, transposed copy of the weight. Both copies take
the memory of bf16, 2.9 GB for Mixtral 8x7B. On a CPU the weight is dequantized and multiplied, and activations are not
quantized. Other GPUs are refused when the model is built (requirements.py).

Hopper sums products of 8 bit in 22 bits, and drops what is below 2⁻¹³ of the largest addend. Sums over 4,096 to 6,144
addends of one size lose 0.2 % by it. The gradient of the logits has one large number and many small ones in each row,
which would be dropped, up to a fifth of the result. So the gradient of the output layer asks cuBLAS to move its sums to
fp32 again and again (use_fast_accum=False), as torchao does for all gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.kernels.quantized.formats import FP8
from mixtral_run.model.kernels.quantized.quantized_mm import quantize

ROWS_AT_ONCE = 4096
"""Rows of a weight that are quantized at a time, as their fp32 copies take four times the memory of the result."""


class EightBitWeight(torch.nn.Module):
    """A frozen weight [out, in] in 8 bit.

    values: float8 e4m3 [out, in]; scales: fp32 [1, out]; transposed: the values as [in, out], and ones: fp32 [1, in],
    both on GPUs only. uneven_gradients: gradients have numbers of very different magnitude in a row.
    """

    values: Tensor
    scales: Tensor
    transposed: Tensor | None
    ones: Tensor | None

    def __init__(self, values: Tensor, scales: Tensor, *, uneven_gradients: bool = False) -> None:
        super().__init__()
        self.uneven_gradients = uneven_gradients
        self.register_buffer("values", values)
        self.register_buffer("scales", scales[None])
        multiplies = in_8_bit(values)
        # Bytes, as not every operator has a kernel for float8.
        copy = values.view(torch.uint8).t().contiguous().view(FP8) if multiplies else None
        self.register_buffer("transposed", copy)
        self.register_buffer("ones", torch.ones(1, values.shape[1], device=values.device) if multiplies else None)

    @classmethod
    def of(
        cls, weight: Tensor, group: dist.ProcessGroup | None = None, *, uneven_gradients: bool = False
    ) -> EightBitWeight:
        """Quantize a weight [out, in].

        group: of the ranks that each hold some columns of every row. A row then has one scale in all of them, so that
        the numbers are the same in every layout. All of its ranks must call.
        """
        largest = torch.cat([part.abs().amax(-1) for part in weight.split(ROWS_AT_ONCE)]).float()
        if group is not None and group.size() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        values = torch.empty(weight.shape, dtype=FP8, device=weight.device)
        scales = torch.empty_like(largest)
        for begin in range(0, weight.shape[0], ROWS_AT_ONCE):
            part = slice(begin, begin + ROWS_AT_ONCE)
            values[part], scales[part] = quantize(weight[part], largest[part])
        return cls(values, scales, uneven_gradients=uneven_gradients)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers of the weight, [out, in]."""
        return (self.values.float() * self.scales.t()).to(dtype)

    def product(self, rows: Tensor) -> Tensor:
        """Return rows [tokens, in] · weightᵀ, [tokens, out]."""
        if not in_8_bit(rows):
            return rows @ self.dequantized(rows.dtype).t()
        return _scaled_product(rows, None, self.values, self.scales, fast=True)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return gradient [tokens, out] · weight, [tokens, in]."""
        if not in_8_bit(gradient):
            return gradient @ self.dequantized(gradient.dtype)
        assert self.transposed is not None and self.ones is not None
        return _scaled_product(gradient, self.scales, self.transposed, self.ones, fast=not self.uneven_gradients)


Frozen = Tensor | EightBitWeight
"""A frozen weight [out, in], in the model's dtype or in 8 bit."""


def in_8_bit(tensor: Tensor) -> bool:
    """Return True if products of this tensor are in 8 bit: on a GPU."""
    return tensor.is_cuda


def frozen_product(rows: Tensor, weight: Frozen) -> Tensor:
    """Return rows [tokens, in] · weightᵀ, [tokens, out]."""
    return weight.product(rows) if isinstance(weight, EightBitWeight) else rows @ weight.t()


def frozen_gradient(gradient: Tensor, weight: Frozen) -> Tensor:
    """Return gradient [tokens, out] · weight, [tokens, in]."""
    return weight.gradient(gradient) if isinstance(weight, EightBitWeight) else gradient @ weight


def eight_bit_linear(hidden: Tensor, weight: EightBitWeight) -> Tensor:
    """Return hidden [.., in] · weightᵀ, [.., out]. The weight gets no gradient, and nothing is saved for it."""
    # A view that the function itself returned could not be changed in place, as Megatron's loss changes the logits.
    output: Tensor = _EightBitLinear.apply(hidden.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    return output.view(*hidden.shape[:-1], -1)


class _EightBitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: EightBitWeight) -> Tensor:
        ctx.weight = weight
        return weight.product(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return ctx.weight.gradient(gradients[0]) if ctx.needs_input_grad[0] else None, None


def _scaled_product(rows: Tensor, columns: Tensor | None, matrix: Tensor, scales: Tensor, *, fast: bool) -> Tensor:
    """Return rows [tokens, k], times columns fp32 [1, k] if given, · matrixᵀ, 8 bit [n, k], times scales fp32 [1, n]:
    bf16 [tokens, n]. fast: all sums in 22 bits.
    """
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import quantize_rows

    small, row_scales = quantize_rows(rows.contiguous(), columns, None)
    # The second operand is column-major, and there is one fp32 scale for each row and each column
    # (ATen/native/cuda/ScaledBlas.cpp in torch 2.11 to 2.13). Any number of rows will do.
    output: Tensor = torch._scaled_mm(
        small, matrix.t(), row_scales[:, None], scales, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return output
