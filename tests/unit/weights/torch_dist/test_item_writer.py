"""Items that are framed without torch.save: torch and zip read them, and their bytes begin at a page."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from mixtral_run.weights.hf.pytorch_bin import read_bin_files
from mixtral_run.weights.torch_dist.item_reader import FileSlice, NotPlainError, payload_start
from mixtral_run.weights.torch_dist.item_writer import frame


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 2, 3, 4)])
def test_torch_reads_a_framed_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    data = values.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    raw = data.numpy().tobytes()
    framed = frame(shape, str(dtype).removeprefix("torch."), dtype.itemsize)
    crc = zlib.crc32(raw)
    item = framed.head(crc) + raw + framed.tail(crc)
    assert (framed.payload_start, framed.num_bytes, framed.length) == (4096, len(raw), len(item))
    assert len(framed.head(0)) == 4096
    found = torch.load(io.BytesIO(item), weights_only=True)
    assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, values)
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        # Compares the CRC-32 of every entry.
        assert archive.testzip() is None
        assert archive.namelist() == [f"archive/{name}" for name in ("data.pkl", "byteorder", "version", "data/0")]
        assert archive.read("archive/byteorder") == b"little" and archive.read("archive/version") == b"3\n"
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}
        begin = archive.infolist()[-1].header_offset
    # The field of the last header that fills the page says how long it is itself, without its own four bytes.
    name_length, extra_length = struct.unpack("<HH", item[begin + 26 : begin + 30])
    extra = item[begin + 30 + name_length : 4096]
    assert extra[:2] == b"FB" and len(extra) == extra_length
    assert int.from_bytes(extra[2:4], "little") == len(extra[4:]) == extra.count(b"Z")


def test_the_largest_item() -> None:
    assert frame((2**30 - 1,), "float32", 4).num_bytes == 2**32 - 4
    assert frame((2**32 - 2,), "float16", 1).num_bytes == 2**32 - 2
    with pytest.raises(ValueError, match="4,294,967,295 bytes; the largest that can be framed has 4,294,967,294"):
        frame((2**32 - 1,), "float16", 1)


def test_the_own_items_are_recognized_whatever_their_checksum(tmp_path: Path) -> None:
    framed = frame((2, 3), "float32", 4)
    item = framed.head(7) + bytes(24) + framed.tail(7)
    path = tmp_path / "item"

    def start(content: bytes, shape: tuple[int, ...] = (2, 3), dtype: str = "float32", before: int = 0) -> int:
        path.write_bytes(bytes(before) + content)
        with path.open("rb") as stream:
            return payload_start(FileSlice(stream.fileno(), before, len(content)), shape, dtype)

    assert start(item) == 4096
    assert start(item, before=10) == 4096
    # One byte less or more: no longer the kit's own, and no whole zip.
    for content in (item[:-1], item[1:], b"\0" + item[1:]):
        with pytest.raises(NotPlainError):
            start(content)
    with pytest.raises(NotPlainError, match=r"shape \[2, 3\], stride \[3, 1\]"):
        start(item, (3, 2))
    with pytest.raises(NotPlainError, match="dtype float32"):
        start(item, dtype="int32")


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.zeros(3, 2).T, r"shape \[2, 3\], stride \[1, 2\]"),
        (torch.zeros(9)[3:].view(2, 3), "shape"),
        (torch.zeros(8)[:6].view(2, 3), "32 bytes, compression method 0"),
        (torch.zeros(2, 3, dtype=torch.float64), "dtype float64"),
        ({"a": torch.zeros(2, 3)}, "a dict"),
    ],
)
def test_tensors_that_are_stored_otherwise(tmp_path: Path, tensor: object, found: str) -> None:
    torch.save(tensor, tmp_path / "item")
    with (tmp_path / "item").open("rb") as stream, pytest.raises(NotPlainError, match=found):
        payload_start(FileSlice(stream.fileno(), 0, (tmp_path / "item").stat().st_size), (2, 3), "float32")


def test_big_endian_and_compressed_items(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(torch.zeros(2, 3), stream)
    with zipfile.ZipFile(stream) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}

    def start(order: bytes | None, method: int) -> int:
        with zipfile.ZipFile(tmp_path / "item", "w", method) as archive:
            for name, content in entries.items():
                if not name.endswith("/byteorder"):
                    archive.writestr(name, content)
                elif order is not None:
                    archive.writestr(zipfile.ZipInfo(name), order)
        with (tmp_path / "item").open("rb") as file:
            return payload_start(FileSlice(file.fileno(), 0, (tmp_path / "item").stat().st_size), (2, 3), "float32")

    for order in (b"little", None):
        at = start(order, zipfile.ZIP_STORED)
        assert (tmp_path / "item").read_bytes()[at : at + 24] == bytes(24)
    with pytest.raises(NotPlainError, match="byte order"):
        start(b"big", zipfile.ZIP_STORED)
    with pytest.raises(NotPlainError, match="24 bytes, compression method 8"):
        start(b"little", zipfile.ZIP_DEFLATED)


def test_a_big_endian_file_of_weights_does_not_end_the_process(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(6)}, tmp_path / "little.bin")
    with zipfile.ZipFile(tmp_path / "little.bin") as old, zipfile.ZipFile(tmp_path / "big.bin", "w") as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), b"big" if name.endswith("/byteorder") else old.read(name))
    assert list(read_bin_files(tmp_path, ["little.bin"]).entries) == ["a"]
    assert read_bin_files(tmp_path, ["big.bin"]).problems == ("big.bin: its byte order is not little-endian",)


def test_a_slice_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with (tmp_path / "file").open("rb") as stream:
        part = FileSlice(stream.fileno(), 2, 5)
        assert (part.readable(), part.seekable(), part.tell()) == (True, True, 0)
        assert (part.read(2), part.tell(), part.read(), part.read(3), part.read(None)) == (b"23", 2, b"456", b"", b"")
        assert (part.seek(-2, os.SEEK_END), part.read(9)) == (3, b"56")
        assert (part.seek(1), part.seek(2, 1), part.read(1)) == (1, 3, b"5")
        assert part.seek(-9) == 0
        buffer = bytearray(4)
        assert (part.readinto(buffer), bytes(buffer)) == (4, b"2345")
        assert (part.readinto(buffer), bytes(buffer)) == (1, b"6345")
        assert part.readinto(buffer) == 0
        assert part.seek(9) == 9 and part.read() == b"" and part.readinto(buffer) == 0
