"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) in HF's half-split form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rotary:
    """Cosines and sines of the angles position · base^(-2i / head size)."""

    def __init__(self, head_size: int, base: float, device: torch.device) -> None:
        steps = torch.arange(0, head_size, 2, dtype=torch.int64).float()
        self.inverse_frequencies = (1.0 / (base ** (steps / head_size))).to(device)

    def inputs(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: int [batch or 1, sequence] → cosine and sine [batch or 1, sequence, head size]."""
        angles = positions[..., None].float() * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(mixed: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn queries and keys, leave values. mixed: [sequence, batch, groups, heads + 2, head size]; of a group's last
    axis but one, the last is the value. cosine, sine: [batch or 1, sequence, head size]."""
    if mixed.is_cuda:
        turned: Tensor = _Rotate.apply(mixed, cosine, sine)  # type: ignore[no-untyped-call]
        return turned
    cosine, sine = (each.transpose(0, 1)[:, :, None, None] for each in (cosine, sine))
    states, values = mixed[..., :-1, :], mixed[..., -1:, :]
    first, second = states.chunk(2, dim=-1)
    return torch.cat((states * cosine + torch.cat((-second, first), dim=-1) * sine, values), dim=-2)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        from mixtral_run.model.rotary_triton import turn

        ctx.save_for_backward(cosine, sine)
        return turn(mixed.contiguous(), cosine, sine, backwards=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        from mixtral_run.model.rotary_triton import turn

        cosine, sine = ctx.saved_tensors
        # A rotation's gradient is the rotation back.
        return turn(gradients[0].contiguous(), cosine, sine, backwards=True), None, None
