"""Items from anybody are refused without reading more than a tensor's framing."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from mixtral_run.weights.torch_dist import item_reader, item_writer
from mixtral_run.weights.torch_dist.item_reader import FileSlice, NotPlainError, payload_start


def saved() -> dict[str, bytes]:
    """Return the entries that torch.save writes for zeros of shape 2 x 2."""
    stream = io.BytesIO()
    torch.save(torch.zeros(2, 2), stream)
    with zipfile.ZipFile(stream) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def start_in(path: Path) -> int:
    with path.open("rb") as stream:
        return payload_start(FileSlice(stream.fileno(), 0, path.stat().st_size), (2, 2), "float32")


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 2), tmp_path / "item")
    content = (tmp_path / "item").read_bytes()
    start = start_in(tmp_path / "item")
    assert torch.frombuffer(bytearray(content[start : start + 16]), dtype=torch.float32).tolist() == [1.0] * 4


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_no_long_byte_order_is_read(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "item", "w") as archive:
        for name, content in saved().items():
            archive.writestr(name, content)
        archive.writestr(zipfile.ZipInfo("archive/x/byteorder"), b"\0" * 2**24, compress_type=method)
    tracemalloc.start()
    try:
        with pytest.raises(NotPlainError) as caught:
            start_in(tmp_path / "item")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    "instructions",
    [
        b"0.",
        b"t.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"h\x05.",
        b"\xff.",
        b"K\x01K\x02a.",
        b"K\x01}b.",
        b"K\x01Q.",
    ],
)
def test_a_damaged_pickle_is_no_traceback(tmp_path: Path, instructions: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "item", "w") as archive:
        for name, content in saved().items():
            archive.writestr(name, b"\x80\x02" + instructions if name.endswith("data.pkl") else content)
    with pytest.raises(NotPlainError):
        start_in(tmp_path / "item")


class Bytes(FileSlice):
    """STAND-IN for an item: its first bytes, and a length."""

    def __init__(self, head: bytes, length: int) -> None:
        super().__init__(-1, 0, length)
        self.head = head

    def read(self, size: int | None = -1) -> bytes:
        assert self.tell() == 0 and size is not None
        return self.head[:size]


def test_an_item_of_this_kit_differs_in_its_checksum_alone() -> None:
    """Each byte of the first page counts but for the CRC-32 of the elements; so do length, shape and dtype."""
    frame = item_writer.frame((2, 3), "float32", 4)
    head = frame.head(0x12345678)
    free = [
        at for at, (one, other) in enumerate(zip(frame.head(0), frame.head(0xFFFFFFFF), strict=True)) if one != other
    ]
    assert len(free) == 4 and free[3] - free[0] == 3 and head[free[0] : free[3] + 1] == bytes.fromhex("78563412")
    for at in range(len(head)):
        changed = bytearray(head)
        changed[at] ^= 0x40
        assert item_reader._is_of_this_kit(Bytes(bytes(changed), frame.length), (2, 3), "float32") is (at in free), at
    for length in (frame.length - 1, frame.length + 1):
        assert not item_reader._is_of_this_kit(Bytes(head, length), (2, 3), "float32")
    for shape, dtype in (((3, 2), "float32"), ((2, 3), "bfloat16"), ((2, 3), "int8")):
        assert not item_reader._is_of_this_kit(Bytes(head, frame.length), shape, dtype)
    assert payload_start(Bytes(head, frame.length), (2, 3), "float32") == 4096


def test_a_part_of_a_file_is_read_like_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc0123456789xyz")
    with (tmp_path / "file").open("rb") as stream:
        item = FileSlice(stream.fileno(), 3, 10)
        assert (item.read(4), item.tell(), item.read(0), item.read(), item.read(), item.tell()) == (
            b"0123", 4, b"", b"456789", b"", 10,
        )  # fmt: skip
        assert (item.seek(2), item.read(3), item.seek(1, 1), item.read(None)) == (2, b"234", 6, b"6789")
        assert (item.seek(-3, 2), item.read(99), item.seek(-99, 1), item.seek(12)) == (7, b"789", 0, 12)
        assert item.read(5) == b"" and item.readinto(bytearray(4)) == 0
        buffer = bytearray(b"----")
        assert (item.seek(8), item.readinto(buffer), bytes(buffer), item.tell()) == (8, 2, b"89--", 10)
        assert item.readable() and item.seekable()


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.arange(6.0).view(2, 3).t()[:2], "stride"),
        (torch.zeros(3, 2)[1:], "shape"),
        (torch.zeros(4), "shape"),
        (torch.zeros(2, 2, dtype=torch.float64), "dtype float64"),
        ([torch.zeros(2, 2)], "a list"),
        (torch.zeros(8)[:4].view(2, 2), "32 bytes"),
    ],
)
def test_only_elements_as_they_are_can_be_read(tmp_path: Path, tensor: object, why: str) -> None:
    torch.save(tensor, tmp_path / "item")
    with pytest.raises(NotPlainError, match=why):
        start_in(tmp_path / "item")
