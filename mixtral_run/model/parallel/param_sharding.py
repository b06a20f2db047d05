"""How a parameter is shared between processes: written on it where it is made, read where gradients are summed.

The attribute names are Megatron's where Megatron has one.
"""

from __future__ import annotations

from torch import Tensor


def mark(parameter: Tensor, *, split: bool = False, partial: bool = False, expert: bool = False) -> None:
    """Say of a parameter: TP ranks hold different parts (`split`); TP ranks hold the same values but each saw only its
    part of the sequence, so that gradients are partial (`partial`); it belongs to an expert (`expert`)."""
    for name, value in (("tensor_model_parallel", split), ("sequence_parallel", partial), ("expert_parallel", expert)):
        setattr(parameter, name, value)


def is_split(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def is_partial(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "sequence_parallel", False))


def is_expert(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "expert_parallel", False))
