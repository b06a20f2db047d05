"""Saving and loading a checkpoint of full fine-tuning: a base that every verb reads, and the optimizer's states.

docs/formats.md describes the files. A checkpoint is written under a temporary name and renamed when it is complete; the
marker of the newest one follows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixtral_run.errors import WeightsError
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.train.checkpoints.adapter_check import check_saved_files
from mixtral_run.train.checkpoints.adapter_shards import ParameterState
from mixtral_run.train.checkpoints.random_state import own_random_state, write_random_state
from mixtral_run.train.checkpoints.save_target import SaveTarget
from mixtral_run.train.checkpoints.saving import Saver, SaveRequest, begin, complete
from mixtral_run.train.checkpoints.soundness import check_sound
from mixtral_run.train.full.chunk_writer import ChunkWriter
from mixtral_run.train.full.chunks import state_chunks, weight_chunks
from mixtral_run.train.full.sharded_adamw import ShardedAdamW
from mixtral_run.weights.adapter.schema import is_of_optimizer
from mixtral_run.weights.hf.fingerprint import fingerprint_of_checksums
from mixtral_run.weights.hf.stored_tensors import stored_checksums
from mixtral_run.weights.load.reshard import fill
from mixtral_run.weights.manifest.adapter_files import checksums
from mixtral_run.weights.manifest.base_checkpoint import is_of_model
from mixtral_run.weights.manifest.describe import TrainedDescription
from mixtral_run.weights.mapping.hf_to_megatron import hf_tensors
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader

WHAT = "model"


class FullSaver(Saver):
    """Saves all weights with the optimizer's states, while the training waits. All ranks must call its methods."""

    def __init__(self, model: MixtralModel, optimizer: ShardedAdamW, folder: Path) -> None:
        self._model, self._optimizer, self._folder = model, optimizer, folder

    def save(self, request: SaveRequest) -> Path:
        """Write FOLDER/iter_… and point LATEST at it. Return the folder.

        Raises TrainingError if the weights are spoiled, or cannot be written; earlier iterations are unchanged.
        """
        model, mesh = self._model, self._model.mesh
        if mesh.device.type == "cuda":
            # States in host memory may still be on their way from the GPU.
            torch.cuda.synchronize(mesh.device)
        target = SaveTarget(mesh, self._folder, request.iteration, what=WHAT)
        check_sound(self._states(), self._folder, request.iteration, what=WHAT)
        writer = ChunkWriter([*weight_chunks(model), *state_chunks(model, self._optimizer.slices)])
        random_state = own_random_state(mesh)

        def own_part() -> tuple[list[Any], dict[str, str], Any]:
            written = writer.write(target.partial)
            names = [each.name for each in target.partial.glob(f"__{mesh.rank}_*.distcp")]
            return written, checksums(target.partial, names), random_state

        target.on_first_rank(lambda: begin(target, request.tokenizer))
        parts = target.gather(target.on_all_ranks(own_part))
        target.on_first_rank(lambda: writer.finish(target.partial, [each[0] for each in parts]))
        tensors = self._tensor_checksums(target)

        def rest() -> None:
            write_random_state(target.partial, mesh, [each[2] for each in parts])
            dtype = str(model.settings.dtype).removeprefix("torch.")
            fingerprint = fingerprint_of_checksums(model.architecture, dtype, tensors)
            described = dataclasses.replace(
                request, description={**request.description, "dtype": dtype, "fingerprint": fingerprint}
            )
            sums = {name: crc for each in parts for name, crc in each[1].items()}
            complete(target, described, model.architecture.to_mapping(), sums, "base")

        target.on_first_rank(rest)
        if mesh.is_first:
            request.then()
        return target.final

    def _tensor_checksums(self, target: SaveTarget) -> dict[str, int]:
        """Return the CRC-32 of the HF tensors that were written, which the ranks read again, each its share."""
        names = list(hf_tensors(self._model.architecture))[target.mesh.rank :: target.mesh.world_size]

        def own_part() -> dict[str, int]:
            with Reader(target.partial, is_of_model) as reader:
                return stored_checksums(reader, self._model.architecture, names)

        found: list[Any] = [None] * target.mesh.world_size
        dist.all_gather_object(found, target.on_all_ranks(own_part))
        return {name: crc for each in found for name, crc in each.items()}

    def _states(self) -> list[ParameterState]:
        return [
            ParameterState(
                each.name,
                each.parameter,
                each.states["master"],
                {name: each.states[name] for name in ("exp_avg", "exp_avg_sq")} if self._optimizer.num_steps else {},
            )
            for each in self._optimizer.slices
            if each.first < each.last
        ]


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
