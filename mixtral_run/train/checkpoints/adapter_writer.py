"""Writing an adapter's shards as torch_dist files from the training process itself.

Megatron's own strategy starts three further processes for each rank, so that training can continue during a save; they
must import torch first. Writing from the training process takes less than half the time in the first save
(benchmarks/adapter_save.py), and a thread of it lets training continue as well (saving.py). Files are those that torch
reads; shard_file.py writes them, and torch's own writer the few that it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from mixtral_run.model.parallel.megatron import (
    MCoreSavePlanner,
    ShardedTensor,
    mcore_to_pyt_state_dict,
    replace_keys_with_sharded_keys,
    save_preprocess,
    validate_sharding_integrity,
)
from mixtral_run.weights.load.read_parts import default_workers
from mixtral_run.weights.manifest.adapter_files import checksums
from mixtral_run.weights.torch_dist.shard_file import can_write, write_shards


class AdapterWriter:
    """The plan of the files of an adapter, made once; then it writes what the shards hold, as often as wanted.

    All ranks must create one. It can be created in a thread beside the training if it has a process group of its own.
    Raises Megatron's CheckpointingException if a part of a tensor has not exactly one shard.
    """

    def __init__(self, shards: Mapping[str, ShardedTensor], group: dist.ProcessGroup | None = None) -> None:
        """group: of all ranks, for objects; None for the group of the training."""
        rank, size = dist.get_rank(), dist.get_world_size()
        # Megatron's own check of the shards gathers them over the group of the training.
        checked, _ = save_preprocess(dict(shards), validate_access_integrity=False)
        by_key, _, _ = replace_keys_with_sharded_keys(checked, True)
        # dedup_replicated_tensors: only main replicas are left.
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._planner.set_up_planner(mcore_to_pyt_state_dict(by_key, False), is_coordinator=rank == 0)
        own = self._planner.create_local_plan()
        # In the order in which torch's writer copies tensors from a GPU.
        own.items.sort(key=_num_bytes)
        found: list[Any] = [None] * size
        dist.all_gather_object(found, (own, [each.without_data() for each in shards.values()]), group=group)
        validate_sharding_integrity([described for _, described in found])
        plans, self._metadata = self._planner.create_global_plan([plan for plan, _ in found])
        self._plan = self._planner.finish_plan(FileSystemWriter(".").prepare_global_plan(plans)[rank])

    def write(self, folder: Path) -> tuple[list[Any], dict[str, str]]:
        """Write this rank's file and wait until it is on the disk. Rank-local.

        Returns what `finish` needs of it, and its checksum by its name. Raises OSError or RuntimeError: torch's writer
        in C++ reports a failed write as the latter.
        """
        tensors: list[Tensor] = [self._planner.resolve_data(item) for item in self._plan.items]
        # A save in the background leaves the cores to the training.
        in_host_memory = all(each.is_cpu for each in tensors)
        if not can_write(tensors):
            # Tensors on the host are written as they are. Torch's reader of GPU tensors would wait for the training.
            writer = FileSystemWriter(folder, per_thread_copy_ahead=0 if in_host_memory else 10_000_000)
            written: list[Any] = writer.write_data(self._plan, self._planner).value()
            return written, checksums(folder, {each.storage_data.relative_path for each in written})
        name = f"{self._plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        places, crc = write_shards(folder / name, tensors, 2 if in_host_memory else default_workers())
        results = [
            WriteResult(item.index, place.length, _StorageInfo(name, place.start, place.length))
            for item, place in zip(self._plan.items, places, strict=True)
        ]
        return results, {name: f"{crc:08x}"}

    def finish(self, folder: Path, written: list[list[Any]]) -> None:
        """Write `.metadata`, which describes the files of all ranks. One process calls. written: of each rank."""
        writer = FileSystemWriter(folder)
        writer.set_up_storage_writer(True)
        writer.finish(self._metadata, written)


def _num_bytes(item: Any) -> int:
    data = item.tensor_data
    num_bytes: int = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
    return num_bytes
