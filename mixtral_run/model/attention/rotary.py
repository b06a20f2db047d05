"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) in HF's half-split form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rotary:
    """Rotary angles: cosines and sines of position · base^(-2i / head size)."""

    def __init__(self, head_size: int, base: float, device: torch.device) -> None:
        steps = torch.arange(0, head_size, 2, dtype=torch.int64).float()
        self.inverse_frequencies = (1.0 / (base ** (steps / head_size))).to(device)

    def inputs(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [batch or 1, sequence, head size] for positions, int [batch or 1, sequence]."""
        angles = positions[..., None].float() * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def split_and_rotate(mixed: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of linear_qkv into rotated queries, rotated keys, and values.

    Args:
        mixed: [sequence, batch, groups, heads of a group + 2, head size]; the last two heads of a group are its key and
            its value.
        cosine, sine: [batch or 1, sequence, head size].

    Returns queries [sequence, batch, heads, head size], keys and values [sequence, batch, groups, head size]. Each has
    its own memory: attention saves them, and views would keep `mixed` alive.
    """
    if mixed.is_cuda:
        parts: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(mixed, cosine, sine)  # type: ignore[no-untyped-call]
        return parts
    cosine, sine = (each.transpose(0, 1)[:, :, None, None] for each in (cosine, sine))
    states, values = mixed[..., :-1, :], mixed[..., -1, :]
    first, second = states.chunk(2, dim=-1)
    rotated = states * cosine + torch.cat((-second, first), dim=-1) * sine
    return rotated[..., :-1, :].flatten(2, 3).contiguous(), rotated[..., -1, :].contiguous(), values.contiguous()


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from mixtral_run.model.kernels.rotary_triton import split_and_rotate as on_gpu

        ctx.save_for_backward(cosine, sine)
        ctx.shape = mixed.shape
        return on_gpu(mixed.contiguous(), cosine, sine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        from mixtral_run.model.kernels.rotary_triton import rotate_back_and_join

        # The gradient of a rotation is the inverse rotation.
        return (
            rotate_back_and_join([each.contiguous() for each in gradients], ctx.shape, *ctx.saved_tensors),
            None,
            None,
        )
