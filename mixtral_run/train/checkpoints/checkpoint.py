"""Loading base checkpoints of any layout, or HF directories, into a model; loading adapter checkpoints.

docs/formats.md describes the files; `saving.py` next to this file writes adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixtral_run.errors import WeightsError
from mixtral_run.model.adapters.cast_adapters import note_change
from mixtral_run.model.adapters.trained_also import is_trained_also
from mixtral_run.model.mixtral import MixtralModel, is_adapter
from mixtral_run.model.parallel.megatron import ShardedTensor
from mixtral_run.train.base_reader import BaseReader, target_of
from mixtral_run.train.checkpoints.adapter_check import check_saved_files
from mixtral_run.train.checkpoints.adapter_shards import adapter_shards, live_states, shards_of
from mixtral_run.train.quantized_experts import CacheOptions, ExpertCache
from mixtral_run.weights.adapter.given_adapter import PeftDescription
from mixtral_run.weights.adapter.peft_factors import PeftFactors
from mixtral_run.weights.adapter.schema import LINEAR_KEYS, is_of_optimizer, linear_in_key
from mixtral_run.weights.hf.fingerprint import fingerprint_of_checksums
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.io.daemon_threads import Beside
from mixtral_run.weights.load.read_parts import PartSum, Target, checksums_of, read_into
from mixtral_run.weights.manifest.base_checkpoint import is_of_model
from mixtral_run.weights.manifest.checkpoint_folder import newest_iteration
from mixtral_run.weights.manifest.describe import AdapterDescription, BaseDescription
from mixtral_run.weights.mapping.hf_to_megatron import VOCABULARY_KEYS

EXPERTS_PREFIX = "decoder.layers.mlp.experts."
"""The prefix of the keys of experts. All layers have the same keys; the offset tells the layer."""


def load_base(
    model: MixtralModel,
    base: BaseDescription,
    cache: CacheOptions | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Fill the model's base weights from a checkpoint of any TP/EP layout, or from an HF directory.

    With a base in 8 or 4 bit the experts are read from the quantized cache, as `cache` allows, or quantized one linear
    layer at a time. Attention and the output layer in 8 bit are quantized each time: an HF model's fingerprint needs
    all of their bytes read in any case. Sets the model's `base_fingerprint`. All ranks must call.

    Raises:
        WeightsError: the checkpoint's tensors are not the model's, or a file cannot be read.
    """
    experts = ExpertCache(model, base, cache or CacheOptions())
    if base.weights is not None:
        model.base_fingerprint = _read_hf(model, base.weights, experts, meanwhile)
        return
    with BaseReader(newest_iteration(base.folder)) as reader:
        beside = Beside(meanwhile, "beside the load")
        # Experts in 8 or 4 bit have no memory yet and therefore no shards.
        reader.read(shards_of(model, adapters=False).values())
        beside.result()
        reader.agree()
        model.quantize_attention()
        model.base_fingerprint = base.fingerprint
        if model.settings.base_precision == "bf16":
            return
        found = experts.find()
        if found is not None and experts.load(found):
            return
        with experts.building() as build:
            model.quantize_experts(lambda: reader.read(_expert_shards(model).values()), build.add)
            reader.agree()
            build.commit(base.fingerprint)


def _expert_shards(model: MixtralModel) -> dict[str, ShardedTensor]:
    """Return the shards of the experts' weights that have memory at the moment: those of one linear layer.

    As in `shards_of`, which would describe all layers each time.
    """
    return {
        name: shard
        for number, experts in enumerate(model.experts)
        if any(linear.has_weight for linear in experts.linears.values())
        for name, shard in experts.sharded_state_dict(EXPERTS_PREFIX, ((0, number, len(model.experts)),)).items()
        if not is_adapter(name)
    }


def _read_hf(
    model: MixtralModel, weights: HFWeights, experts: ExpertCache, meanwhile: Callable[[], None] = lambda: None
) -> str:
    """Fill the model, each rank its own part. Return the fingerprint of the weights that all ranks read."""
    reading = _HfReading(weights)
    beside = Beside(meanwhile, "beside the load")
    reading.read(shards_of(model, adapters=False))
    beside.result()
    checksums = reading.checksums()
    model.quantize_attention()
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

    Weights of the base that the model trains and the adapter does not have stay those of the base. All ranks must call.
    """
    shards = {
        name: shard
        for name, shard in shards_of(model, adapters=True).items()
        if is_adapter(name) or is_trained_also(name, adapter.lora)
    }
    try:
        if isinstance(adapter, PeftDescription):
            for shard in shards.values():
                _fill_from_peft(target_of(shard), adapter.factors)
            return
        check_saved_files(adapter, model.mesh)
        _load_into(shards, adapter.folder, is_of_model)
    finally:
        # Files are read into the memory of tensors, which torch does not see.
        note_change(model.parameters())


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


def _load_into(shards: dict[str, ShardedTensor], folder: Path, wanted: Callable[[str], bool]) -> None:
    """Copy the tensors of an iteration's folder into the shards' own storage. All ranks must call.

    Not by dist_checkpointing.load, which unpickles `.metadata` and common.pt without restrictions: an adapter from
    someone else could run anything. wanted: selects the checkpoint's tensors by their keys.
    """
    with BaseReader(folder, wanted) as reader:
        reader.read(shards.values())
        reader.agree()


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
    shards = adapter_shards(model, live_states(model, optimizer))
    moments = {name: shard for name, shard in shards.items() if is_of_optimizer(shard.key)}
    _load_into(moments, adapter.folder, is_of_optimizer)
