"""Reading some of a checkpoint's parts: a layer's experts, while there is memory for one layer only.

Megatron's own loading wants all of a tensor's parts that a process has at once, and `layers` is an axis of each tensor.
This reads with torch's storage reader what a list of parts needs, process by process: no rank waits for another.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class PartialReader:
    """A checkpoint whose parts are read as they are asked for. Raises OSError when it cannot be opened."""

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        self._metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, True)

    def read(self, shards: Iterable[ShardedTensor]) -> None:
        """Fill the shards' own storage. Raises KeyError for a tensor that the checkpoint lacks, ValueError for one of
        another shape."""
        items: list[ReadItem] = []
        targets: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        for shard in shards:
            stored = self._metadata.state_dict_metadata[shard.key]
            if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != tuple(shard.global_shape):
                raise ValueError(
                    f"{shard.key}: expected {tuple(shard.global_shape)}; found {getattr(stored, 'size', stored)}"
                )
            offsets = tuple(shard.global_offset)
            target = shard.data.view((1,) * shard.prepend_axis_num + tuple(shard.data.shape))
            targets[shard.key, offsets] = target
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(target.shape))
            items += create_read_items_for_chunk_list(shard.key, stored, [chunk])
        self._reader.read_data(LoadPlan(items), _Into(targets)).wait()


class _Into(LoadPlanner):
    """Tells the reader where each part goes."""

    def __init__(self, targets: dict[tuple[str, tuple[int, ...]], Tensor]) -> None:
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        offset = read_item.dest_index.offset
        assert offset is not None
        target = self._targets[read_item.dest_index.fqn, tuple(offset)]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The reader has copied into what `resolve_tensor` gave."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"only tensors are asked for; found {read_item}, {value}")

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The plan is ready-made, here and in the three that follow."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan
