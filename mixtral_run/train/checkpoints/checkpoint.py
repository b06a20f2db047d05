"""Loading base checkpoints of any layout, or HF directories, into a model; saving and loading adapter checkpoints.

docs/formats.md describes the files. A checkpoint is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from mixtral_run.errors import TrainingError, WeightsError
from mixtral_run.launch.worker_errors import is_consequence
from mixtral_run.model.mixtral import MixtralModel, is_adapter
from mixtral_run.model.parallel.megatron import (
    CheckpointingException,
    ShardedTensor,
    dist_checkpointing,
)
from mixtral_run.model.parallel.mesh import Mesh, is_out_of_memory
from mixtral_run.train.base_reader import BaseReader, target_of
from mixtral_run.train.checkpoints.adapter_check import check_adapter_files
from mixtral_run.train.checkpoints.adapter_writer import AdapterWriter
from mixtral_run.train.checkpoints.random_state import gather_random_state, write_random_state
from mixtral_run.train.checkpoints.save_failure import save_failure
from mixtral_run.train.quantized_experts import CacheOptions, ExpertCache
from mixtral_run.train.steps.soundness import check_sound
from mixtral_run.weights.adapter.given_adapter import PeftDescription
from mixtral_run.weights.adapter.peft_factors import PeftFactors
from mixtral_run.weights.adapter.schema import LINEAR_KEYS, is_of_optimizer, linear_in_key
from mixtral_run.weights.hf.fingerprint import fingerprint_of_checksums
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.hf.tokenizer_files import copy_tokenizer
from mixtral_run.weights.io.files import sync_folder_and_files, write_atomically
from mixtral_run.weights.load.read_parts import PartSum, Target, checksums_of, read_into
from mixtral_run.weights.manifest.adapter_files import NEXT_MARKER, TOKENIZER, checksums
from mixtral_run.weights.manifest.base_checkpoint import is_of_model
from mixtral_run.weights.manifest.checkpoint_folder import LATEST, newest_iteration
from mixtral_run.weights.manifest.describe import AdapterDescription, BaseDescription
from mixtral_run.weights.manifest.manifest import write_manifest
from mixtral_run.weights.manifest.run_state import RunState
from mixtral_run.weights.mapping.hf_to_megatron import VOCABULARY_KEYS


def load_base(model: MixtralModel, base: BaseDescription, cache: CacheOptions | None = None) -> None:
    """Fill the model's base weights from a checkpoint of any TP/EP layout, or from an HF directory.

    With a base in 8 or 4 bit the experts are read from the quantized cache, as `cache` allows, or quantized one layer
    at a time. Sets the model's `base_fingerprint`. All ranks must call.

    Raises:
        WeightsError: the checkpoint's tensors are not the model's, or a file cannot be read.
    """
    experts = ExpertCache(model, base, cache or CacheOptions())
    if base.weights is not None:
        model.base_fingerprint = _read_hf(model, base.weights, experts)
        return
    with BaseReader(newest_iteration(base.folder)) as reader:
        # Experts in 8 or 4 bit have no memory yet and therefore no shards.
        reader.read(_shards(model, adapters=False).values())
        reader.agree()
        model.base_fingerprint = base.fingerprint
        if model.settings.base_precision == "bf16":
            return
        found = experts.find()
        if found is not None and experts.load(found):
            return
        with experts.building() as build:
            # Only the experts of the layer that has memory at the moment have shards.
            model.quantize_experts(lambda: reader.read(_expert_shards(model).values()), build.add)
            reader.agree()
            build.commit(base.fingerprint)


def _expert_shards(model: MixtralModel) -> dict[str, ShardedTensor]:
    return {name: each for name, each in _shards(model, adapters=False).items() if ".mlp.experts." in name}


def _read_hf(model: MixtralModel, weights: HFWeights, experts: ExpertCache) -> str:
    """Fill the model, each rank its own part. Return the fingerprint of the weights that all ranks read."""
    reading = _HfReading(weights)
    reading.read(_shards(model, adapters=False))
    checksums = reading.checksums()
    if model.settings.base_precision == "bf16":
        return fingerprint_of_checksums(weights.architecture, weights.dtype, checksums)
    found = experts.find()
    if found is not None:
        # The weights that were read just now and the sources of the cached experts must be one model.
        now = fingerprint_of_checksums(weights.architecture, weights.dtype, {**found.sources, **checksums})
        if now != found.fingerprint:
            experts.reject(found, f"made of a base with fingerprint {found.fingerprint}, not {now}")
        elif experts.load(found):
            return now
    with experts.building() as build:
        model.quantize_experts(lambda: reading.read(_expert_shards(model)), build.add)
        of_experts = reading.checksums()
        fingerprint = fingerprint_of_checksums(weights.architecture, weights.dtype, {**checksums, **of_experts})
        build.commit(fingerprint, of_experts)
    return fingerprint


class _HfReading:
    """One rank's reading of an HF directory; failures are raised on all ranks together."""

    def __init__(self, weights: HFWeights) -> None:
        self._weights = weights
        self._sums: list[PartSum] = []
        self._failed: list[WeightsError] = []

    def read(self, shards: dict[str, ShardedTensor]) -> None:
        """Fill the shards' own storage; do nothing after a failure."""
        if self._failed:
            return
        for shard in shards.values():
            # Rows of padding, which no HF tensor fills.
            if shard.key in VOCABULARY_KEYS and shard.global_shape[0] > self._weights.architecture.vocab_size:
                shard.data.detach().zero_()
        try:
            self._sums.extend(read_into(self._weights, map(target_of, shards.values())))
        except WeightsError as error:
            self._failed.append(error)

    def checksums(self) -> dict[str, int]:
        """Return the CRC-32 of the tensors that the ranks read since the last call. All ranks must call.

        Raises the failure of any rank on all of them: the others would wait for it otherwise.
        """
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, self._failed or self._sums)
        self._sums = []
        for each in outcomes:
            if each and isinstance(each[0], WeightsError):
                raise each[0]
        return checksums_of(self._weights.sources, (part for parts in outcomes for part in parts))


def load_adapter(model: MixtralModel, adapter: AdapterDescription) -> None:
    """Fill the model's adapters, after all files of an adapter of the kit were compared with their checksums.

    All ranks must call.
    """
    if isinstance(adapter, PeftDescription):
        for shard in _shards(model, adapters=True).values():
            _fill_from_peft(target_of(shard), adapter.factors)
        return
    check_adapter_files(adapter, model.mesh)
    _load_into(_shards(model, adapters=True), adapter.folder, is_of_model)


def _fill_from_peft(target: Target, factors: PeftFactors) -> None:
    """Fill a rank's part of A or B, of one layer or of several experts of a layer."""
    module = next(module for module in LINEAR_KEYS if f".{module}." in target.key)
    read = factors.linear_in if target.key == linear_in_key(module) else factors.linear_out
    *leading, row, column = target.offset
    *counts, rows, columns = target.shape
    into = target.data.view(target.shape)
    for index in product(*map(range, counts)):
        matrix = read(module, tuple(first + at for first, at in zip(leading, index, strict=True)))
        into[index].copy_(matrix[row : row + rows, column : column + columns])


def _shards(model: MixtralModel, *, adapters: bool) -> dict[str, ShardedTensor]:
    everything: dict[str, Any] = model.gpt.sharded_state_dict()
    return {
        name: shard
        for name, shard in everything.items()
        if isinstance(shard, ShardedTensor) and is_adapter(name) == adapters
    }


def _load_into(shards: dict[str, ShardedTensor], folder: Path, wanted: Callable[[str], bool]) -> None:
    """Copy the tensors of an iteration's folder into the shards' own storage. All ranks must call.

    Not by dist_checkpointing.load, which unpickles `.metadata` and common.pt without restrictions: an adapter from
    someone else could run anything. wanted: selects the checkpoint's tensors by their keys.
    """
    with BaseReader(folder, wanted) as reader:
        reader.read(shards.values())
        reader.agree()


def optimizer_shards(model: MixtralModel, optimizer: torch.optim.Optimizer) -> dict[str, ShardedTensor]:
    """Return the optimizer's moments of every adapter parameter, sharded as the parameter is."""
    owners = [(p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
    result: dict[str, ShardedTensor] = {}
    for name, shard in _shards(model, adapters=True).items():
        for moment in ("exp_avg", "exp_avg_sq"):
            data = _same_part(shard.data, owners, moment)
            key = f"optimizer.{moment}.{shard.key}"
            result[f"optimizer.{moment}.{name}"] = _replace(shard, key=key, data=data)
    return result


def _same_part(part: torch.Tensor, owners: list[tuple[Any, Any]], moment: str) -> torch.Tensor:
    """Return the view of a parameter's moment at the offset and shape that `part` has in the parameter."""
    for parameter, state in owners:
        offset = (part.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        if 0 <= offset < parameter.numel():
            tensor: torch.Tensor = state[moment].as_strided(part.shape, part.stride(), offset)
            return tensor
    raise AssertionError("every part of an adapter is a view of a parameter of the optimizer")


def _replace(shard: ShardedTensor, *, key: str, data: torch.Tensor) -> ShardedTensor:
    return dataclasses.replace(shard, key=key, data=data, dtype=data.dtype)


def save_adapter(
    model: MixtralModel,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    iteration: int,
    description: Mapping[str, Any],
    *,
    state: RunState | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """Write FOLDER/iter_… with adapters and optimizer state, then point LATEST at it. All ranks must call.

    Args:
        model: its adapters are saved.
        optimizer: AdamW over the adapters.
        folder: the adapter's folder.
        iteration: the number of finished iterations.
        description: goes into the iteration's mixtral_run.json, next to the architecture.
        state: goes there as well; --resume continues with it.
        tokenizer: folder whose files are copied next to the iterations if they are not there.

    Returns:
        The iteration's folder.

    Raises:
        TrainingError: it is spoiled, or cannot be written; earlier iterations are unchanged.
    """
    check_sound(model, optimizer, folder, iteration)
    final = folder / f"iter_{iteration:07d}"
    partial = folder / f".{final.name}.partial"
    first = model.mesh.is_first
    with _as_training_errors(folder, iteration, partial if first else None):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if tokenizer is not None:
                _copy_tokenizer(tokenizer, folder)
        dist.barrier()
        shards: dict[str, Any] = {**_shards(model, adapters=True), **optimizer_shards(model, optimizer)}
        shards |= {"checkpoint_version": 3.0, "iteration": iteration}
        dist_checkpointing.save(shards, str(partial), AdapterWriter())
        sums = _checksums_of_shards(model.mesh, partial)
        random_state = gather_random_state(model.mesh)
        if first:
            write_random_state(partial, random_state)
            names = [each.name for each in partial.iterdir() if each.name not in sums]
            write_manifest(
                partial,
                "adapter",
                architecture=model.architecture.to_mapping(),
                iteration=iteration,
                **description,
                state=(state or RunState()).to_mapping(),
                tokenizer_files=_checksums_of_tokenizer(folder),
                files={**sums, **checksums(partial, names)},
            )
            sync_folder_and_files(partial)
            # What is left of it shows that a save was cut off between the two renames.
            write_atomically(folder / NEXT_MARKER, f"{iteration}\n")
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync_folder_and_files(folder)
            (folder / NEXT_MARKER).rename(folder / LATEST)
            sync_folder_and_files(folder)
        dist.barrier()
    return final


def _checksums_of_shards(mesh: Mesh, folder: Path) -> dict[str, str]:
    """Return the checksums of all .distcp files; each rank reads its own. All ranks must call."""
    own = [each.name for each in folder.glob(f"__{mesh.rank}_*.distcp")]
    gathered: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(gathered, checksums(folder, own))
    return {name: crc for each in gathered for name, crc in each.items()}


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    if not (folder / TOKENIZER).exists():
        partial = folder / f".{TOKENIZER}.partial"
        copy_tokenizer(tokenizer, partial)
        partial.rename(folder / TOKENIZER)


def _checksums_of_tokenizer(folder: Path) -> dict[str, str]:
    files = [each.name for each in (folder / TOKENIZER).glob("*") if each.is_file()]
    return checksums(folder / TOKENIZER, files)


@contextmanager
def _as_training_errors(folder: Path, iteration: int, partial: Path | None) -> Iterator[None]:
    """Translate errors of a save into a TrainingError. Remove `partial`, if given: the disk may be full."""
    try:
        yield
    # torch's CheckpointException derives from BaseException, not from Exception.
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
            found=save_failure(error, folder),
            next_command=f"df -h {folder}, then the same command with --resume",
        ) from error


def load_optimizer(model: MixtralModel, optimizer: torch.optim.Optimizer, adapter: AdapterDescription) -> None:
    """Load the moments of AdamW that `save_adapter` wrote, without a check of the files. All ranks must call."""
    steps = adapter.iteration if adapter.state.optimizer_steps is None else adapter.state.optimizer_steps
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    _load_into(optimizer_shards(model, optimizer), adapter.folder, is_of_optimizer)
