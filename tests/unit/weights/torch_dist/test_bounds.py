"""Bounds of what a `.metadata` file may hold, at each bound and one step beyond it, and chunks against a count."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from itertools import product
from pathlib import Path

import pytest
import torch

from mixtral_run.weights.torch_dist import chunk_grid, restricted_pickle
from mixtral_run.weights.torch_dist.chunk_grid import are_disjoint_within, whole_numbers
from mixtral_run.weights.torch_dist.restricted_pickle import (
    ByteOrderError,
    DisallowedGlobalError,
    UnpicklingError,
    in_own_words,
    load_metadata,
)


def test_chunks_are_disjoint_if_no_element_is_in_two() -> None:
    draw = random.Random(5)
    outcomes = []
    for number in range(400):
        shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 3)))
        boxes = []
        for _ in range(draw.randint(0, 4)):
            size = tuple(draw.randint(number % 5 > 0, min(2, each)) for each in shape)
            most = [each - length + (number % 10 == 0) for each, length in zip(shape, size, strict=True)]
            boxes.append((tuple(draw.randint(0, each) for each in most), size))
        elements = [
            at
            for offset, size in boxes
            for at in product(*(range(first, first + length) for first, length in zip(offset, size, strict=True)))
        ]
        inside = all(
            first + length <= end
            for offset, size in boxes
            for first, length, end in zip(offset, size, shape, strict=True)
        )
        expected = inside and len(elements) == len(set(elements))
        assert are_disjoint_within(shape, boxes) is expected, (shape, boxes)
        outcomes.append(expected)
    assert 100 < sum(outcomes) < 320
    assert are_disjoint_within((), [((), ())]) and not are_disjoint_within((), [((), ())] * 2)
    for offset, size in (((0,), (1, 1)), ((0, 0), (1,)), ((0, 0, 0), (1, 1, 1))):
        assert not are_disjoint_within((2, 2), [(offset, size)])


def test_comparisons_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are compared with those that they may lie next to, along the axis with the most cuts."""
    boxes = [((0, row), (1, 1)) for row in range(5)]
    assert chunk_grid._MOST_COMPARISONS == 20_000_000
    # Cut along the second axis none lies next to another.
    monkeypatch.setattr(chunk_grid, "_MOST_COMPARISONS", 0)
    assert are_disjoint_within((1, 5), boxes)
    # Four that reach over half of two axes: in the order of the first each is compared with those that still reach it.
    crossing = [((0, 0), (2, 1)), ((0, 1), (2, 1)), ((1, 2), (2, 1)), ((1, 3), (2, 1))]
    monkeypatch.setattr(chunk_grid, "_MOST_COMPARISONS", 0)
    assert are_disjoint_within((4, 4), crossing)
    same = [((row, 0), (3 - row, 1)) for row in range(3)]
    for most, refused in ((0, True), (1, False)):
        monkeypatch.setattr(chunk_grid, "_MOST_COMPARISONS", most)
        if refused:
            with pytest.raises(ValueError, match="too many chunks"):
                are_disjoint_within((3, 1), same)
        else:
            assert not are_disjoint_within((3, 1), same)


def test_whole_numbers_are_those_from_0_to_below_2_to_the_62() -> None:
    good = (0, 1, 4611686018427387903)
    assert whole_numbers(good) == good and whole_numbers(()) == ()
    for bad in ((-1,), (4611686018427387904,), (1, True), (1.0,), [1], None):
        with pytest.raises(ValueError, match="not a whole number"):
            whole_numbers(bad)


def load(code: bytes) -> object:
    return load_metadata(io.BytesIO(b"\x80\x02" + code + b"."))


def test_tuples_are_at_most_eight_deep() -> None:
    """Of one, two, three and more members; depth counts the deepest member."""
    for make in (b"\x85", b"N\x86", b"NN\x87"):
        assert isinstance(load(b"N" + make * 8), tuple)
        with pytest.raises(UnpicklingError, match="more than 8 deep"):
            load(b"N" + make * 9)
    one = b"N" + b"\x85" * 7
    assert load(b"(" + b"N" + one + b"NNt") == (None, (((((((None,),),),),),),), None, None)
    with pytest.raises(UnpicklingError, match="deep"):
        load(b"(N" + one + b"\x85" + b"Nt")
    assert load(b"N\x85N\x86") == ((None,), None)
    assert load(b")") == ()


def test_sizes_of_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert restricted_pickle._MOST_BYTES == 67_108_864
    code = b"\x80\x02N."
    for most, refused in ((len(code), False), (len(code) - 1, True)):
        monkeypatch.setattr(restricted_pickle, "_MOST_BYTES", most)
        if refused:
            with pytest.raises(UnpicklingError, match=f"larger than {most} bytes"):
                load_metadata(io.BytesIO(code))
        else:
            assert load_metadata(io.BytesIO(code)) is None


@pytest.mark.parametrize(
    ("entries", "refused"),
    [
        ([("a/byteorder", b"little", zipfile.ZIP_STORED)], False),
        ([("a/data.pkl", b"big", zipfile.ZIP_STORED)], False),
        ([("a/byteorder", b"big", zipfile.ZIP_STORED)], True),
        ([("a/byteorder", b"little", zipfile.ZIP_DEFLATED)], True),
        ([("a/byteorder", b"little" * 9, zipfile.ZIP_STORED)], True),
        ([("a/x", b"", zipfile.ZIP_STORED), ("a/byteorder", b"big", zipfile.ZIP_STORED)], True),
    ],
)
def test_elements_in_another_byte_order(entries: list[tuple[str, bytes, int]], refused: bool) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content, method in entries:
            archive.writestr(name, content, method)
    stream.seek(0)
    if refused:
        with pytest.raises(ByteOrderError, match="not little-endian"):
            restricted_pickle._check_byte_order(stream)
    else:
        restricted_pickle._check_byte_order(stream)
        assert stream.tell() == 0
    other = io.BytesIO(b"no zip")
    restricted_pickle._check_byte_order(other)
    assert other.tell() == 0


def test_errors_of_torch_are_told_without_its_advice() -> None:
    other, own = ValueError("x"), DisallowedGlobalError("a.b")
    assert in_own_words(other) is other and in_own_words(own) is own
    found = in_own_words(pickle.UnpicklingError("Unsupported: GLOBAL os.system was not an allowed; weights_only=False"))
    assert isinstance(found, DisallowedGlobalError) and found.name == "os.system"
    plain = in_own_words(pickle.UnpicklingError("use weights_only=False"))
    assert type(plain) is pickle.UnpicklingError
    assert str(plain) == "its pickle holds more than a tensor, or is damaged"
    assert DisallowedGlobalError("a\x1bb").name == "'a\\x1bb'" and DisallowedGlobalError("x" * 300).name == "x" * 200


class Runs:
    """An object whose pickle makes a folder when it is loaded without restrictions."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_that_a_tensors_file_asks_for_is_run(tmp_path: Path, device: str) -> None:
    trap = tmp_path / "trap"
    torch.save({"tensor": torch.zeros(2), "runs": Runs(str(trap))}, tmp_path / "item")
    with (tmp_path / "item").open("rb") as stream, pytest.raises(DisallowedGlobalError) as caught:
        restricted_pickle.load_tensor(stream, device)
    assert caught.value.name == "posix.mkdir" and not trap.exists()
    with pytest.raises(DisallowedGlobalError):
        restricted_pickle.load_without_elements(tmp_path / "item")
    assert not trap.exists()
    # What the trap does where nothing holds it back: the test above can fail.
    pickle.loads(pickle.dumps(Runs(str(trap))))
    assert trap.is_dir()
