"""The number formats of quantized experts: float8 e4m3 with its limits, and the sixteen levels of NF4."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


LARGEST = 448.0
"""The largest number that e4m3 holds."""


TINY = 1e-30
"""Lower bound of a row's largest number, which keeps the scale of a row of zeros above 0."""


LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.cache
def levels_on(device: torch.device) -> Tensor:
    """Return LEVELS as an fp32 tensor on this device."""
    return torch.tensor(LEVELS, device=device)
