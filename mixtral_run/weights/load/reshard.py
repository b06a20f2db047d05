"""Fill a rank's parts of the tensors from a torch_dist checkpoint that was saved in any layout.

A part overlaps some of a tensor's chunks. If a chunk's elements are stored in its file as they are, the overlap
consists of rows of bytes, which the reader of HF directories reads in several threads (read_parts.py). A chunk that is
stored otherwise, compressed for instance, is read by torch, one such chunk at a time.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from mixtral_run.errors import WeightsError, shortened
from mixtral_run.weights.hf.safetensors_files import Source
from mixtral_run.weights.load.read_parts import Part, Target, default_workers, read_parts
from mixtral_run.weights.mapping.hf_to_megatron import Shape
from mixtral_run.weights.mapping.row_index import Slice
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from mixtral_run.weights.torch_dist.item_reader import NotPlainError
from mixtral_run.weights.torch_dist.metadata import StoredItem


@dataclass(frozen=True)
class Overlap:
    """The overlap of a part and a chunk: a block of the global tensor."""

    item: StoredItem
    target: Target
    offset: Shape
    shape: Shape

    @property
    def in_chunk(self) -> Shape:
        """Return the block's first index in the chunk."""
        assert self.item.offset is not None
        return tuple(at - first for at, first in zip(self.offset, self.item.offset, strict=True))

    @property
    def in_target(self) -> Shape:
        """Return the block's first index in the part."""
        return tuple(at - first for at, first in zip(self.offset, self.target.offset, strict=True))

    def into(self) -> Tensor:
        """Return the part's elements that the block fills, as a view of the block's shape."""
        view = self.target.data.view(self.target.shape)
        for axis, (start, length) in enumerate(zip(self.in_target, self.shape, strict=True)):
            view = view.narrow(axis, start, length)
        return view

    def parts(self, path: Path, payload: int, dtype: torch.dtype) -> Iterator[Part]:
        """Yield the block as rows of the chunk's matrices. payload: file position of the chunk's first element."""
        assert self.item.shape is not None
        *leading, height, columns = (1, *self.item.shape)
        *firsts, row, column = (0, *self.in_chunk)
        *counts, num_rows, num_columns = (1, *self.shape)
        matrix_bytes = height * columns * dtype.itemsize
        matrices = self.into().unsqueeze(0)
        for index in product(*map(range, counts)):
            number = 0
            for at, first, length in zip(index, firsts, leading, strict=True):
                number = number * length + at + first
            place = Source(path, payload + number * matrix_bytes, matrix_bytes)
            yield Part(
                Slice(self.item.key, row, num_rows, columns, column, num_columns, 0), place, dtype, matrices[index]
            )


def fill(
    checkpoint: Reader,
    targets: Iterable[Target],
    *,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Copy from the checkpoint into the targets, in their dtype and on their device.

    advance: called with bytes read, from several threads. A target may reach beyond the stored tensor, as padding of
    the vocabulary does: nothing is read there. Raises one WeightsError for all tensors that are missing or not covered
    by their chunks, and a WeightsError if a file cannot be read to its end or would run something.
    """
    overlaps = _overlaps(checkpoint, targets)
    items = list(dict.fromkeys(each.item for each in overlaps))
    with ThreadPoolExecutor(workers or default_workers(), "locate") as pool:
        starts = dict(zip(items, pool.map(lambda item: _located(checkpoint, item), items), strict=True))
    parts: list[Part] = []
    others: list[Overlap] = []
    for each in overlaps:
        start = starts[each.item]
        if start is None:
            others.append(each)
        else:
            dtype = getattr(torch, checkpoint.tensors[each.item.key].dtype)
            parts += each.parts(checkpoint.folder / each.item.file, start, dtype)
    read_parts(parts, workers=workers, advance=advance)
    if others:
        _read_by_torch(checkpoint, others)


def _located(checkpoint: Reader, item: StoredItem) -> int | None:
    try:
        return checkpoint.payload_start(item)
    except NotPlainError:
        return None
    except OSError as error:
        raise checkpoint.broken(item, error.strerror or str(error)) from error


def _overlaps(checkpoint: Reader, targets: Iterable[Target]) -> list[Overlap]:
    found: list[Overlap] = []
    problems: list[str] = []
    chunks: dict[str, dict[int, list[StoredItem]]] = {}
    for target in targets:
        info = checkpoint.tensors.get(target.key)
        if info is None:
            problems.append(f"{target.key}: missing")
            continue
        if len(info.shape) != len(target.shape):
            problems.append(f"{target.key}: expected {len(target.shape)} axes; found shape {list(info.shape)}")
            continue
        if target.key not in chunks:
            chunks[target.key] = _by_layer(checkpoint.chunks(target.key))
        near = chunks[target.key].get(_layer(target.offset), [])
        mine = [overlap for item in near if (overlap := _overlap(item, target)) is not None]
        within = [min(o + s, end) - o for o, s, end in zip(target.offset, target.shape, info.shape, strict=True)]
        covered = sum(prod(each.shape) for each in mine)
        if covered != prod(max(0, each) for each in within):
            problems.append(
                f"{target.key} at {list(target.offset)}: chunks hold {covered:,} of {prod(within):,} elements"
            )
        found += mine
    if problems:
        raise WeightsError(
            "The checkpoint cannot be loaded into this model.",
            where=str(checkpoint.folder),
            problems=shortened(list(dict.fromkeys(problems))),
            next_command=f"mixtral-run verify --load {shlex.quote(str(checkpoint.folder.parent))}",
        )
    return found


def _layer(offset: Shape) -> int:
    """Return the layer of a part, the first axis of all tensors with three axes or more; 0 for others."""
    return offset[0] if len(offset) > 2 else 0


def _by_layer(items: Iterable[StoredItem]) -> dict[int, list[StoredItem]]:
    """Group chunks by layer, so that a part is not compared with every chunk of the model."""
    found: dict[int, list[StoredItem]] = {}
    for item in items:
        assert item.offset is not None and item.shape is not None
        first = _layer(item.offset)
        for layer in range(first, first + (item.shape[0] if len(item.shape) > 2 else 1)):
            found.setdefault(layer, []).append(item)
    return found


def _overlap(item: StoredItem, target: Target) -> Overlap | None:
    assert item.offset is not None and item.shape is not None
    starts, lengths = [], []
    for a, a_length, b, b_length in zip(item.offset, item.shape, target.offset, target.shape, strict=True):
        start = max(a, b)
        length = min(a + a_length, b + b_length) - start
        if length <= 0:
            return None
        starts.append(start)
        lengths.append(length)
    return Overlap(item, target, tuple(starts), tuple(lengths))


def _read_by_torch(checkpoint: Reader, overlaps: Iterable[Overlap]) -> None:
    """Read overlaps by torch.distributed.checkpoint; one chunk at a time is in memory in addition to its target."""
    reader = FileSystemReader(checkpoint.folder)
    reader.set_up_storage_reader(checkpoint.metadata, True)
    for each in overlaps:
        place = MetadataIndex(each.item.key, each.item.offset)
        asked = ReadItem(
            LoadItemType.TENSOR,
            place,
            torch.Size(each.in_target),
            place,
            torch.Size(each.in_chunk),
            torch.Size(each.shape),
        )
        try:
            reader.read_data(LoadPlan([asked]), _Into(each.into())).wait()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a damaged zip or pickle raises anything, AssertionError among it
            raise checkpoint.refused(each.item, error) from None


class _Into(LoadPlanner):
    """Planner that gives torch's reader the target of a single block."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, _: ReadItem) -> Tensor:
        return self._target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the reader has copied into the target."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"only tensors are asked for; found {read_item}, {value}")

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Do nothing, here and in the three methods that follow: the plan is complete."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan
