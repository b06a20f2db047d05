"""The parts in which rows of an HF tensor are read: where their bytes are, and where they go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtral_run.weights.hf.safetensors_files import Source
from mixtral_run.weights.load import read_parts
from mixtral_run.weights.load.read_parts import Part, _cut
from mixtral_run.weights.mapping.row_index import Slice

PLACE = Source(Path("file"), 1000, 800)


def test_a_part_is_at_most_as_long_as_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows of 10 bf16 are 20 bytes: three of them are within 79 bytes.
    monkeypatch.setattr(read_parts, "PART_BYTES", 79)
    part = Part(Slice("a", 30, 7, 10, 0, 10, 2), PLACE, torch.bfloat16, torch.zeros(12, 10, dtype=torch.bfloat16))
    found = [(each.start, each.num_bytes, each.rows.target_row) for each in _cut(part)]
    assert found == [(1000 + 30 * 20, 60, 2), (1000 + 33 * 20, 60, 5), (1000 + 36 * 20, 20, 8)]


def test_the_bytes_of_a_run_are_those_of_its_rows_in_the_target() -> None:
    matrix = torch.arange(120, dtype=torch.bfloat16).view(12, 10)
    part = Part(Slice("a", 30, 7, 10, 0, 10, 2), PLACE, torch.bfloat16, matrix)
    assert part.is_run
    assert part.bytes_of_target.view(torch.bfloat16).tolist() == [float(value) for value in range(20, 90)]


@pytest.mark.parametrize(
    ("rows", "matrix"),
    [
        (Slice("a", 30, 7, 10, 1, 9, 2), torch.zeros(12, 9, dtype=torch.bfloat16)),
        (Slice("a", 30, 7, 10, 0, 10, 2), torch.zeros(12, 10)),
        (Slice("a", 30, 7, 10, 0, 10, 2), torch.zeros(10, 12, dtype=torch.bfloat16).T),
    ],
    ids=["some columns", "another dtype", "transposed"],
)
def test_what_is_no_run(rows: Slice, matrix: torch.Tensor) -> None:
    assert not Part(rows, PLACE, torch.bfloat16, matrix).is_run
