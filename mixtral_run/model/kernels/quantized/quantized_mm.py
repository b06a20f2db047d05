"""Products with frozen expert weights in 8 bit (float8 e4m3, one fp32 scale an output channel) or 4 bit (nf4.py).

There is one copy of the weights, [experts, out, in]: 47 GB for all of Mixtral in 8 bit, with attention and embeddings
in bf16. Both products read it:

    forward         y  = x̂·Ŵᵀ       x quantized by row; its scales and those of the weight multiply the result
    input gradient  dx = ĝ·Ŵ         g times the weight's scales, which run along the sum, then quantized by row

Hopper's 8-bit products need both operands contiguous along the sum, which the weight is not for the gradient. Our own
product transposes it in registers (hopper_grouped_mm.py). Where that does not run, the weight is transposed each
time into memory that the next layer reuses (the experts of one linear layer): a second copy of all weights would cost
as much as bf16. On other GPUs, in 4 bit, and as the reference of the tests, weights are dequantized to the rows' dtype
and multiplied; activations are then not quantized.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.kernels.grouped_mm import (
    add_product,
    each_experts,
    filled_up,
    has_grouped_product,
    is_portable,
    outer_product,
    product,
    why_not,
)
from mixtral_run.model.kernels.quantized import nf4
from mixtral_run.model.kernels.quantized.formats import FP8, LARGEST, TINY
from mixtral_run.model.kernels.requirements import EIGHT_BIT_CAPABILITY
from mixtral_run.model.kernels.selected import capability_of
from mixtral_run.model.recompute.recipe import Recipe

log = logging.getLogger(__name__)

Stored = tuple[torch.dtype, tuple[int, ...]]


KEPT_AS = {"fp8": 1, "nf4": 1}
"""Version of the numbers that `quantize_to` returns. Files store them: raise it whenever the numbers change."""


def quantize(tensor: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize along the last dimension: return values in 8 bit and scales, fp32, without that dimension.

    The result is the same on every device, bit for bit. largest: fp32, the largest magnitude of each row, if `tensor`
    has only a part of it.
    """
    exact = tensor.float()
    if largest is None:
        largest = exact.abs().amax(-1)
    # Multiply by the reciprocal explicitly: a GPU would do so for a division by a constant, and a CPU would not.
    scales = largest.clamp(min=TINY) * (1 / LARGEST)
    return (exact / scales[..., None]).clamp(-LARGEST, LARGEST).to(FP8), scales


def quantize_to(weight: Tensor, base_precision: str) -> tuple[Tensor, Tensor]:
    """Return values and scales of a weight [out, in] in fp8 or nf4."""
    return nf4.quantize(weight) if base_precision == "nf4" else quantize(weight)


def quantized_layout(outputs: int, inputs: int, base_precision: str) -> tuple[Stored, Stored]:
    """Return dtype and shape of the values and of the scales that `quantize_to` returns for a weight [outputs,
    inputs].
    """
    if base_precision == "nf4":
        blocks = inputs // nf4.block_size(inputs)
        return (torch.uint8, (outputs, inputs // 2)), (torch.bfloat16, (outputs, blocks))
    return (FP8, (outputs, inputs)), (torch.float32, (outputs,))


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of values and scales in fp8 or nf4."""
    if values.dtype is torch.uint8:
        return nf4.dequantize(values, scales, dtype)
    if values.is_cuda and dtype is torch.bfloat16:
        from mixtral_run.model.kernels.quantized.quantized_mm_triton import expand

        return expand(values, scales)
    return (values.float() * scales[..., None]).to(dtype)


def quantized_linear(rows: Tensor, values: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Return each row times the transpose of its expert's matrix: [tokens, out]. The matrices get no gradient.

    rows: [tokens, in], sorted by expert. values: 8 bit [experts, out, in]; scales: fp32 [experts, out]; or both as
    nf4.quantize returns them. offsets: see grouped_mm.py.
    """
    output: Tensor = _QuantizedLinear.apply(rows, values, scales, offsets)  # type: ignore[no-untyped-call]
    return output


def quantized_with_inner(
    rows: Tensor, values: Tensor, scales: Tensor, offsets: Tensor, linear_in: Tensor, recipe: Recipe | None
) -> tuple[Tensor, Tensor]:
    """Return `quantized_linear` and grouped_mm.grouped_linear of the same rows: [tokens, out] and A·x [tokens, r].

    linear_in: [experts, r, in] in the rows' dtype. Both are one autograd node, so that the two parts of the rows'
    gradient are summed where they are computed.
    """
    make, saved = (recipe.make, recipe.sources) if recipe is not None else (None, (rows.detach(),))
    outputs: tuple[Tensor, Tensor] = _WithInner.apply(  # type: ignore[no-untyped-call]
        rows, values, scales, offsets, linear_in, make, *saved
    )
    return outputs


def has_scaled_product(rows: Tensor, values: Tensor) -> bool:
    """Return True if 8-bit products run: with the kernels for Hopper, on 9.0, for widths in multiples of 16."""
    return (
        values.dtype is FP8
        and has_grouped_product(rows, *values.shape[1:])
        and capability_of(rows.device) == EIGHT_BIT_CAPABILITY
        and not is_portable(rows)
        and values.shape[1] % 16 == values.shape[2] % 16 == 0
    )


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(values, scales, offsets)
        return forward_product(rows, values, scales, offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return rows_gradient(gradients[0].contiguous(), *ctx.saved_tensors), None, None, None


class _WithInner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        values: Tensor,
        scales: Tensor,
        offsets: Tensor,
        linear_in: Tensor,
        make: Callable[..., Tensor] | None,
        *saved: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, scales, offsets, linear_in, *saved)
        ctx.make = make
        return forward_product(rows, values, scales, offsets), product(rows, linear_in.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, scales, offsets, linear_in, *saved = ctx.saved_tensors
        gradient, inner = (each.contiguous() for each in gradients)
        for_linear_in = None
        if ctx.needs_input_grad[4]:
            rows = ctx.make(*saved) if ctx.make is not None else saved[0]
            for_linear_in = outer_product(inner, rows, offsets)
        for_rows = None
        if ctx.needs_input_grad[0]:
            for_rows = rows_gradient(gradient, values, scales, offsets, inner, linear_in)
        return (for_rows, None, None, None, for_linear_in, None, *(None for _ in saved))


def forward_product(
    rows: Tensor, values: Tensor, scales: Tensor, offsets: Tensor, source: Tensor | None = None
) -> Tensor:
    """Return rows · matricesᵀ, [tokens, out], by the fastest available product. source: see grouped_mm.product."""
    if not has_scaled_product(rows, values):
        rows = rows if source is None else rows.index_select(0, source)
        return plain_product(rows, values, scales, offsets, backwards=False)
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import quantize_rows

    small, row_scales = quantize_rows(rows.contiguous(), None, offsets, source)
    return scaled_product(small, values, row_scales, scales, offsets)


def rows_gradient(
    gradient: Tensor,
    values: Tensor,
    scales: Tensor,
    offsets: Tensor,
    inner: Tensor | None = None,
    linear_in: Tensor | None = None,
    row_scales: Tensor | None = None,
) -> Tensor:
    """Return gradient · matrices, [tokens, in], plus inner [tokens, r] · linear_in if given, by the fastest available
    product.

    row_scales: fp32 [tokens], those with which gradient times scales is quantized, if they are known already.
    """
    if not has_scaled_product(gradient, values):
        return with_inner(plain_product(gradient, values, scales, offsets, backwards=True), inner, linear_in, offsets)
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import quantize_rows, quantize_with, transposed

    if row_scales is None:
        small, row_scales = quantize_rows(gradient, scales, offsets)
    else:
        small = quantize_with(gradient, scales, row_scales, offsets)
    rank = linear_in.shape[1] if linear_in is not None else 0
    if _takes_own_product(values, values.shape[2], values.shape[1], rank):
        from mixtral_run.model.kernels import hopper_grouped_mm

        adapter = None
        if inner is not None and linear_in is not None:
            adapter = inner.contiguous(), linear_in.contiguous()
        return hopper_grouped_mm.scaled_product(small, values, row_scales, None, offsets, adapter, transposed=False)
    return with_inner(scaled_product(small, transposed(values), row_scales, None, offsets), inner, linear_in, offsets)


def with_inner(gradient: Tensor, inner: Tensor | None, linear_in: Tensor | None, offsets: Tensor) -> Tensor:
    """Return gradient + inner · linear_in, the part that comes through the adapter, if both are given."""
    if inner is None or linear_in is None:
        return gradient
    return add_product(gradient, inner, linear_in, 1.0, offsets)


def _takes_own_product(values: Tensor, width: int, depth: int, rank: int = 0) -> bool:
    """Return True if hopper_grouped_mm.py takes this product in 8 bit: its self-test passed, and the sizes fit."""
    if not own_product_runs(values.device):
        return False
    from mixtral_run.model.kernels.hopper_grouped_mm import fits

    return fits(values.shape[0], width, depth, rank, num_bytes=1)


@functools.cache
def own_product_runs(device: torch.device) -> bool:
    """Return True if the 8-bit products of hopper_grouped_mm.py compile on this machine and small ones are right."""

    def small() -> tuple[Tensor, Tensor]:
        # More tiles than the GPU has pairs of multiprocessors, and few tiles, which are cut into pieces.
        cases = itertools.product(((128, 10240), (2048, 768)), (False, True))
        results = [_small_products(device, *size, transposed=transposed) for size, transposed in cases]
        return torch.cat([found.view(-1) for found, _ in results]), torch.cat([right.view(-1) for _, right in results])

    why = why_not(small)
    if why:
        log.warning(
            "8-bit experts go through Triton's products and transposed weights, slower (%s); ours need cuda-bindings "
            "and NVRTC.",
            why,
        )
    return not why


def _small_products(device: torch.device, depth: int, width: int, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return a product in 8 bit of hopper_grouped_mm.py, with an adapter if it takes one, and its reference."""
    from mixtral_run.model.kernels import hopper_grouped_mm

    counts, rank = [230, 70], 16
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    rows = draw(sum(counts), depth).to(FP8)
    matrices = draw(2, *((width, depth) if transposed else (depth, width))).to(FP8)
    row_scales, scales = draw(sum(counts)).abs(), draw(2, width).abs() if transposed else None
    inner, half = draw(sum(counts), rank).bfloat16(), draw(2, rank, width).bfloat16()
    offsets = torch.tensor(counts, device=device).cumsum(0).int()
    exact = matrices.float().transpose(1, 2) if transposed else matrices.float()

    def by_expert(left: Tensor, right: Tensor) -> Tensor:
        return torch.cat([part @ matrix for part, matrix in zip(left.float().split(counts), right, strict=True)])

    expected = by_expert(rows, exact) * row_scales[:, None]
    if scales is None:
        expected += by_expert(inner, half.float())
    else:
        expected *= scales.repeat_interleave(torch.tensor(counts, device=device), dim=0)
    adapter = None if transposed else (inner, half)
    found = hopper_grouped_mm.scaled_product(
        rows, matrices, row_scales, scales, offsets, adapter, transposed=transposed
    )
    return found, expected


def scaled_product(
    small: Tensor, matrices: Tensor, row_scales: Tensor, scales: Tensor | None, offsets: Tensor
) -> Tensor:
    """Return small 8 bit [tokens, k] · matricesᵀ, 8 bit [experts, n, k], times both scales: bf16 [tokens, n].

    row_scales: fp32 [tokens]. scales: fp32 [experts, n], None for ones.
    """
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import fits_tiles, tiled_product

    if _takes_own_product(matrices, *matrices.shape[1:]):
        from mixtral_run.model.kernels import hopper_grouped_mm

        return hopper_grouped_mm.scaled_product(small, matrices, row_scales, scales, offsets, transposed=True)
    if fits_tiles(matrices):
        return tiled_product(small, matrices, row_scales, scales, offsets)
    if scales is None:
        scales = torch.ones(matrices.shape[:2], device=matrices.device)
    # torch needs the second operand column-major: a transposed view of a contiguous tensor
    # (test/test_scaled_matmul_cuda.py in torch 2.10).
    output: Tensor = torch._scaled_grouped_mm(
        small,
        matrices.transpose(1, 2),
        row_scales,
        scales,
        offs=offsets,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return output


def plain_product(rows: Tensor, values: Tensor, scales: Tensor, offsets: Tensor, *, backwards: bool) -> Tensor:
    """Return the product with dequantized weights: [tokens, out], or, backwards, [tokens, in]."""
    if has_grouped_product(rows, values.shape[1], values.shape[2] * (2 if values.dtype is torch.uint8 else 1)):
        matrices = dequantize(values, scales, rows.dtype)
        return product(rows, matrices if backwards else matrices.transpose(1, 2), offsets)
    outputs = []
    for part, value, scale in zip(each_experts(rows, offsets), values.unbind(0), scales.unbind(0), strict=True):
        # Dequantize one expert at a time: all of them would take the memory that 8 bit saves.
        matrix = dequantize(value, scale, rows.dtype)
        outputs.append(part @ (matrix if backwards else matrix.t()))
    return filled_up(outputs, rows.shape[0])
