"""STAND-IN for optimizer/adamw_triton.py without Triton: reads the kernel's tables, and updates what their addresses
name, in plain torch. With Triton's interpreter (TRITON_INTERPRET=1) the tests run the kernel itself.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mixtral_run.model.kernels.optimizer.layout import CHUNK


def at(address: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the memory at an address as a flat tensor."""
    kind = (ctypes.c_char * (numel * dtype.itemsize)).from_address(address)
    return torch.frombuffer(kind, dtype=dtype)


def update(chunks: Tensor, tensors: Tensor, groups: Tensor, corrections: Tensor, factor: Tensor | None) -> None:
    for row, number in chunks.tolist():
        *addresses, copy, step, numel, group, first, count = tensors[row].tolist()
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        gradient, param, average, square = (at(each, numel, torch.float32)[part] for each in addresses)
        rate, beta1, beta2, decay, eps, *_ = groups[group]
        steps = int(at(step, 1, torch.float32).clamp(1, count))
        correction, root = corrections[first + steps - 1]
        gradient = gradient * factor if factor is not None else gradient
        param -= rate * decay * param
        average += (gradient - average) * (1 - beta1)
        square += (gradient.square() - square) * (1 - beta2)
        param -= rate / correction * average / (square.sqrt() / root + eps)
        if copy:
            at(copy, numel, torch.bfloat16)[part] = param.bfloat16()
