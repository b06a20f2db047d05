"""Marks of how a parameter is distributed over processes: set on creation, read where gradients are summed.

The attribute names are Megatron's if Megatron has one.
"""

from __future__ import annotations

from torch import Tensor


def mark(
    parameter: Tensor, *, split: bool = False, partial: bool = False, expert: bool = False, shared: bool = False
) -> None:
    """Mark a parameter.

    Args:
        split: TP ranks hold different parts.
        partial: TP ranks hold the same values but each sees only its part of the sequence: gradients are partial.
        expert: the parameter belongs to an expert.
        shared: all ranks hold the same values, and each sees only the tokens of its experts: gradients are partial.
    """
    marks = {"tensor_model_parallel": split, "sequence_parallel": partial, "expert_parallel": expert}
    for name, value in (marks | {"shared_by_experts": shared}).items():
        setattr(parameter, name, value)


def is_split(parameter: Tensor) -> bool:
    """Return True if TP ranks hold different parts of the parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def is_partial(parameter: Tensor) -> bool:
    """Return True if the parameter's gradient has to be summed over TP."""
    return bool(getattr(parameter, "sequence_parallel", False))


def is_expert(parameter: Tensor) -> bool:
    """Return True if the parameter belongs to an expert."""
    return bool(getattr(parameter, "expert_parallel", False))


def is_shared(parameter: Tensor) -> bool:
    """Return True if the experts of all ranks share the parameter: its gradient has to be summed over all ranks."""
    return bool(getattr(parameter, "shared_by_experts", False))
