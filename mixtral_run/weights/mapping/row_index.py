"""Find the rows of HF tensors that make up one rank's part of a Megatron tensor, in any layout. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.mapping.hf_to_megatron import VECTOR_KEYS, VOCABULARY_KEYS, Shape, row_ranges


@dataclass(frozen=True)
class Slice:
    """Rows of an HF tensor and the columns of them that are needed. target_row: their first row in the rank's part.

    A vector is one row. `columns` is the HF tensor's width.
    """

    source: str
    first_row: int
    num_rows: int
    columns: int
    first_column: int
    num_columns: int
    target_row: int

    @property
    def is_whole_rows(self) -> bool:
        return self.num_columns == self.columns

    def parts(self, most_rows: int) -> Iterator[Slice]:
        """Yield the same rows, cut into runs of at most `most_rows`."""
        for start in range(0, self.num_rows, max(most_rows, 1)):
            yield Slice(
                self.source,
                self.first_row + start,
                min(max(most_rows, 1), self.num_rows - start),
                self.columns,
                self.first_column,
                self.num_columns,
                self.target_row + start,
            )


@dataclass(frozen=True)
class _Run:
    """Rows start…stop of a Megatron matrix are the rows of `source` from `source_row` on."""

    start: int
    stop: int
    source: str
    source_row: int
    columns: int


class SliceIndex:
    """The map from Megatron's rows back to HF's, for one architecture."""

    def __init__(self, architecture: MixtralArchitecture) -> None:
        self._runs: dict[tuple[str, Shape], list[_Run]] = {}
        for source, ranges in row_ranges(architecture).items():
            row = 0
            for start, stop in ranges.rows:
                run = _Run(start, stop, source, row, ranges.columns)
                self._runs.setdefault((ranges.key, ranges.leading), []).append(run)
                row += stop - start

    def slices(self, key: str, offset: Shape, shape: Shape) -> list[Slice]:
        """Return the slices that fill the block at `offset` of the global tensor `key`.

        offset, shape: one number for each axis of the global tensor; the shape is 1 along layers and experts. Rows
        beyond the vocabulary are padding, which no slice fills. Raises KeyError for a tensor that no HF tensor makes
        up.
        """
        axes = 1 if key in VECTOR_KEYS else 2
        leading = offset[: len(offset) - axes]
        first, count = (0, 1) if axes == 1 else (offset[-2], shape[-2])
        found = []
        for run in self._runs[key, leading]:
            start, stop = max(run.start, first), min(run.stop, first + count)
            if start < stop:
                source_row = run.source_row + start - run.start
                target = start - first
                found.append(Slice(run.source, source_row, stop - start, run.columns, offset[-1], shape[-1], target))
        last = self._runs[key, leading][-1].stop
        expected = max(0, min(first + count, last) - first)
        assert expected == count or key in VOCABULARY_KEYS, f"{key} {offset} {shape}: beyond the tensor"
        assert sum(each.num_rows for each in found) == expected, f"{key} {offset} {shape}: HF's rows do not cover it"
        return found


@lru_cache(maxsize=2)
def slice_index(architecture: MixtralArchitecture) -> SliceIndex:
    """Return the index of an architecture; it is cached, because a model may be loaded layer by layer."""
    return SliceIndex(architecture)
