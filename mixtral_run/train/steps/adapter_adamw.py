"""AdamW over the adapters. On GPUs with our kernels one launch clips, updates, and writes the adapters' 16-bit copies.

Elsewhere, and for tensors or settings that the kernel does not know, the step is torch's own. The states are those of
torch.optim.AdamW in either case.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from mixtral_run.model.adapters.cast_adapters import copies_of, note_change, note_fresh
from mixtral_run.model.kernels.optimizer.adamw import SWITCHES, Tables, Updated, group_is_suitable
from mixtral_run.model.kernels.selected import kernels_of

if TYPE_CHECKING:
    from torch.optim import AdamW
else:
    from mixtral_run.train.steps.eager_optimizer import AdamW

_plain_step = inspect.unwrap(torch.optim.AdamW.step)


@dataclass
class _Prepared:
    """The kernel's tables, and the tensors that they were made for. gradients: weak references."""

    tables: Tables
    parameters: Sequence[Tensor]
    addresses: Sequence[int]
    gradients: Sequence[Callable[[], Tensor | None]]
    others: Sequence[object]
    moments: Sequence[Tensor]
    steps: Tensor


class AdapterAdamW(AdamW):
    """torch.optim.AdamW, with one kernel for all parameters where it runs.

    Attributes:
        gradient_factor: fp32 scalar on the device by which the next step multiplies the gradients, for clipping; None
            for 1. The gradients may stay as they are.
    """

    notes_changes = True
    gradient_factor: Tensor | None = None
    _prepared: _Prepared | None = None

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step. The copies of the adapters are those of the new values afterwards, or known to be stale."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor, self.gradient_factor = self.gradient_factor, None
        found = [each for group in self.param_groups for each in group["params"] if each.grad is not None]
        with torch.no_grad():
            prepared = self._prepare(found)
            if prepared is not None:
                prepared.steps.add_(1)
                prepared.tables.update([each.grad for each in found if each.grad is not None], factor)
                note_change([*found, *prepared.moments])
                note_fresh(found)
                return loss
            if factor is not None and found:
                torch._foreach_mul_([each.grad for each in found], factor)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            _plain_step(self)
        note_change(found)
        return loss

    def _prepare(self, found: Sequence[Tensor]) -> _Prepared | None:
        """Return the tables for parameters with gradients; None where the kernel does not run."""
        if not found or kernels_of(found[0].device) is None or hasattr(self, "grad_scale"):
            return None
        if found[0].is_cuda and torch.cuda.is_current_stream_capturing():
            # A replay would send tables of memory that is gone; torch's step says what it needs.
            return None
        prepared, others = self._prepared, self._others(found)
        gradients = [each.grad for each in found if each.grad is not None]
        if (
            prepared is None
            or not _same(prepared.parameters, found)
            or not _same(prepared.others, others)
            or prepared.addresses != _addresses_of(found)
        ):
            # Old states are freed before there are others.
            self._prepared = prepared = None
            prepared = self._prepared = self._build(found, gradients)
        elif not _same([each() for each in prepared.gradients], gradients):
            # An eager pass makes new gradients each time; all else stays.
            if not all(Updated.is_suitable_for(each, like) for each, like in zip(gradients, found, strict=True)):
                return None
            prepared.gradients = list(map(ref, gradients))
        return prepared

    def _others(self, found: Sequence[Tensor]) -> list[object]:
        """Return everything besides parameters and gradients that the tables depend on."""
        states = [self.state.get(each, {}) for each in found]
        moments = [each.get(name) for name in ("exp_avg", "exp_avg_sq", "step") for each in states]
        kinds = [
            each
            for group in self.param_groups
            for each in (type(group["lr"]), *group["betas"], *(group.get(name) for name in SWITCHES))
        ]
        return [*moments, *copies_of(found), *kinds]

    def _build(self, found: Sequence[Tensor], gradients: Sequence[Tensor]) -> _Prepared | None:
        if not all(map(group_is_suitable, self.param_groups)):
            return None
        states = [self._state_of(each) for each in found]
        if len({state["step"].device for state in states}) > 1:
            return None
        # In the memory of one tensor one launch counts all of them.
        steps = torch.stack([state["step"] for state in states])
        updated = [
            Updated(each, gradient, state["exp_avg"], state["exp_avg_sq"], step, copy)
            for each, gradient, state, step, copy in zip(
                found, gradients, states, steps.unbind(), copies_of(found), strict=True
            )
        ]
        if not all(each.is_suitable() and each.param.device == found[0].device for each in updated):
            return None
        for state, each in zip(states, updated, strict=True):
            state["step"] = each.step
        group_of = {each: number for number, group in enumerate(self.param_groups) for each in group["params"]}
        tables = Tables(updated, [group_of[each] for each in found], self.param_groups)
        moments = [tensor for each in updated for tensor in (each.exp_avg, each.exp_avg_sq)]
        references = list(map(ref, gradients))
        return _Prepared(tables, found, _addresses_of(found), references, self._others(found), moments, steps)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter; if it has none, the one that torch's fused AdamW begins with."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _same(first: Sequence[object], second: Sequence[object]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))


def _addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    return [each.data_ptr() for each in tensors]


def apply_gradients(optimizer: torch.optim.Optimizer, factor: Tensor | None) -> None:
    """Take the optimizer's step with gradients times a factor, fp32 scalar on the device; None for 1."""
    if isinstance(optimizer, AdapterAdamW):
        optimizer.gradient_factor = factor
    elif factor is not None:
        gradients = [each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        torch._foreach_mul_(gradients, factor)
    optimizer.step()
