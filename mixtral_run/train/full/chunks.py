"""The parts of a full checkpoint that one rank writes or reads: rectangles of global tensors, with Megatron's keys.

The weights are written by one of the ranks that hold them; each state of the optimizer by the rank whose slice it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.megatron import ShardedTensor, is_main_replica
from mixtral_run.train.checkpoints.adapter_shards import shards_of
from mixtral_run.train.full.state_slice import StateSlice
from mixtral_run.weights.adapter.schema import OPTIMIZER_PREFIX
from mixtral_run.weights.load.read_parts import Target


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a global tensor.

    Attributes:
        key: of the tensor.
        global_shape: of the whole tensor.
        target: the rectangle's place, and its data, a view of what the training uses.
    """

    key: str
    global_shape: tuple[int, ...]
    target: Target


def weight_chunks(model: MixtralModel) -> list[Chunk]:
    """Return the parts of the model's weights that this rank writes."""
    return [
        _chunk(shard, shard.key, tuple(shard.global_offset), shard.data.detach())
        for shard in shards_of(model, adapters=False).values()
        if is_main_replica(shard.replica_id)
    ]


def state_chunks(model: MixtralModel, slices: Sequence[StateSlice], *, all_ranks: bool = False) -> list[Chunk]:
    """Return the parts of the optimizer's states that this rank writes; with all_ranks those that it needs."""
    found = []
    for shard in shards_of(model, adapters=False).values():
        own, row = _slice_of(shard, slices)
        if not all_ranks and not own.writes(model.mesh):
            continue
        columns = own.matrix.shape[1]
        num_rows = shard.data.numel() // columns
        first, last = max(own.first, row), min(own.last, row + num_rows)
        if first >= last:
            continue
        # A vector is a matrix with one column: its rows are along its last axis.
        axis = len(shard.global_shape) - (1 if columns == 1 and shard.data.dim() == 1 else 2)
        offset = [int(each) for each in shard.global_offset]
        offset[axis] += first - row
        for name, state in own.states.items():
            data = state[first - own.first : last - own.first]
            data = data.view(-1) if shard.data.dim() == 1 else data
            found.append(_chunk(shard, f"{OPTIMIZER_PREFIX}{name}.{shard.key}", tuple(offset), data))
    return found


def _chunk(shard: ShardedTensor, key: str, offset: tuple[int, ...], data: Tensor) -> Chunk:
    shape = (*(1,) * (len(offset) - data.dim()), *data.shape)
    return Chunk(key, tuple(shard.global_shape), Target(key, offset, shape, data))


def _slice_of(shard: ShardedTensor, slices: Sequence[StateSlice]) -> tuple[StateSlice, int]:
    """Return the slice of the parameter that a shard is a view of, and the shard's first row in the parameter."""
    part: torch.Tensor = shard.data
    for each in slices:
        elements = (part.data_ptr() - each.parameter.data_ptr()) // part.element_size()
        if 0 <= elements < each.parameter.numel():
            row, column = divmod(elements, each.matrix.shape[1])
            assert column == 0 and part.is_contiguous(), f"{shard.key}: not whole rows of {each.name}"
            return each, row
    raise AssertionError(f"{shard.key}: no parameter of the optimizer holds it")
