"""AdamW of all parameters by one kernel (adamw_triton.py): its tables, what it can update, and its reference.

The kernel clips the gradients on their way, which saves a pass over them, and writes the 16-bit copies of the adapters
(adapters/cast_adapters.py), which saves one for every micro batch.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.kernels.optimizer.layout import (
    CHUNK,
    GROUP_FIELDS,
    OWN_ADDRESSES,
    TENSOR_FIELDS,
)

MOST_STEPS = 2**20
"""Steps for which corrections may be tabulated. With a beta whose power is not 0 by then there is no table."""
ALIGNMENT_BYTES = 16
SWITCHES = ("amsgrad", "maximize", "capturable", "differentiable")
"""Settings of a group that the kernel does not know."""


@dataclass(frozen=True)
class Updated:
    """A parameter with its gradient and its state, which the kernel updates. copy: bf16, None for none."""

    param: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    copy: Tensor | None

    def is_suitable(self) -> bool:
        """Return True if the kernel can update the tensors: dense fp32, and their vectors aligned."""
        tensors = (self.param, self.gradient, self.exp_avg, self.exp_avg_sq)
        return (
            all(self.is_suitable_for(each, self.param) for each in tensors)
            and self.param.numel() < 2**31 - CHUNK
            and self.step.dtype is torch.float32
            and self.step.device == self.param.device
            and (self.copy is None or self.is_suitable_for(self.copy, self.param, torch.bfloat16))
        )

    @staticmethod
    def is_suitable_for(tensor: Tensor, param: Tensor, dtype: torch.dtype = torch.float32) -> bool:
        """Return True if the elements of a tensor are in dtype, where the kernel looks for those of a parameter."""
        return (
            tensor.dtype is dtype
            and tensor.layout is torch.strided
            and tensor.device == param.device
            and tensor.shape == param.shape
            and tensor.is_contiguous()
            and tensor.data_ptr() % ALIGNMENT_BYTES == 0
        )


def group_is_suitable(group: Mapping[str, Any]) -> bool:
    """Return True if the kernel computes what torch.optim.AdamW(fused=True) computes for a group of parameters."""
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    return (
        group.get("fused") is True
        and not any(group.get(name) for name in SWITCHES)
        and all(isinstance(each, (int, float)) for each in numbers)
        and num_corrections(*group["betas"]) <= MOST_STEPS
    )


def num_corrections(*betas: float) -> int:
    """Return after how many steps no beta's power changes 1 - power in fp32 any more."""
    largest = max(betas)
    if not 0 < largest < 1:
        return 1 if largest == 0 else MOST_STEPS + 1
    return math.ceil(-26 * math.log(2) / math.log(largest))


def corrections_of(betas: tuple[float, float], device: torch.device) -> Tensor:
    """Return the corrections of all steps, fp32 [steps, CORRECTION_FIELDS]; those of later steps are the last ones.

    They are computed on the device, in fp32, as torch's fused kernel computes them.
    """
    steps = torch.arange(1, num_corrections(*betas) + 1, dtype=torch.float32, device=device)
    first, second = (1 - torch.full_like(steps, beta).pow(steps) for beta in betas)
    return torch.stack((first, second.sqrt()), dim=1)


class Tables:
    """The tables of the kernel on the device, for one set of parameters of one device.

    The host sends them again only if an address or a number of a group has changed: with gradients in a CUDA graph's
    memory and a constant learning rate, never.

    Args:
        updated: the parameters and what belongs to them, all of them suitable.
        group_of: the number of each parameter's group.
        groups: the groups of the optimizer, whose numbers are read at each update.
    """

    def __init__(
        self, updated: Sequence[Updated], group_of: Sequence[int], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        device = updated[0].param.device
        self._groups = groups
        places: dict[tuple[float, float], tuple[int, int]] = {}
        corrections: list[Tensor] = []
        for betas in dict.fromkeys(tuple(group["betas"]) for group in groups):
            places[betas] = sum(map(len, corrections)), num_corrections(*betas)
            corrections.append(corrections_of(betas, device))
        self._corrections = torch.cat(corrections)
        self._places = places
        self._ends = [
            (each.param.numel(), group, *places[tuple(groups[group]["betas"])])
            for each, group in zip(updated, group_of, strict=True)
        ]
        self._tensors = [
            tensor for each in updated for tensor in (each.param, each.exp_avg, each.exp_avg_sq, each.copy, each.step)
        ]
        chunks = array("i")
        for row, (numel, *_) in enumerate(self._ends):
            for number in range(math.ceil(numel / CHUNK)):
                chunks.extend((row, number))
        self._chunks = torch.frombuffer(chunks, dtype=torch.int32).view(-1, 2).to(device)
        self._sent: tuple[list[int], list[float]] | None = None
        # fp32, in the same memory as the rows of the tensors: one copy sends both.
        size = len(updated) * TENSOR_FIELDS
        self._memory = torch.empty(size + len(groups) * GROUP_FIELDS // 2, dtype=torch.int64, device=device)
        self._rows = self._memory[:size].view(-1, TENSOR_FIELDS)
        self._numbers = self._memory[size:].view(torch.float32).view(-1, GROUP_FIELDS)

    def update(self, gradients: Sequence[Tensor], factor: Tensor | None) -> None:
        """Take one step, which the tensors of steps have already counted.

        Args:
            gradients: suitable for the parameters. They are not held: an eager pass makes new ones each time.
            factor: see adamw_triton.update.
        """
        from mixtral_run.model.kernels.optimizer.adamw_triton import update

        self._send(gradients)
        update(self._chunks, self._rows, self._numbers, self._corrections, factor)

    def _send(self, gradients: Sequence[Tensor]) -> None:
        """Send the tables to the device if they have changed. It does not wait for the device."""
        addresses = [tensor.data_ptr() if tensor is not None else 0 for tensor in (*gradients, *self._tensors)]
        numbers: list[float] = []
        for group in self._groups:
            numbers += (group["lr"], *group["betas"], group["weight_decay"], group["eps"], 0.0, 0.0, 0.0)
        if self._sent == (addresses, numbers):
            return
        content, count = array("q"), len(gradients)
        for row, end in enumerate(self._ends):
            content.append(addresses[row])
            content.extend(addresses[count + row * OWN_ADDRESSES : count + (row + 1) * OWN_ADDRESSES])
            content.extend(end)
        content.frombytes(array("f", numbers).tobytes())
        host = torch.frombuffer(content, dtype=torch.int64)
        # Only a copy from pinned memory does not let the host wait. It is not reused before the copy has arrived.
        self._memory.copy_(host.pin_memory() if self._memory.is_cuda else host, non_blocking=True)
        self._sent = addresses, numbers
