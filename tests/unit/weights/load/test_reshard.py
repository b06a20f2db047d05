"""Parts of a tensor that was cut in another way: numbers written out; chunks that leave something out are refused."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_run.errors import WeightsError
from mixtral_run.weights.load import reshard
from mixtral_run.weights.load.read_parts import Target
from mixtral_run.weights.load.reshard import fill
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader, TensorInfo
from mixtral_run.weights.torch_dist.metadata import StoredItem
from tests.support.stored_checkpoint import store

KEY = "decoder.layers.mlp.router.weight"
VOCABULARY = "embedding.word_embeddings.weight"

Chunks = list[tuple[tuple[int, ...], tuple[int, ...]]]


def checkpoint(folder: Path, key: str, shape: tuple[int, ...], chunks: Chunks) -> Any:
    """STAND-IN for a Reader: chunks lie one after another in a file; an element is its index in the global tensor."""
    items = []
    for number, (offset, size) in enumerate(chunks):
        values = [0]
        for first, length, whole in zip(offset, size, shape, strict=True):
            values = [value * whole + first + at for value in values for at in range(length)]
        (folder / f"{number}.distcp").write_bytes(b"head" + struct.pack(f"<{len(values)}f", *values))
        items.append(StoredItem(key, offset, size, f"{number}.distcp", 0, 4 + 4 * len(values)))
    return SimpleNamespace(
        folder=folder,
        tensors={key: TensorInfo(shape, "float32", 4)},
        chunks=lambda _: items,
        payload_start=lambda _: 4,
    )


def part(key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Target:
    return Target(key, offset, shape, torch.full(shape, -1.0))


def test_a_part_across_chunks_gets_its_own_elements(tmp_path: Path) -> None:
    """Layer 1 of 2, each 4 × 3 and cut after its second row; the part takes rows 1 and 2, columns 1 and 2."""
    chunks: Chunks = [((layer, row, 0), (1, 2, 3)) for layer in (0, 1) for row in (0, 2)]
    target = part(KEY, (1, 1, 1), (1, 2, 2))
    fill(checkpoint(tmp_path, KEY, (2, 4, 3), chunks), [target], workers=1)
    # Element (1, r, c) of the global tensor is 12 + 3 · r + c.
    assert target.data.tolist() == [[[16.0, 17.0], [19.0, 20.0]]]


def test_a_vector_in_two_chunks_has_no_layers(tmp_path: Path) -> None:
    chunks: Chunks = [((0,), (3,)), ((3,), (4,))]
    target = part("decoder.final_layernorm.weight", (1,), (5,))
    fill(checkpoint(tmp_path, target.key, (7,), chunks), [target], workers=1)
    assert target.data.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_chunks_of_experts_in_several_layers(tmp_path: Path) -> None:
    """Layers 0 and 1 in one chunk, layer 2 in another, each cut after expert 2: the part has experts 1 to 4."""
    chunks: Chunks = [
        ((first, expert, 0, 0), (layers, 3, 2, 2)) for first, layers in ((0, 2), (2, 1)) for expert in (0, 3)
    ]
    for layer in (1, 2):
        target = part("decoder.layers.mlp.experts.experts.linear_fc1.weight", (layer, 1, 1, 0), (1, 4, 1, 2))
        fill(checkpoint(tmp_path, target.key, (3, 6, 2, 2), chunks), [target], workers=1)
        # Element (l, e, r, c) is 24 · l + 4 · e + 2 · r + c.
        expected = [24.0 * layer + 4 * expert + 2 + column for expert in range(1, 5) for column in (0, 1)]
        assert target.data.flatten().tolist() == expected


def test_chunks_of_several_layers_and_cut_columns_are_read(tmp_path: Path) -> None:
    chunks: Chunks = [((0, 0, 0), (2, 4, 1)), ((0, 0, 1), (2, 4, 2))]
    target = part(KEY, (1, 3, 0), (1, 1, 3))
    fill(checkpoint(tmp_path, KEY, (2, 4, 3), chunks), [target], workers=1)
    assert target.data.tolist() == [[[21.0, 22.0, 23.0]]]


@pytest.mark.parametrize(
    ("chunks", "found"),
    [
        ([((0, 0, 0), (1, 1, 3)), ((0, 2, 0), (1, 2, 3))], "chunks hold 9 of 12 elements"),  # row 1 is in none
        ([((0, 0, 0), (1, 4, 1)), ((0, 0, 2), (1, 4, 1))], "chunks hold 8 of 12 elements"),  # column 1
        ([((0, 0, 0), (1, 3, 3))], "chunks hold 9 of 12 elements"),  # the last row
        ([((0, 1, 0), (1, 3, 3))], "chunks hold 9 of 12 elements"),  # the first row
        ([((1, 0, 0), (1, 4, 3))], "chunks hold 0 of 12 elements"),  # only another layer
    ],
)
def test_a_gap_between_chunks_is_refused_before_anything_is_read(tmp_path: Path, chunks: Chunks, found: str) -> None:
    target = part(KEY, (0, 0, 0), (1, 4, 3))
    with pytest.raises(WeightsError) as refused:
        fill(checkpoint(tmp_path, KEY, (2, 4, 3), chunks), [target], workers=1)
    assert list(refused.value.problems) == [f"{KEY} at [0, 0, 0]: {found}"]
    assert target.data.eq(-1.0).all()


def test_a_gap_outside_of_the_part_is_none_of_its_business(tmp_path: Path) -> None:
    target = part(KEY, (0, 2, 0), (1, 2, 3))
    fill(checkpoint(tmp_path, KEY, (1, 4, 3), [((0, 2, 0), (1, 2, 3))]), [target], workers=1)
    assert target.data.flatten().tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]


def test_padding_of_the_vocabulary_is_the_only_thing_that_may_be_missing(tmp_path: Path) -> None:
    """A part of rows 2 … 5 of a tensor that has rows 0 … 3."""
    target = part(VOCABULARY, (2, 0), (4, 2))
    fill(checkpoint(tmp_path, VOCABULARY, (4, 2), [((0, 0), (4, 2))]), [target], workers=1)
    assert target.data.tolist() == [[4.0, 5.0], [6.0, 7.0], [-1.0, -1.0], [-1.0, -1.0]]
    with pytest.raises(WeightsError, match="chunks hold 2 of 4 elements"):
        fill(checkpoint(tmp_path, VOCABULARY, (4, 2), [((0, 0), (3, 2))]), [target], workers=1)


def test_missing_tensors_and_other_axes_are_reported_together(tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, KEY, (1, 4, 3), [((0, 0, 0), (1, 4, 3))])
    with pytest.raises(WeightsError) as refused:
        fill(reader, [part(KEY, (0, 0), (4, 3)), part("nothing", (0,), (1,))], workers=1)
    assert list(refused.value.problems) == [f"{KEY}: expected 2 axes; found shape [1, 4, 3]", "nothing: missing"]


def test_what_only_torch_can_read_is_read_by_torch(tmp_path: Path) -> None:
    whole = torch.arange(30.0).view(6, 5)
    store(tmp_path, {"m": whole}, {"m": [((0, 0), (4, 5)), ((4, 0), (2, 5))]}, transposed=True)
    target = part("m", (3, 1), (2, 3))
    with Reader(tmp_path) as reader:
        fill(reader, [target], workers=1)
    assert target.data.tolist() == [[16.0, 17.0, 18.0], [21.0, 22.0, 23.0]]


def test_memory_that_is_short_is_no_damage_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB.")

    store(tmp_path, {"m": torch.zeros(6, 5)}, {"m": [((0, 0), (6, 5))]}, transposed=True)
    monkeypatch.setattr(reshard.FileSystemReader, "read_data", refused)
    with Reader(tmp_path) as reader, pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        fill(reader, [part("m", (0, 0), (2, 3))], workers=1)


def test_chunks_that_hold_a_part_twice_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    twice: Chunks = [((0, 0, 0), (1, 3, 3)), ((0, 2, 0), (1, 2, 3))]
    with pytest.raises(WeightsError, match="chunks hold 15 of 12 elements"):
        fill(checkpoint(tmp_path, KEY, (1, 4, 3), twice), [part(KEY, (0, 0, 0), (1, 4, 3))], workers=1)

    def unreadable(_: Any) -> int:
        raise OSError(5, "Input/output error")

    reader = checkpoint(tmp_path, KEY, (1, 4, 3), [((0, 0, 0), (1, 4, 3))])
    reader.payload_start, reader.broken = (
        unreadable,
        lambda item, found: WeightsError("broken", where=item.file, found=found),
    )
    with pytest.raises(WeightsError, match="broken") as caught:
        fill(reader, [part(KEY, (0, 0, 0), (1, 4, 3))], workers=1)
    assert (caught.value.where, caught.value.found) == ("0.distcp", "Input/output error")


def test_rows_in_no_chunk_are_refused(tmp_path: Path) -> None:
    """The reader of `verify` and `export` finds the same gap."""
    stored = checkpoint(tmp_path, KEY, (1, 4, 3), [((0, 0, 0), (1, 1, 3)), ((0, 2, 0), (1, 2, 3))])
    reader = Reader.__new__(Reader)
    reader.folder, reader.tensors, reader._chunks = tmp_path, stored.tensors, {KEY: stored.chunks(KEY)}
    reader._payloads, reader._descriptors = dict.fromkeys(stored.chunks(KEY), 4), {}
    reader._lock = threading.Lock()
    with reader:
        # Elements are bits: 6.0 is the first of row 2.
        assert reader.rows(KEY, (0,), 2, 4).view("f4").tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]
        with pytest.raises(WeightsError, match="do not cover"):
            reader.rows(KEY, (0,), 0, 4)
