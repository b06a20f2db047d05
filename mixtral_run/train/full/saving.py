"""Saving and loading a checkpoint of full fine-tuning: a base that every verb reads, and the optimizer's states.

docs/formats.md describes the files; checkpoints/saving.py writes them as it does those of an adapter, at once or in the
background.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mixtral_run.errors import WeightsError
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.train.checkpoints.adapter_check import check_saved_files
from mixtral_run.train.checkpoints.adapter_shards import ParameterState
from mixtral_run.train.checkpoints.host_copy import HostCopy
from mixtral_run.train.checkpoints.save_target import SaveTarget
from mixtral_run.train.checkpoints.saving import FileWriter, Saver, SaveRequest
from mixtral_run.train.full.chunk_writer import ChunkWriter
from mixtral_run.train.full.chunks import state_chunks, weight_chunks
from mixtral_run.train.full.full_copy import FullCopy, states_of, written_slices
from mixtral_run.train.full.sharded_adamw import ShardedAdamW
from mixtral_run.weights.adapter.schema import is_of_optimizer
from mixtral_run.weights.hf.fingerprint import fingerprint_of_checksums
from mixtral_run.weights.hf.stored_tensors import stored_checksums
from mixtral_run.weights.load.reshard import fill
from mixtral_run.weights.manifest.base_checkpoint import is_of_model
from mixtral_run.weights.manifest.describe import TrainedDescription
from mixtral_run.weights.mapping.hf_to_megatron import hf_tensors
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader


class FullSaver(Saver):
    """Saves all weights with the optimizer's states."""

    WHAT, KIND = "model", "base"

    def __init__(self, model: MixtralModel, optimizer: ShardedAdamW, folder: Path, timeout_minutes: float = 10) -> None:
        super().__init__(model, folder, timeout_minutes)
        self._optimizer = optimizer

    def _new_copy(self) -> HostCopy:
        return FullCopy(self._model, self._optimizer)

    def _live_states(self) -> list[ParameterState]:
        return states_of(written_slices(self._model, self._optimizer))

    def _writer_of(self, states: list[ParameterState], copy: HostCopy | None) -> FileWriter:
        del states
        if isinstance(copy, FullCopy):
            return ChunkWriter(copy.chunks)
        return ChunkWriter([*weight_chunks(self._model), *state_chunks(self._model, self._optimizer.slices)])

    def _described(self, target: SaveTarget, request: SaveRequest) -> SaveRequest:
        """Return the request with the weights' dtype and fingerprint, which the ranks read again, each its share."""
        architecture = self._model.architecture
        names = list(hf_tensors(architecture))[target.mesh.rank :: target.mesh.world_size]

        def own_part() -> dict[str, int]:
            with Reader(target.partial, is_of_model) as reader:
                return stored_checksums(reader, architecture, names)

        parts = target.gather(target.on_all_ranks(own_part))
        if not target.mesh.is_first:
            return request
        sums = {name: crc for each in parts for name, crc in each.items()}
        dtype = str(self._model.settings.dtype).removeprefix("torch.")
        fingerprint = fingerprint_of_checksums(architecture, dtype, sums)
        described = {**request.description, "dtype": dtype, "fingerprint": fingerprint}
        return dataclasses.replace(request, description=described)


def load_states(model: MixtralModel, optimizer: ShardedAdamW, trained: TrainedDescription) -> None:
    """Fill the optimizer's states from a checkpoint of any layout, after a check of its files. All ranks must call."""
    check_saved_files(trained, model.mesh)
    failed: WeightsError | None = None
    try:
        with Reader(trained.folder, is_of_optimizer) as reader:
            fill(reader, [each.target for each in state_chunks(model, optimizer.slices, all_ranks=True)])
    except WeightsError as error:
        failed = error
    outcomes: list[Any] = [None] * model.mesh.world_size
    dist.all_gather_object(outcomes, failed)
    for each in outcomes:
        if each is not None:
            raise each
    steps = trained.state.optimizer_steps
    optimizer.num_steps = trained.iteration if steps is None else steps
