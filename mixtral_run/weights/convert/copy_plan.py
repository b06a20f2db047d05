"""Plan of a conversion: source and destination of every byte, known before the first one is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.mapping import hf_to_megatron
from mixtral_run.weights.torch_dist.item_writer import PAGE, Frame, frame
from mixtral_run.weights.torch_dist.metadata import StoredItem


@dataclass(frozen=True)
class PlacedChunk:
    """A chunk, its frame, and the file and position of the framed item."""

    chunk: hf_to_megatron.Chunk
    frame: Frame
    file: str
    start: int

    @property
    def payload_start(self) -> int:
        """Return the position of the chunk's first element in the file."""
        return self.start + self.frame.payload_start

    def stored_item(self) -> StoredItem:
        """Return the chunk's entry for `.metadata`."""
        return StoredItem(self.chunk.key, self.chunk.offset, self.chunk.shape, self.file, self.start, self.frame.length)


@dataclass(frozen=True)
class Job:
    """A unit of the mapping with its chunks in place."""

    unit: hf_to_megatron.Unit
    chunks: tuple[PlacedChunk, ...]


@dataclass(frozen=True)
class Plan:
    """All jobs of a conversion in the order of their source bytes, the objects, and the size of each file."""

    jobs: tuple[Job, ...]
    objects: tuple[StoredItem, ...]
    files: dict[str, int]  # name → bytes

    @property
    def num_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(self.files.values())

    def stored_items(self) -> list[StoredItem]:
        """Return the entries of `.metadata`: objects and chunks."""
        return [*self.objects, *(chunk.stored_item() for job in self.jobs for chunk in job.chunks)]


def make_plan(weights: HFWeights, tensor_parallel_size: int, expert_parallel_size: int, object_size: int) -> Plan:
    """Lay out the files: one for each rank of the layout, with its objects first, then its chunks, aligned to pages.

    object_size: bytes of one stored `_extra_state` object.
    """
    offsets: dict[int, int] = {}
    objects = []
    for key, rank in hf_to_megatron.extra_states(weights.architecture, expert_parallel_size):
        start = offsets.get(rank, 0)
        objects.append(StoredItem(key, None, None, _file_name(rank), start, object_size))
        offsets[rank] = start + object_size
    frames: dict[hf_to_megatron.Shape, Frame] = {}
    units = list(hf_to_megatron.units(weights.architecture, tensor_parallel_size, expert_parallel_size))
    units.sort(key=lambda unit: _source_place(weights, unit))
    jobs = []
    for unit in units:
        placed = []
        for chunk in unit.chunks:
            if chunk.shape not in frames:
                frames[chunk.shape] = frame(chunk.shape, weights.dtype, weights.item_size)
            start = -(-offsets.get(chunk.rank, 0) // PAGE) * PAGE
            placed.append(PlacedChunk(chunk, frames[chunk.shape], _file_name(chunk.rank), start))
            offsets[chunk.rank] = start + frames[chunk.shape].length
        jobs.append(Job(unit, tuple(placed)))
    return Plan(tuple(jobs), tuple(objects), {_file_name(rank): end for rank, end in sorted(offsets.items())})


def _file_name(rank: int) -> str:
    return f"__{rank}_0.distcp"


def _source_place(weights: HFWeights, unit: hf_to_megatron.Unit) -> tuple[str, int]:
    places: Sequence[tuple[str, int]] = [
        (weights.sources[name].file.name, weights.sources[name].start) for name in unit.sources
    ]
    return min(places)
