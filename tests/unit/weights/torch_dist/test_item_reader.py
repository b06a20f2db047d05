"""Items from anybody are refused without reading more than a tensor's framing."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

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
