"""Copy in host memory of what this rank writes of a model in full fine-tuning, for saves in the background."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.train.checkpoints.adapter_shards import ParameterState
from mixtral_run.train.checkpoints.host_copy import HostCopy
from mixtral_run.train.full.chunks import Chunk, state_chunks, weight_chunks
from mixtral_run.train.full.sharded_adamw import ShardedAdamW
from mixtral_run.train.full.state_slice import StateSlice


class FullCopy(HostCopy):
    """Buffers for the weights and for the slices of AdamW's state that this rank writes.

    chunks: the parts of a checkpoint that this rank writes, in the buffers; after `allocate`.
    """

    def __init__(self, model: MixtralModel, optimizer: ShardedAdamW) -> None:
        self._model = model
        self._weights = weight_chunks(model)
        self._all_slices = optimizer.slices
        self._slices = written_slices(model, optimizer)
        self._copied_slices: list[StateSlice] = []
        self.chunks: list[Chunk] = []
        held = [each.target.data for each in self._weights]
        held += [state for each in self._slices for state in each.states.values()]
        super().__init__(model.mesh.device, optimizer, sum(each.nbytes for each in held))

    def allocate(self) -> None:
        """Take the memory, and fill `states` and `chunks`."""
        weights = [
            dataclasses.replace(each, target=dataclasses.replace(each.target, data=self._like(each.target.data)))
            for each in self._weights
        ]
        self._copied_slices = [
            dataclasses.replace(each, states={name: self._like(state) for name, state in each.states.items()})
            for each in self._slices
        ]
        self.states = states_of(self._copied_slices)
        copied = {each.name: each for each in self._copied_slices}
        slices = [copied.get(each.name, each) for each in self._all_slices]
        self.chunks = [*weights, *state_chunks(self._model, slices)]

    def _like(self, tensor: Tensor) -> Tensor:
        return self._buffer(tensor.shape, tensor.dtype)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        # As many chunks of weights come first.
        for each, copied in zip(self._weights, self.chunks, strict=False):
            yield each.target.data, copied.target.data
        for own, buffers in zip(self._slices, self._copied_slices, strict=True):
            for name, state in own.states.items():
                yield state, buffers.states[name]


def written_slices(model: MixtralModel, optimizer: ShardedAdamW) -> list[StateSlice]:
    """Return the slices of the optimizer's state that this rank writes."""
    return [each for each in optimizer.slices if each.writes(model.mesh) and each.first < each.last]


def states_of(slices: Sequence[StateSlice]) -> list[ParameterState]:
    """Return the masters and moments of slices, for the check that nothing is spoiled."""
    return [
        ParameterState(
            each.name,
            each.parameter,
            each.states["master"],
            {name: each.states[name] for name in ("exp_avg", "exp_avg_sq")},
        )
        for each in slices
    ]
