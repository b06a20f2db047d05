"""Weights in 4 bit: NF4 (Dettmers et al. 2023, arXiv:2305.14314), sixteen levels made for normally distributed numbers.

Numbers are taken in blocks along the last dimension, each block divided by its largest and rounded to the nearest
level; two to a byte, the first in the low half. 4.25 bits a number with blocks of 64 and scales in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral_run.model.kernels.quantized.formats import levels_on

BLOCKS = (64, 32)
"""Numbers that share a scale: the first of these that divides the row."""


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """[.., n] → codes uint8 [.., n / 2] and scales bf16 [.., n / block]. Raises ValueError where no block divides n.

    The same on every device, bit by bit: files keep it (KEPT_AS of quantized_mm.py).
    """
    blocks = tensor.float().unflatten(-1, (-1, block_size(tensor.shape[-1])))
    scales = blocks.abs().amax(-1).bfloat16()
    fractions = blocks / scales.float().clamp(min=1e-30)[..., None]
    levels = levels_on(tensor.device)
    codes = torch.bucketize(fractions, (levels[1:] + levels[:-1]) / 2, out_int32=True).flatten(-2).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def block_size(width: int) -> int:
    """How many numbers of a row share a scale. Raises ValueError where no block divides the row."""
    size = next((each for each in BLOCKS if width % each == 0), None)
    if size is None:
        raise ValueError(f"rows of {width} numbers: expected a multiple of {BLOCKS[-1]}")
    return size


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` made, back: [.., n]. On a GPU one kernel; elsewhere the same in torch, which is its reference."""
    if codes.is_cuda and dtype is torch.bfloat16:
        from mixtral_run.model.kernels.quantized.nf4_triton import expand

        return expand(codes, scales)
    return plain_dequantize(codes, scales, dtype)


def plain_dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    size = both.shape[-1] // scales.shape[-1]
    numbers = levels_on(codes.device)[both.int()].unflatten(-1, (-1, size)) * scales.float()[..., None]
    result: Tensor = numbers.flatten(-2).to(dtype)
    return result
