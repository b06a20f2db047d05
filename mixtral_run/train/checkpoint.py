"""Loading base checkpoints of any layout, or HF directories, into a model; saving and loading adapter checkpoints.

The files are described in docs/formats.md. A checkpoint is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from mixtral_run import __version__
from mixtral_run.errors import TrainingError, WeightsError
from mixtral_run.launch.processes import is_consequence
from mixtral_run.model.mixtral import MixtralModel, is_adapter
from mixtral_run.model.parallel.megatron import (
    CheckpointingException,
    ShardedTensor,
    StrictHandling,
    dist_checkpointing,
)
from mixtral_run.model.parallel.mesh import is_out_of_memory
from mixtral_run.train.adapter_writer import AdapterWriter
from mixtral_run.train.base_reader import BaseReader, target_of
from mixtral_run.train.quantized_experts import Keep, KeptExperts
from mixtral_run.weights.hf.fingerprint import fingerprint_of_checksums
from mixtral_run.weights.hf.safetensors_files import HFWeights
from mixtral_run.weights.io.files import sync_folder_and_files, write_atomically
from mixtral_run.weights.load.read_parts import PartSum, checksums_of, read_into
from mixtral_run.weights.manifest.describe import (
    DESCRIPTION,
    LATEST,
    AdapterDescription,
    BaseDescription,
    newest_iteration,
)


def load_base(model: MixtralModel, base: BaseDescription, keep: Keep | None = None) -> None:
    """Fill the model's base weights from a checkpoint of any TP/EP layout, or from an HF directory.

    With a base in 8 or 4 bit the experts come from where `keep` lets them be kept, or are quantized on the way, a layer
    at a time. Sets the model's `base_fingerprint`. All ranks must call. Raises WeightsError when the checkpoint's
    tensors are not the model's, or a file cannot be read.
    """
    experts = KeptExperts(model, base, keep or Keep())
    if base.weights is not None:
        model.base_fingerprint = _read_hf(model, base.weights, experts)
        return
    with BaseReader(newest_iteration(base.folder)) as reader:
        # Experts in 8 or 4 bit have no memory yet, and so no shards.
        reader.read(_shards(model, adapters=False).values())
        reader.agree()
        model.base_fingerprint = base.fingerprint
        if model.settings.base_precision == "bf16":
            return
        found = experts.find()
        if found is not None and experts.load(found):
            return
        with experts.making() as making:
            # Of the experts, those of the layer that has memory are the ones that have shards.
            model.quantize_experts(lambda: reader.read(_expert_shards(model).values()), making.add)
            reader.agree()
            making.commit(base.fingerprint)


def _expert_shards(model: MixtralModel) -> dict[str, ShardedTensor]:
    return {name: each for name, each in _shards(model, adapters=False).items() if ".mlp.experts." in name}


def _read_hf(model: MixtralModel, weights: HFWeights, experts: KeptExperts) -> str:
    """Fill the model, each rank its own part; the weights' whole fingerprint, of what all ranks read."""
    reading = _HfReading(weights)
    reading.read(_shards(model, adapters=False))
    checksums = reading.checksums()
    if model.settings.base_precision == "bf16":
        return fingerprint_of_checksums(weights.architecture, weights.dtype, checksums)
    found = experts.find()
    if found is not None:
        # Of what was read just now and of what the kept experts were made of: all of it has to be one model.
        now = fingerprint_of_checksums(weights.architecture, weights.dtype, {**found.sources, **checksums})
        if now != found.fingerprint:
            experts.refuse(found, f"made of a base with fingerprint {found.fingerprint}, not {now}")
        elif experts.load(found):
            return now
    with experts.making() as making:
        model.quantize_experts(lambda: reading.read(_expert_shards(model)), making.add)
        of_experts = reading.checksums()
        fingerprint = fingerprint_of_checksums(weights.architecture, weights.dtype, {**checksums, **of_experts})
        making.commit(fingerprint, of_experts)
    return fingerprint


class _HfReading:
    """What one rank reads of an HF directory, and how it tells the others what came of it."""

    def __init__(self, weights: HFWeights) -> None:
        self._weights = weights
        self._sums: list[PartSum] = []
        self._failed: list[WeightsError] = []

    def read(self, shards: dict[str, ShardedTensor]) -> None:
        """Fill the shards' own storage; after a failure nothing."""
        if self._failed:
            return
        try:
            self._sums.extend(read_into(self._weights, map(target_of, shards.values())))
        except WeightsError as error:
            self._failed.append(error)

    def checksums(self) -> dict[str, int]:
        """CRC-32 of the tensors that the ranks read since the last call. All ranks must call.

        Raises the failure of any of them: the others would wait for it otherwise.
        """
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, self._failed or self._sums)
        self._sums = []
        for each in outcomes:
            if each and isinstance(each[0], WeightsError):
                raise each[0]
        return checksums_of(self._weights.sources, (part for parts in outcomes for part in parts))


def load_adapter(model: MixtralModel, adapter: AdapterDescription) -> None:
    """Fill the model's adapters. All ranks must call."""
    _load_into(_shards(model, adapters=True), adapter.folder)


def _shards(model: MixtralModel, *, adapters: bool) -> dict[str, ShardedTensor]:
    everything: dict[str, Any] = model.gpt.sharded_state_dict()
    return {
        name: shard
        for name, shard in everything.items()
        if isinstance(shard, ShardedTensor) and is_adapter(name) == adapters
    }


def _load_into(shards: dict[str, ShardedTensor], folder: Path) -> None:
    """Copy the checkpoint's tensors into the shards' own storage."""
    targets = {name: shard.data for name, shard in shards.items()}
    with _told_as_weights_errors(folder):
        loaded = dist_checkpointing.load(dict(shards), str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    with torch.no_grad():
        for name, target in targets.items():
            if loaded[name].data_ptr() != target.data_ptr():
                target.copy_(loaded[name])


_BROKEN = (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError)
"""What reading a checkpoint with other bytes in it ends in."""


@contextmanager
def _told_as_weights_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    # torch's CheckpointException is no Exception: it derives from BaseException.
    except (CheckpointException, CheckpointingException, *_BROKEN) as error:
        if is_out_of_memory(error):
            raise
        raise WeightsError(
            "The checkpoint cannot be loaded into this model.",
            where=str(folder),
            found=_reason(error),
            next_command=f"mixtral-run verify --load {folder.parent}",
        ) from error


def _reason(error: BaseException) -> str:
    """The first line that says something; torch tells the ranks' own errors in `failures`."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}".splitlines()[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def optimizer_shards(model: MixtralModel, optimizer: torch.optim.Optimizer) -> dict[str, ShardedTensor]:
    """The optimizer's moments of every adapter parameter, sharded as the parameter is."""
    owners = [(p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
    result: dict[str, ShardedTensor] = {}
    for name, shard in _shards(model, adapters=True).items():
        for moment in ("exp_avg", "exp_avg_sq"):
            data = _same_part(shard.data, owners, moment)
            key = f"optimizer.{moment}.{shard.key}"
            result[f"optimizer.{moment}.{name}"] = _replace(shard, key=key, data=data)
    return result


def _same_part(part: torch.Tensor, owners: list[tuple[Any, Any]], moment: str) -> torch.Tensor:
    """The piece of a parameter's moment that `part` is of the parameter: a view by the same offset and shape."""
    for parameter, state in owners:
        offset = (part.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        if 0 <= offset < parameter.numel():
            tensor: torch.Tensor = state[moment].as_strided(part.shape, part.stride(), offset)
            return tensor
    raise AssertionError("every adapter's part lies in a parameter of the optimizer")


def _replace(shard: ShardedTensor, *, key: str, data: torch.Tensor) -> ShardedTensor:
    return dataclasses.replace(shard, key=key, data=data, dtype=data.dtype)


def save_adapter(
    model: MixtralModel,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    iteration: int,
    description: Mapping[str, Any],
) -> Path:
    """Write FOLDER/iter_… with adapters and optimizer state, then point LATEST at it. All ranks must call.

    `description` goes into the iteration's mixtral_run.json with the architecture. Returns the iteration's folder.
    Raises TrainingError where it cannot be written; earlier iterations stay as they were.
    """
    final = folder / f"iter_{iteration:07d}"
    partial = folder / f".{final.name}.partial"
    first = model.mesh.is_first
    with _told_when_unwritable(folder, iteration, partial if first else None):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        shards: dict[str, Any] = {**_shards(model, adapters=True), **optimizer_shards(model, optimizer)}
        shards |= {"checkpoint_version": 3.0, "iteration": iteration}
        dist_checkpointing.save(shards, str(partial), AdapterWriter())
        if first:
            values = {
                "format": 1,
                "kind": "adapter",
                "kit_version": __version__,
                "architecture": model.architecture.to_mapping(),
                "iteration": iteration,
                **description,
            }
            write_atomically(partial / DESCRIPTION, json.dumps(values, indent=2) + "\n")
            sync_folder_and_files(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync_folder_and_files(folder)
            write_atomically(folder / LATEST, f"{iteration}\n")
        dist.barrier()
    return final


@contextmanager
def _told_when_unwritable(folder: Path, iteration: int, partial: Path | None) -> Iterator[None]:
    """Tell errors of a save as a TrainingError; `partial`, on the rank that made it, goes: its room may be lacking."""
    try:
        yield
    # torch's CheckpointException is no Exception: it derives from BaseException.
    except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        if is_consequence(error):
            raise RuntimeError(str(error)) from error
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"The adapter of iteration {iteration} cannot be saved.",
            where=str(folder),
            found=_reason(error),
            next_command=f"df -h {folder}, then the same command with --resume, which goes on from what is there",
        ) from error


def load_optimizer(model: MixtralModel, optimizer: torch.optim.Optimizer, adapter: AdapterDescription) -> None:
    """Give AdamW the moments that `save_adapter` kept: training goes on as if never stopped. All ranks must call."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(adapter.iteration), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    _load_into(optimizer_shards(model, optimizer), adapter.folder)
