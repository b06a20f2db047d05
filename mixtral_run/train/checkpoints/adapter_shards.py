"""The tensors of an adapter checkpoint as shards: parts of the adapters' parameters, and of AdamW's moments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.adapters.trained_also import is_trained_also
from mixtral_run.model.mixtral import MixtralModel, is_adapter
from mixtral_run.model.parallel.megatron import ShardedTensor
from mixtral_run.weights.adapter.schema import OPTIMIZER_PREFIX

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterState:
    """What a checkpoint holds of one parameter, in tensors of the parameter's shape and strides.

    Attributes:
        name: of the parameter in the model.
        parameter: the trained parameter itself, which tells where a shard lies in it.
        value: its values: the parameter, or a copy.
        moments: AdamW's, by the names of MOMENTS; empty before the first step.
    """

    name: str
    parameter: Tensor
    value: Tensor
    moments: dict[str, Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the values and the moments."""
        return self.value, *self.moments.values()


def live_states(model: MixtralModel, optimizer: torch.optim.Optimizer) -> list[ParameterState]:
    """Return the state of every parameter of the optimizer, in the tensors that training changes. Rank-local.

    Frozen parameters of adapters, which a checkpoint holds as well, come last and have no moments.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            moments = {name: state[name] for name in MOMENTS if name in state}
            result.append(ParameterState(names[id(parameter)], parameter, parameter.detach(), moments))
    for name, parameter in model.named_parameters():
        if is_adapter(name) and not parameter.requires_grad:
            result.append(ParameterState(name, parameter, parameter.detach(), {}))
    return result


def shards_of(model: MixtralModel, *, adapters: bool) -> dict[str, ShardedTensor]:
    """Return this rank's parts of the model's tensors: those of the adapters, or those of the base.

    Weights of the base that are trained with the adapters are parts of both.
    """
    everything: dict[str, Any] = model.gpt.sharded_state_dict()
    return {
        name: shard
        for name, shard in everything.items()
        if isinstance(shard, ShardedTensor)
        and (is_adapter(name) == adapters or (adapters and is_trained_also(name, model.settings.lora)))
    }


def adapter_shards(model: MixtralModel, states: Sequence[ParameterState]) -> dict[str, ShardedTensor]:
    """Return the shards of the adapters and of the optimizer's moments, with the data of `states`.

    A moment is sharded as its parameter is. Shards of parameters that are not in `states` are left out.
    """
    result: dict[str, ShardedTensor] = {}
    for name, shard in shards_of(model, adapters=True).items():
        found = _state_and_offset(shard.data, states)
        if found is None:
            continue
        state, offset = found
        sources = [(name, shard.key, state.value)]
        sources += [
            (f"{OPTIMIZER_PREFIX}{moment}.{name}", f"{OPTIMIZER_PREFIX}{moment}.{shard.key}", tensor)
            for moment, tensor in state.moments.items()
        ]
        for title, key, tensor in sources:
            # as_strided counts from the start of the storage, which holds several tensors in a copy.
            data = tensor.as_strided(shard.data.shape, shard.data.stride(), tensor.storage_offset() + offset)
            result[title] = dataclasses.replace(shard, key=key, data=data, dtype=data.dtype)
    return result


def _state_and_offset(part: Tensor, states: Sequence[ParameterState]) -> tuple[ParameterState, int] | None:
    """Return the state of the parameter that `part` is a view of, and the view's offset in it; None without one."""
    for state in states:
        offset = (part.data_ptr() - state.parameter.data_ptr()) // state.parameter.element_size()
        if 0 <= offset < state.parameter.numel():
            return state, offset
    return None
