"""HF tensors as a torch_dist checkpoint holds them: their rows in order, and the fingerprint of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from isal.isal_zlib import crc32

from mixtral_run.weights.mapping.hf_to_megatron import RowRanges, row_ranges

if TYPE_CHECKING:
    from mixtral_run.model.architecture import MixtralArchitecture
    from mixtral_run.weights.torch_dist.checkpoint_reader import Bits, Reader

_BLOCK_BYTES = 8 * 2**20


def row_pieces(ranges: RowRanges, item_size: int) -> Iterator[tuple[int, int]]:
    """Yield the rows of a Megatron tensor that make up an HF tensor, in order, in pieces of some MiB."""
    step = max(1, _BLOCK_BYTES // (ranges.columns * item_size))
    for start, stop in ranges.rows:
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


def stored_checksums(reader: Reader, architecture: MixtralArchitecture, names: Iterable[str]) -> dict[str, int]:
    """Return the CRC-32 of HF tensors by name, computed from what a checkpoint holds of them."""
    all_ranges, found = row_ranges(architecture), {}
    for name in names:
        ranges, crc = all_ranges[name], 0
        for first, last in row_pieces(ranges, reader.tensors[ranges.key].item_size):
            rows: Bits = reader.rows(ranges.key, ranges.leading, first, last)
            crc = crc32(rows.data.cast("B"), crc)
        found[name] = crc
    return found
