"""Triton kernel of nf4.py; a program expands BLOCK bytes to 2·BLOCK numbers. Import only on machines with a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.quantized.formats import levels_on

BLOCK = 1024


@triton.jit
def _expand_4_bits_kernel(codes_ptr, scales_ptr, levels_ptr, output_ptr, count, half_block, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    byte = tl.load(codes_ptr + places, mask=inside, other=0).to(tl.int32)
    # A row is a whole number of blocks, so that blocks are numbered across rows.
    scale = tl.load(scales_ptr + places // half_block, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(levels_ptr + (byte & 15)) * scale
    second = tl.load(levels_ptr + ((byte >> 4) & 15)) * scale
    kind = output_ptr.dtype.element_ty
    tl.store(output_ptr + 2 * places, first.to(kind), mask=inside)
    tl.store(output_ptr + 2 * places + 1, second.to(kind), mask=inside)


def expand(codes: Tensor, scales: Tensor) -> Tensor:
    """Compute nf4.dequantize in bf16. Both inputs are contiguous."""
    output = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], dtype=torch.bfloat16, device=codes.device)
    half_block = codes.shape[-1] // scales.shape[-1]
    grid = (triton.cdiv(codes.numel(), BLOCK),)
    _expand_4_bits_kernel[grid](codes, scales, levels_on(codes.device), output, codes.numel(), half_block, BLOCK=BLOCK)
    return output
