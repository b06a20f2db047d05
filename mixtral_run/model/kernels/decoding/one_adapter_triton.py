"""Triton kernels of the adapters of a single token: A times the token, and B times the result, which the kernels of the
matrices add. Import only on machines with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_run.model.kernels.decoding.halves import Halves

DEPTH, WARPS = 2048, 4
"""Columns of A that a program reads at a time, and its warps."""


@triton.jit
def _inner_kernel(
    rows_ptr,
    half_ptr,
    experts_ptr,
    inner_ptr,
    row_stride,
    half_stride,
    scale,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    choice, number, rank = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    columns = tl.arange(0, DEPTH)
    place = half_ptr + number * WIDTH
    if not SHARED:
        place += tl.load(experts_ptr + choice) * half_stride
    sums = tl.zeros([DEPTH], dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        inside = start + columns < WIDTH
        half = tl.load(place + start + columns, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(rows_ptr + choice * row_stride + start + columns, mask=inside, other=0.0).to(tl.float32)
        sums += half * values
    tl.store(inner_ptr + choice * rank + number, tl.sum(sums, axis=0) * scale)


@triton.jit
def from_adapter(inner_ptr, half_ptr, rows, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Return B times A times the token for rows of B: fp32. inner_ptr: of the choice; half_ptr: of its expert's B."""
    numbers = tl.arange(0, PADDED)
    inside = numbers < RANK
    inner = tl.load(inner_ptr + numbers, mask=inside, other=0.0)
    half = tl.load(half_ptr + rows[:, None].to(tl.int64) * RANK + numbers[None, :], mask=inside[None, :], other=0.0)
    return tl.sum(half.to(tl.float32) * inner[None, :], axis=1)


@dataclass(frozen=True)
class Inner:
    """Arguments of a kernel that adds an adapter's part: tensors and sizes. A rank of 0 stands for no adapter."""

    pointers: tuple[Tensor, Tensor, int]
    sizes: dict[str, Any]


def inner_of_one(rows: Tensor, experts: Tensor | None, halves: Halves | None) -> Inner:
    """Return scale · A · row of each choice, with B, for the kernel of the matrix.

    rows: [1, in] for a token of all choices, or [choices, in]. experts: int64 [1, choices]; None for one matrix.
    """
    if halves is None:
        return Inner((rows, rows, 0), {"RANK": 0, "PADDED": 1})
    linear_in, linear_out = (each.contiguous() for each in (halves.linear_in, halves.linear_out))
    _, rank, width = linear_in.shape
    choices = 1 if experts is None else experts.shape[1]
    shared = len(linear_in) == 1
    inner = torch.empty(choices, rank, dtype=torch.float32, device=rows.device)
    _inner_kernel[(choices, rank)](
        rows,
        linear_in,
        rows if experts is None else experts,
        inner,
        width if len(rows) > 1 else 0,
        rank * width,
        halves.scale,
        SHARED=shared,
        WIDTH=width,
        DEPTH=DEPTH,
        num_warps=WARPS,
    )
    stride = 0 if shared else linear_out.shape[1] * rank
    return Inner((inner, linear_out, stride), {"RANK": rank, "PADDED": max(triton.next_power_of_2(rank), 2)})
