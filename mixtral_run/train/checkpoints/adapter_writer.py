"""Writing an adapter's shards as torch_dist files from the training process itself.

Megatron's own strategy starts three further processes for each rank, so that training can continue during a save; they
must import torch first. Writing from the training process takes less than half the time in the first save
(benchmarks/adapter_save.py), and a thread of it lets training continue as well (saving.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mixtral_run.model.parallel.megatron import (
    MCoreSavePlanner,
    ShardedTensor,
    mcore_to_pyt_state_dict,
    replace_keys_with_sharded_keys,
    save_preprocess,
)


class AdapterWriter:
    """The plan of the files of an adapter, made once; then it writes what the shards hold, as often as wanted.

    All ranks must create one. Raises Megatron's CheckpointingException if a part of a tensor has not exactly one shard.
    """

    def __init__(self, shards: Mapping[str, ShardedTensor]) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        checked, _ = save_preprocess(dict(shards))
        by_key, _, _ = replace_keys_with_sharded_keys(checked, True)
        # dedup_replicated_tensors: only main replicas are left.
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._planner.set_up_planner(mcore_to_pyt_state_dict(by_key, False), is_coordinator=rank == 0)
        own = self._planner.create_local_plan()
        # In the order in which torch's writer copies tensors from a GPU.
        own.items.sort(key=_num_bytes)
        plans: list[Any] = [None] * size
        dist.all_gather_object(plans, own)
        plans, self._metadata = self._planner.create_global_plan(plans)
        self._plan = self._planner.finish_plan(FileSystemWriter(".").prepare_global_plan(plans)[rank])

    def write(self, folder: Path) -> list[Any]:
        """Write this rank's file, wait until it is on the disk, and return what `finish` needs of it. Rank-local.

        Raises OSError or RuntimeError: torch's writer in C++ reports a failed write as the latter.
        """
        # Tensors on the host are written as they are. Torch's reader of GPU tensors would wait for the training.
        in_host_memory = all(self._planner.lookup_object(item.index).is_cpu for item in self._plan.items)
        writer = FileSystemWriter(folder, per_thread_copy_ahead=0 if in_host_memory else 10_000_000)
        written: list[Any] = writer.write_data(self._plan, self._planner).value()
        return written

    def finish(self, folder: Path, written: list[list[Any]]) -> None:
        """Write `.metadata`, which describes the files of all ranks. One process calls. written: of each rank."""
        writer = FileSystemWriter(folder)
        writer.set_up_storage_writer(True)
        writer.finish(self._metadata, written)


def _num_bytes(item: Any) -> int:
    data = item.tensor_data
    num_bytes: int = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
    return num_bytes
