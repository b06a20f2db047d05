"""Weights in 4 bit: NF4 (Dettmers et al. 2023, arXiv:2305.14314), sixteen levels for normally distributed numbers.

Each block of numbers along the last dimension is divided by its largest absolute value and rounded to the nearest
level. Two numbers share a byte, the first in the low half. Blocks of 64 with scales in bf16 take 4.25 bits a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral_run.model.kernels.quantized.formats import levels_on

BLOCKS = (64, 32)
"""Block sizes, numbers that share a scale; the first that divides the row is used."""


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [.., n / 2] and scales bf16 [.., n / block] of a tensor [.., n].

    The result is the same on every device, bit for bit, since files store it (KEPT_AS in quantized_mm.py). Raises
    ValueError if no block size divides n.
    """
    blocks = tensor.float().unflatten(-1, (-1, block_size(tensor.shape[-1])))
    scales = blocks.abs().amax(-1).bfloat16()
    fractions = blocks / scales.float().clamp(min=1e-30)[..., None]
    levels = levels_on(tensor.device)
    codes = torch.bucketize(fractions, (levels[1:] + levels[:-1]) / 2, out_int32=True).flatten(-2).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def block_size(width: int) -> int:
    """Return how many numbers of a row share a scale. Raises ValueError if no block size divides the row."""
    size = next((each for each in BLOCKS if width % each == 0), None)
    if size is None:
        raise ValueError(f"rows of {width} numbers: expected a multiple of {BLOCKS[-1]}")
    return size


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers [.., n] of codes and scales, by a kernel on GPUs and by `plain_dequantize` elsewhere."""
    if codes.is_cuda and dtype is torch.bfloat16:
        from mixtral_run.model.kernels.quantized.nf4_triton import expand

        return expand(codes, scales)
    return plain_dequantize(codes, scales, dtype)


def plain_dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `dequantize` in torch: the reference of the kernel."""
    both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    size = both.shape[-1] // scales.shape[-1]
    numbers = levels_on(codes.device)[both.int()].unflatten(-1, (-1, size)) * scales.float()[..., None]
    result: Tensor = numbers.flatten(-2).to(dtype)
    return result
