"""Compare a checkpoint's tensors with those of its HF model, block by block, bit by bit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from mixtral_run.weights.hf.fingerprint import read_source
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.mapping import hf_to_megatron
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader

_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Difference:
    """A tensor that differs from its source. file: the checkpoint's file of the first difference."""

    tensor: str
    key: str
    file: str
    first_element: int
    num_different: int
    num_elements: int

    def __str__(self) -> str:
        return (
            f"{self.tensor}: {self.num_different:,} of {self.num_elements:,} elements differ, the first at "
            f"{self.first_element:,} ({self.key} in {self.file})"
        )


class Comparing:
    """Compares units of the mapping in any layout: at TP1/EP1 their pieces are rows of the global tensors."""

    def __init__(self, reader: Reader, weights: HFWeights, advance: Callable[[int], None]) -> None:
        self._reader = reader
        self._weights = weights
        self._advance = advance

    def unit(self, unit: hf_to_megatron.Unit) -> tuple[dict[str, int], list[Difference]]:
        """Return the CRC-32 of the unit's HF tensors, and the tensors that differ in the checkpoint."""
        crcs = dict.fromkeys(unit.sources, 0)
        found: dict[str, Difference] = {}
        descriptors = {name: os.open(self._weights.sources[name].file, os.O_RDONLY) for name in unit.sources}
        try:
            for piece in unit.pieces:
                for block, difference in self._piece(unit.chunks[piece.chunk], piece, descriptors[piece.source]):
                    crcs[piece.source] = crc32(block, crcs[piece.source])
                    if difference is not None:
                        found[piece.source] = _joined(found.get(piece.source), difference)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        return crcs, list(found.values())

    def _piece(self, chunk: hf_to_megatron.Chunk, piece: hf_to_megatron.Piece, descriptor: int) -> Any:
        source = self._weights.sources[piece.source]
        item_size, columns = self._weights.item_size, chunk.shape[-1]
        num_rows = piece.num_elements // columns
        step = max(1, _BLOCK_BYTES // (columns * item_size))
        first_row = chunk.first_row + piece.chunk_start // columns
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            element = piece.source_start + start * columns
            block = read_source(descriptor, source, element * item_size, (stop - start) * columns * item_size)
            stored = self._reader.rows(chunk.key, chunk.leading, first_row + start, first_row + stop)
            wanted = np.frombuffer(block, stored.dtype).reshape(stored.shape)
            difference = None
            if not np.array_equal(stored, wanted):
                places = np.flatnonzero(stored != wanted)
                file = self._reader.file_of(chunk.key, chunk.leading, first_row + start + int(places[0]) // columns)
                size = source.num_bytes // item_size
                difference = Difference(piece.source, chunk.key, file, element + int(places[0]), len(places), size)
            yield block, difference
            self._advance(len(block))


def _joined(before: Difference | None, more: Difference) -> Difference:
    if before is None:
        return more
    return dataclasses.replace(before, num_different=before.num_different + more.num_different)
