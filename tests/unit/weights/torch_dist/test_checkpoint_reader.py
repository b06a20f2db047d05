"""Rows of tensors that torch wrote in uneven chunks: what slices of the whole tensor have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtral_run.errors import WeightsError
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from tests.support.stored_checkpoint import Box, store

# Layers 1 + 1; experts 1 + 2; rows 2 + 3; columns 3 + 1.
EXPERTS = torch.arange(2 * 3 * 5 * 4, dtype=torch.int32).reshape(2, 3, 5, 4)
UNEVEN: list[Box] = [
    ((layer, expert, row, column), (1, num_experts, num_rows, num_columns))
    for layer in (0, 1)
    for expert, num_experts in ((0, 1), (1, 2))
    for row, num_rows in ((0, 2), (2, 3))
    for column, num_columns in ((0, 3), (3, 1))
]
# Bits: 100 to 113.
NORMS = torch.arange(100, 114, dtype=torch.int16).reshape(2, 7).view(torch.float16)
MATRIX = torch.arange(200, 206, dtype=torch.uint8).reshape(3, 2)
VECTOR = torch.arange(5, dtype=torch.int64)
TENSORS = {"experts": EXPERTS, "norms": NORMS, "matrix": MATRIX, "vector": VECTOR}
CHUNKS: dict[str, list[Box]] = {
    "experts": UNEVEN,
    "norms": [((0, 0), (2, 4)), ((0, 4), (2, 3))],
    "matrix": [((2, 0), (1, 2)), ((0, 0), (2, 2))],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    store(folder, TENSORS, CHUNKS)
    return folder


def test_any_rows_of_any_expert(folder: Path) -> None:
    with Reader(folder) as reader:
        for layer in range(2):
            for expert in range(3):
                assert reader.matrix("experts", (layer, expert)).tolist() == EXPERTS[layer, expert].tolist()
                for start in range(5):
                    for stop in range(start, 6):
                        found = reader.rows("experts", (layer, expert), start, stop)
                        assert found.tolist() == EXPERTS[layer, expert, start:stop].tolist()


def test_chunks_of_several_layers_and_experts(tmp_path: Path) -> None:
    store(tmp_path, {"experts": EXPERTS}, {"experts": [((0, 0, 0, 0), (2, 2, 5, 4)), ((0, 2, 0, 0), (2, 1, 5, 4))]})
    with Reader(tmp_path) as reader:
        for layer in range(2):
            for expert in range(3):
                assert reader.rows("experts", (layer, expert), 1, 4).tolist() == EXPERTS[layer, expert, 1:4].tolist()


def test_vectors_are_one_row_and_matrices_may_have_no_layer(folder: Path) -> None:
    with Reader(folder) as reader:
        assert reader.matrix("norms", (1,)).tolist() == [[107, 108, 109, 110, 111, 112, 113]]
        assert reader.matrix("vector").tolist() == [[0, 1, 2, 3, 4]]
        assert reader.matrix("matrix").tolist() == [[200, 201], [202, 203], [204, 205]]
        assert reader.rows("matrix", (), 1, 3).tolist() == [[202, 203], [204, 205]]
        kinds = {key: str(reader.matrix(key, (0,) * (len(each.shape) - 2)).dtype) for key, each in TENSORS.items()}
    assert kinds == {"experts": "uint32", "norms": "uint16", "matrix": "uint8", "vector": "uint64"}


def test_what_there_is(folder: Path) -> None:
    with Reader(folder) as reader:
        assert {key: (each.shape, each.dtype, each.item_size) for key, each in reader.tensors.items()} == {
            "experts": ((2, 3, 5, 4), "int32", 4),
            "norms": ((2, 7), "float16", 2),
            "matrix": ((3, 2), "uint8", 1),
            "vector": ((5,), "int64", 8),
        }
        assert reader.tensors["experts"].num_bytes == 480
        assert reader.num_bytes == 480 + 28 + 6 + 40
        assert reader.num_chunks == 16 + 2 + 2 + 1
        assert reader.files == {"a.distcp", "b.distcp"}
        assert [reader.layout_of("experts", axis) for axis in range(4)] == [2, 2, 2, 2]
        assert [reader.layout_of("norms", axis) for axis in range(2)] == [1, 2]
        # By their offsets, not as they were written.
        assert [(each.offset, each.shape) for each in reader.chunks("matrix")] == [((0, 0), (2, 2)), ((2, 0), (1, 2))]
        assert reader.file_of("matrix", (), 2) == "a.distcp"
        assert reader.file_of("matrix", (), 1) == reader.file_of("matrix", (), 0) == "b.distcp"
        assert reader.file_of("matrix", (), 3) == "?"


def test_only_what_is_wanted_and_under_another_name(folder: Path) -> None:
    with Reader(folder, lambda key: key == "matrix") as reader:
        assert set(reader.tensors) == {"matrix"}
        assert reader.num_chunks == 2
        reader.rename("matrix", "other")
        assert set(reader.tensors) == {"other"}
        assert reader.matrix("other").tolist() == MATRIX.tolist()
        assert {each.key for each in reader.chunks("other")} == {"other"}


@pytest.mark.parametrize("block_bytes", [1, 7, 32, 1000])
def test_the_bytes_of_a_chunk_in_blocks(folder: Path, block_bytes: int) -> None:
    with Reader(folder) as reader:
        (item,) = reader.chunks("vector")
        blocks = list(reader.payload(item, block_bytes))
    assert b"".join(blocks) == VECTOR.numpy().tobytes()
    assert [len(each) for each in blocks] == [block_bytes] * (40 // block_bytes) + [40 % block_bytes] * (
        40 % block_bytes > 0
    )


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_all_files_are_closed(folder: Path) -> None:
    before = num_open()
    with Reader(folder) as reader:
        reader.matrix("experts", (0, 0))
        assert num_open() == before + 2
    assert num_open() == before


def test_a_file_that_ends_early_is_told_with_its_sizes(tmp_path: Path) -> None:
    store(tmp_path, {"vector": VECTOR})
    size = (tmp_path / "a.distcp").stat().st_size
    with (tmp_path / "a.distcp").open("r+b") as stream:
        stream.truncate(size - 1)
    with pytest.raises(WeightsError) as caught:
        Reader(tmp_path)
    assert caught.value.problems == (f"a.distcp: truncated: expected {size:,} bytes; found {size - 1:,}",)
    (tmp_path / "a.distcp").unlink()
    with pytest.raises(WeightsError) as caught:
        Reader(tmp_path)
    assert caught.value.problems == (f"a.distcp: missing ({size:,} bytes)",)


def test_a_file_that_ends_while_it_is_read(tmp_path: Path) -> None:
    store(tmp_path, {"vector": VECTOR})
    with Reader(tmp_path) as reader:
        (item,) = reader.chunks("vector")
        start = reader.payload_start(item)
        with (tmp_path / "a.distcp").open("r+b") as stream:
            stream.truncate(start + 39)
        for read in (lambda: reader.matrix("vector"), lambda: list(reader.payload(item, 16))):
            with pytest.raises(WeightsError, match="the file ends within the tensor") as caught:
                read()
            assert caught.value.where == f"{tmp_path / 'a.distcp'}, bytes 0 to {item.length:,}"
            assert caught.value.expected == "vector (5,), contiguous, as torch.save writes it"
