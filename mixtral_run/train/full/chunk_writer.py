"""Writing chunks of any size as torch_dist files, each rank its own file.

Megatron's planner wants every tensor cut into a regular grid, which slices of the optimizer's states are not. A plan of
torch.distributed.checkpoint takes any rectangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from mixtral_run.train.full.chunks import Chunk
from mixtral_run.weights.manifest.adapter_files import checksums


class ChunkWriter:
    """The plan of the files of one checkpoint. All ranks must create one, each with its own chunks."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._data = _Data(chunks)
        own = SavePlan([_item(each) for each in chunks])
        plans: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(plans, own)
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plan = FileSystemWriter(".").prepare_global_plan(plans)[dist.get_rank()]

    def write(self, folder: Path) -> tuple[list[Any], dict[str, str]]:
        """Write this rank's file and wait until it is on the disk. Rank-local.

        Returns what `finish` needs of it, and its checksum by its name. Raises OSError or RuntimeError: torch's writer
        in C++ reports a failed write as the latter.
        """
        written: list[Any] = (
            FileSystemWriter(folder, per_thread_copy_ahead=0).write_data(self._plan, self._data).value()
        )
        return written, checksums(folder, {each.storage_data.relative_path for each in written})

    def finish(self, folder: Path, written: list[list[Any]]) -> None:
        """Write `.metadata`, which describes the files of all ranks. One process calls. written: of each rank."""
        writer = FileSystemWriter(folder)
        writer.set_up_storage_writer(True)
        writer.finish(self._metadata, written)


class _Data(DefaultSavePlanner):
    """Gives torch's writer the data of the chunks."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        super().__init__()
        self._chunks = {(each.key, each.target.offset): each for each in chunks}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        offset = write_item.index.offset
        assert offset is not None
        target = self._chunks[(write_item.index.fqn, tuple(offset))].target
        return target.data.reshape(target.shape).contiguous()


def _item(chunk: Chunk) -> WriteItem:
    target = chunk.target
    place = ChunkStorageMetadata(torch.Size(target.offset), torch.Size(target.shape))
    data = TensorWriteData(place, TensorProperties(dtype=target.data.dtype), torch.Size(chunk.global_shape))
    return WriteItem(MetadataIndex(chunk.key, torch.Size(target.offset)), WriteItemType.SHARD, tensor_data=data)
