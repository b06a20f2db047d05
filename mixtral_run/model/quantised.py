"""Frozen expert weights in 8 or 4 bit. In 8: float8 e4m3 with one fp32 scale for each output channel. In 4: nf4.py.

One copy is kept, [experts, out, in], half of bf16's bytes: 47 GB for all of Mixtral with attention and embeddings in
bf16. Both products read it:

    forward         y  = x̂·Ŵᵀ       x in 8 bit by row; its scales and the weight's multiply the result
    input gradient  dx = ĝ·Ŵ         g first times the weight's scales, which lie along the sum, then in 8 bit by row

Hopper's 8-bit products want both operands contiguous along the sum, so that the gradient needs the weight turned. That
is done anew each time into memory that the next layer uses again (one linear layer's experts): a second copy would
cost as much as bf16 and save 0.3 ms a product. Off Hopper, in 4 bit, and as the tests' reference, weights are brought
back to the rows' precision and multiplied; activations then stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixtral_run.model import nf4
from mixtral_run.model.grouped import has_grouped_product, product, row_counts

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number that e4m3 holds."""
TINY = 1e-30
"""In place of the largest of a row of zeros."""


def quantise(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Along the last dimension: values in 8 bit, and the scales that give them back, fp32, without that dimension."""
    exact = tensor.float()
    scales = exact.abs().amax(-1).clamp(min=TINY) / LARGEST
    return (exact / scales[..., None]).clamp(-LARGEST, LARGEST).to(FP8), scales


def quantise_to(weight: Tensor, base_precision: str) -> tuple[Tensor, Tensor]:
    """weight [out, in] in fp8 or nf4: its values and scales."""
    return nf4.quantise(weight) if base_precision == "nf4" else quantise(weight)


def dequantise(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Of either kind."""
    if values.dtype is torch.uint8:
        return nf4.dequantise(values, scales, dtype)
    return (values.float() * scales[..., None]).to(dtype)


def quantised_linear(rows: Tensor, values: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
    """Each row times the transpose of its expert's matrix: [tokens, out]. The matrices get no gradient.

    rows [tokens, in], sorted by expert; values 8 bit [experts, out, in], scales fp32 [experts, out], or both as
    nf4.quantise gives them; ends: grouped.py.
    """
    output: Tensor = _QuantisedLinear.apply(rows, values, scales, ends)  # type: ignore[no-untyped-call]
    return output


def has_scaled_product(rows: Tensor, values: Tensor) -> bool:
    """Whether torch's 8-bit grouped product runs here: compute capability 9.0 alone, widths in multiples of 16."""
    return (
        values.dtype is FP8
        and has_grouped_product(rows, *values.shape[1:])
        and torch.cuda.get_device_capability(rows.device) == (9, 0)
        and values.shape[1] % 16 == values.shape[2] % 16 == 0
    )


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(values, scales, ends)
        if has_scaled_product(rows, values):
            return scaled_forward(rows.contiguous(), values, scales, ends)
        return plain_product(rows, values, scales, ends, backwards=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        values, scales, ends = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        if has_scaled_product(gradient, values):
            return scaled_gradient(gradient, values, scales, ends), None, None, None
        return plain_product(gradient, values, scales, ends, backwards=True), None, None, None


def scaled_forward(rows: Tensor, values: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
    """x̂·Ŵᵀ on the GPU, bf16."""
    from mixtral_run.model.quantised_triton import quantise_rows

    small, row_scales = quantise_rows(rows, None, ends)
    return scaled_product(small, values, row_scales, scales, ends)


def scaled_gradient(gradient: Tensor, values: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
    """ĝ·Ŵ on the GPU, bf16."""
    from mixtral_run.model.quantised_triton import quantise_rows, turned

    small, row_scales = quantise_rows(gradient, scales, ends)
    return scaled_product(small, turned(values), row_scales, None, ends)


def scaled_product(small: Tensor, matrices: Tensor, row_scales: Tensor, scales: Tensor | None, ends: Tensor) -> Tensor:
    """small 8 bit [tokens, k] · matrices 8 bit [experts, n, k] transposed → bf16 [tokens, n].

    row_scales [tokens], scales [experts, n] or None for ones, both fp32.
    """
    from mixtral_run.model.quantised_triton import fits_tiles, tiled_product

    if fits_tiles(matrices):
        return tiled_product(small, matrices, row_scales, scales, ends)
    if scales is None:
        scales = torch.ones(matrices.shape[:2], device=matrices.device)
    # torch takes the second operand column-major, which the transposed view of a contiguous one is
    # (test/test_scaled_matmul_cuda.py of torch 2.10).
    output: Tensor = torch._scaled_grouped_mm(
        small,
        matrices.transpose(1, 2),
        row_scales,
        scales,
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return output


def plain_product(rows: Tensor, values: Tensor, scales: Tensor, ends: Tensor, *, backwards: bool) -> Tensor:
    """The same from dequantised weights: [tokens, out], or backwards [tokens, in]."""
    if has_grouped_product(rows, values.shape[1], values.shape[2] * (2 if values.dtype is torch.uint8 else 1)):
        matrices = dequantise(values, scales, rows.dtype)
        return product(rows, matrices if backwards else matrices.transpose(1, 2), ends)
    outputs = []
    for part, value, scale in zip(rows.split(row_counts(ends)), values.unbind(0), scales.unbind(0), strict=True):
        # One expert at a time: all of them would be the memory that 8 bit saves.
        matrix = dequantise(value, scale, rows.dtype)
        outputs.append(part @ (matrix if backwards else matrix.t()))
    return torch.cat(outputs)
