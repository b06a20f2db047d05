"""Triton kernel of rotary.py; a program computes all heads of a token. Import only on machines with a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=("sequence", "batch", "angle_batch"))
def _rotate_kernel(
    mixed_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    cosine_ptr,
    sine_ptr,
    sequence,
    batch,
    angle_batch,
    groups,
    heads_in_group,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BACK: tl.constexpr,
):
    """Split and rotate `mixed`; with BACK, rotate the parts the other way and join them into `mixed`."""
    token = tl.program_id(0).to(tl.int64)
    place, sample = token // batch, token % batch
    angle = tl.where(angle_batch > 1, sample, 0) * sequence + place
    numbers = tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HALF
    # Both halves of the angles are the same.
    cosine = tl.load(cosine_ptr + angle * 2 * HALF + columns, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sine_ptr + angle * 2 * HALF + columns, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        sine = -sine
    heads = groups * heads_in_group
    group, within = numbers // heads_in_group, numbers % heads_in_group
    exists = numbers < heads
    is_value = exists & (within == heads_in_group - 1)
    is_key = exists & (within == heads_in_group - 2)
    is_query = exists & (within < heads_in_group - 2)
    cosine = tl.where(is_value[:, None], 1.0, cosine[None, :])
    sine = tl.where(is_value[:, None], 0.0, sine[None, :])
    size = 2 * HALF
    mixed = mixed_ptr + (token * heads + numbers[:, None]) * size + columns[None, :]
    query_head = token * groups * (heads_in_group - 2) + group * (heads_in_group - 2) + within
    query = query_ptr + query_head[:, None] * size + columns[None, :]
    key = key_ptr + (token * groups + group)[:, None] * size + columns[None, :]
    value = value_ptr + (token * groups + group)[:, None] * size + columns[None, :]
    of_query, of_key = is_query[:, None] & inside[None, :], is_key[:, None] & inside[None, :]
    of_value, of_any = is_value[:, None] & inside[None, :], exists[:, None] & inside[None, :]
    if BACK:
        first = tl.load(query, mask=of_query, other=0.0).to(tl.float32)
        first += tl.load(key, mask=of_key, other=0.0).to(tl.float32)
        first += tl.load(value, mask=of_value, other=0.0).to(tl.float32)
        second = tl.load(query + HALF, mask=of_query, other=0.0).to(tl.float32)
        second += tl.load(key + HALF, mask=of_key, other=0.0).to(tl.float32)
        second += tl.load(value + HALF, mask=of_value, other=0.0).to(tl.float32)
    else:
        first = tl.load(mixed, mask=of_any, other=0.0).to(tl.float32)
        second = tl.load(mixed + HALF, mask=of_any, other=0.0).to(tl.float32)
    kind = mixed_ptr.dtype.element_ty
    low = (first * cosine - second * sine).to(kind)
    high = (second * cosine + first * sine).to(kind)
    if BACK:
        tl.store(mixed, low, mask=of_any)
        tl.store(mixed + HALF, high, mask=of_any)
    else:
        tl.store(query, low, mask=of_query)
        tl.store(query + HALF, high, mask=of_query)
        tl.store(key, low, mask=of_key)
        tl.store(key + HALF, high, mask=of_key)
        tl.store(value, low, mask=of_value)
        tl.store(value + HALF, high, mask=of_value)


def split_and_rotate(mixed: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute rotary.split_and_rotate. mixed is contiguous."""
    sequence, batch, groups, in_group, size = mixed.shape
    query = torch.empty(sequence, batch, groups * (in_group - 2), size, dtype=mixed.dtype, device=mixed.device)
    key, value = (torch.empty(sequence, batch, groups, size, dtype=mixed.dtype, device=mixed.device) for _ in range(2))
    _launch(mixed, (query, key, value), mixed.shape, cosine, sine, BACK=False)
    return query, key, value


def rotate_back_and_join(parts: Sequence[Tensor], shape: torch.Size, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return the gradient of `split_and_rotate` for mixed, of this shape. parts: gradients of query, key and value,
    contiguous.
    """
    mixed = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device)
    _launch(mixed, parts, shape, cosine, sine, BACK=True)
    return mixed


def _launch(
    mixed: Tensor, parts: Sequence[Tensor], shape: torch.Size, cosine: Tensor, sine: Tensor, **kinds: Any
) -> None:
    sequence, batch, groups, in_group, size = shape
    _rotate_kernel[(sequence * batch,)](
        mixed,
        *parts,
        cosine.contiguous(),
        sine.contiguous(),
        sequence,
        batch,
        cosine.shape[0],
        groups,
        in_group,
        BLOCK_H=triton.next_power_of_2(groups * in_group),
        HALF=size // 2,
        BLOCK_D=triton.next_power_of_2(size // 2),
        **kinds,
    )
