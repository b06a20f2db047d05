"""The way to a GPU, which is played by memory of the host: two buffers in turn, waits, and what is copied."""

from __future__ import annotations

import threading
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from mixtral_run.errors import WeightsError
from mixtral_run.weights.hf.safetensors_files import Source
from mixtral_run.weights.load import read_parts
from mixtral_run.weights.load.read_parts import Part, PartSum
from mixtral_run.weights.load.read_parts import read_parts as read
from mixtral_run.weights.mapping.row_index import Slice


class Device:
    """STAND-IN for the device of a GPU."""

    type = "cuda"


DEVICE = Device()


class Played(torch.Tensor):
    """STAND-IN for a tensor on a GPU, and for the pinned memory that is sent there. log: what is copied, and how."""

    log: list[Any]

    @property
    def device(self) -> Any:  # type: ignore[override]
        return DEVICE

    def to(self, device: Any, non_blocking: bool) -> Any:  # type: ignore[override]
        assert device is DEVICE
        Played.log.append(("to", self.numel() * self.element_size(), non_blocking))
        return self

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:  # type: ignore[override]
        Played.log.append(("copy", tuple(source.shape), non_blocking))
        return super().copy_(source)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    found, empty = MagicMock(), torch.empty
    found.Event.side_effect = lambda blocking: event(blocking)
    Played.log = []

    def event(blocking: bool) -> Any:
        number = found.Event.call_count
        assert blocking
        return SimpleNamespace(
            synchronize=lambda: Played.log.append(f"wait {number}"),
            record=lambda stream: Played.log.append(f"sent {number} {stream is found.Stream.return_value}"),
        )

    def pinned(size: int, dtype: Any, pin_memory: bool) -> torch.Tensor:
        Played.log.append(("pinned", size, dtype, pin_memory))
        return empty(size, dtype=dtype).as_subclass(Played)

    monkeypatch.setattr(torch, "cuda", found)
    monkeypatch.setattr(torch, "empty", pinned)
    return found


def part(folder: Path, rows: Slice, target: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Part:
    """Rows of a tensor of 4 columns that begins after 6 bytes; its elements are 0, 1, 2, …"""
    stored = torch.arange(400, dtype=torch.float32).to(dtype)
    (folder / "file").write_bytes(b"header" + stored.view(torch.uint8).numpy().tobytes())
    return Part(rows, Source(folder / "file", 6, stored.nbytes), dtype, target.as_subclass(Played))


def crc_of(first: int, end: int) -> int:
    values = torch.arange(400, dtype=torch.float32).bfloat16()[first:end]
    return zlib.crc32(values.view(torch.uint8).numpy().tobytes())


def test_a_run_is_sent_in_pieces_from_two_buffers_in_turn(
    tmp_path: Path, cuda: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 2 to 7 of 8 bytes each, 48 in all, in pieces of 20 bytes."""
    monkeypatch.setattr(read_parts, "UPLOAD_BYTES", 20)
    target = torch.full((8, 4), -1.0, dtype=torch.bfloat16)
    passed: list[int] = []
    given = part(tmp_path, Slice("a", 2, 6, 4, 0, 4, 1), target)
    assert read([given], workers=1, advance=passed.append) == [PartSum("a", 16, 48, crc_of(8, 32))]
    assert target.flatten().tolist() == [-1.0] * 4 + [float(each) for each in range(8, 32)] + [-1.0] * 4
    assert passed == [20, 20, 8]
    empty, again = ("pinned", 0, torch.uint8, False), ("pinned", 20, torch.uint8, True)
    assert Played.log == [
        empty, "wait 2", again, ("copy", (20,), True), "sent 2 True",
        "wait 1", again, ("copy", (20,), True), "sent 1 True",
        "wait 2", ("copy", (8,), True), "sent 2 True",
    ]  # fmt: skip
    # All later work of the thread runs on the stream, after what the model's construction wrote.
    stream = cuda.Stream.return_value
    cuda.set_device.assert_called_once_with(DEVICE)
    cuda.Stream.assert_called_once_with(DEVICE)
    cuda.set_stream.assert_called_once_with(stream)
    stream.wait_stream.assert_called_once_with(cuda.default_stream.return_value)
    cuda.default_stream.assert_called_once_with(DEVICE)
    stream.synchronize.assert_called_once_with()


@pytest.mark.parametrize(("first", "count"), [(1, 2), (1, 3), (2, 2)])
def test_columns_are_cut_and_cast_on_the_gpu(
    tmp_path: Path, cuda: MagicMock, monkeypatch: pytest.MonkeyPatch, first: int, count: int
) -> None:
    """Some columns of rows 3 to 7, three rows of 8 bytes at a time, to fp32."""
    monkeypatch.setattr(read_parts, "UPLOAD_BYTES", 24)
    target = torch.full((7, count), -1.0)
    given = part(tmp_path, Slice("a", 3, 5, 4, first, count, 2), target)
    passed: list[int] = []
    assert read([given], workers=1, advance=passed.append) == [PartSum("a", 24, 40, crc_of(12, 32))]
    columns = range(first, first + count)
    assert target.tolist() == [[-1.0] * count] * 2 + [[4.0 * row + each for each in columns] for row in range(3, 8)]
    assert passed == [24, 16]
    assert [each for each in Played.log if each[0] in ("to", "copy")] == [
        ("to", 24, True), ("copy", (3, count), False), ("to", 16, True), ("copy", (2, count), False)
    ]  # fmt: skip
    assert cuda.Stream.return_value.synchronize.call_count == 1


def test_on_the_host_blocks_are_read_into_the_target_or_a_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows in blocks of two rows, and columns of rows, of which a longer row is a block of its own."""
    for block_bytes, passed in ((16, [16, 16, 8]), (7, [8] * 5), (1000, [40])):
        monkeypatch.setattr(read_parts, "BLOCK_BYTES", block_bytes)
        for columns, first in ((4, 0), (3, 1)):
            target = torch.full((6, columns), -1.0, dtype=torch.bfloat16)
            given = part(tmp_path, Slice("a", 3, 5, 4, first, columns, 1), target)
            seen: list[int] = []
            given = Part(given.rows, given.place, given.dtype, target)
            assert read([given], workers=1, advance=seen.append) == [PartSum("a", 24, 40, crc_of(12, 32))]
            assert seen == passed
            rows = [[4.0 * row + column for column in range(first, first + columns)] for row in range(3, 8)]
            assert target.tolist() == [[-1.0] * columns, *rows]


def test_files_are_closed_in_the_end(tmp_path: Path) -> None:
    target = torch.zeros((6, 4), dtype=torch.bfloat16)
    given = part(tmp_path, Slice("a", 3, 5, 4, 0, 4, 1), target)
    read([Part(given.rows, given.place, given.dtype, target)], workers=2, advance=lambda _: None)
    opened = [each.resolve() for each in Path("/proc/self/fd").iterdir()]
    assert tmp_path / "file" not in opened


def test_pieces_are_of_these_sizes() -> None:
    assert (read_parts.PART_BYTES, read_parts.BLOCK_BYTES, read_parts.UPLOAD_BYTES) == (33554432, 2097152, 8388608)


def test_a_reader_that_is_stopped_ends_and_its_own_error_comes_first(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with read_parts._Reader(stop, lambda _: None) as reader:
        target = torch.zeros(6, 4, dtype=torch.bfloat16)
        given = part(tmp_path, Slice("a", 0, 5, 4, 0, 4, 1), target)
        given = Part(given.rows, given.place, given.dtype, target)
        with pytest.raises(read_parts._Stopped):
            reader.read(given)
        (tmp_path / "file").write_bytes(b"header and 10 bytes")
        stop.clear()
        with pytest.raises(WeightsError):
            reader.read(given)
