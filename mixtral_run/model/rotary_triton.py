"""Triton kernel of rotary.py. Imported only where a GPU is. A program takes one token's heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn_kernel(
    mixed_ptr,
    cosine_ptr,
    sine_ptr,
    output_ptr,
    sequence,
    batch,
    angle_batch,
    heads,
    heads_in_group,
    sign,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place, sample = token // batch, token % batch
    angle = tl.where(angle_batch > 1, sample, 0) * sequence + place
    numbers = tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HALF
    mask = (numbers[:, None] < heads) & inside[None, :]
    # The halves of the angles are alike.
    cosine = tl.load(cosine_ptr + angle * 2 * HALF + columns, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sine_ptr + angle * 2 * HALF + columns, mask=inside, other=0.0).to(tl.float32) * sign
    is_value = (numbers % heads_in_group) == heads_in_group - 1
    cosine = tl.where(is_value[:, None], 1.0, cosine[None, :])
    sine = tl.where(is_value[:, None], 0.0, sine[None, :])
    places = (token * heads + numbers[:, None]) * (2 * HALF) + columns[None, :]
    first = tl.load(mixed_ptr + places, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(mixed_ptr + places + HALF, mask=mask, other=0.0).to(tl.float32)
    kind = output_ptr.dtype.element_ty
    tl.store(output_ptr + places, (first * cosine - second * sine).to(kind), mask=mask)
    tl.store(output_ptr + places + HALF, (second * cosine + first * sine).to(kind), mask=mask)


def turn(mixed: Tensor, cosine: Tensor, sine: Tensor, *, backwards: bool) -> Tensor:
    """See rotary.rotate; `backwards` turns the other way. mixed contiguous."""
    sequence, batch, groups, in_group, size = mixed.shape
    output = torch.empty_like(mixed)
    _turn_kernel[(sequence * batch,)](
        mixed,
        cosine.contiguous(),
        sine.contiguous(),
        output,
        sequence,
        batch,
        cosine.shape[0],
        groups * in_group,
        in_group,
        -1.0 if backwards else 1.0,
        BLOCK_H=triton.next_power_of_2(groups * in_group),
        HALF=size // 2,
        BLOCK_D=triton.next_power_of_2(size // 2),
    )
    return output
