"""Copies of the adapters in the model's dtype: adapters are stored in fp32 and multiplied in 16 bit.

All copies are updated by one call, and only those whose adapter has changed. Cast one by one where they are used, the
256 tensors of Mixtral's adapters take 4 ms a step on an H100; together they take a fifth of that, and nothing if the
optimizer's kernel has written them (kernels/optimizer/).

An adapter has changed if its memory is another one, or if torch's counter of its version is. Whoever writes to an
adapter past torch, through NumPy or a kernel of our own, calls `note_change` afterwards. Fused optimizers do not count
their writes: a hook that runs after each step of any optimizer does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def refresh(parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Update the copies in dtype of the parameters that have changed. Call it before each pass of the model.

    A captured pass must find them updated: what is copied within it is copied by each replay.
    """
    copies, stale = [], []
    for parameter in parameters:
        copy = _copy_of(parameter)
        if copy is None or copy.dtype is not dtype or copy.device != parameter.device:
            # A tensor of inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                copy = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            parameter._mixtral_run_cast = copy  # type: ignore[attr-defined]
        elif _is_fresh(parameter):
            continue
        copies.append(copy)
        stale.append(parameter)
    if not stale:
        return
    with torch.no_grad():
        torch._foreach_copy_(copies, [parameter.detach() for parameter in stale])
    note_fresh(stale)


def cast_copy(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the parameter in dtype, without a gradient: its copy as of the last `refresh` if there is one."""
    if parameter.dtype is dtype:
        return parameter.detach()
    copy = _copy_of(parameter)
    return copy if copy is not None and copy.dtype is dtype else parameter.detach().to(dtype)


def copies_of(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """Return the copy of each parameter, None for a parameter without one."""
    return [_copy_of(parameter) for parameter in parameters]


def note_fresh(parameters: Iterable[Tensor]) -> None:
    """Note that the copies of the parameters, as far as they have any, are those of their present values."""
    for parameter in parameters:
        if _copy_of(parameter) is not None:
            parameter._mixtral_run_cast_from = _state_of(parameter)  # type: ignore[attr-defined]


def note_change(parameters: Iterable[Tensor]) -> None:
    """Note that the parameters were written past torch's counters: their copies, and what autograd saved, are stale."""
    torch.autograd.graph.increment_version([each for each in parameters if not each.is_inference()])


def _copy_of(parameter: Tensor) -> Tensor | None:
    return cast(Tensor | None, getattr(parameter, "_mixtral_run_cast", None))


def _is_fresh(parameter: Tensor) -> bool:
    state = _state_of(parameter)
    return state is not None and getattr(parameter, "_mixtral_run_cast_from", None) == state


def _state_of(parameter: Tensor) -> tuple[int, int] | None:
    """Return what differs after a change; None if nobody counts changes, as in inference mode."""
    return None if parameter.is_inference() else (parameter.data_ptr(), parameter._version)


def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not getattr(optimizer, "notes_changes", False):
        groups = optimizer.param_groups
        note_change(each for group in groups for each in group["params"] if _copy_of(each) is not None)


register_optimizer_step_post_hook(_note_step)
