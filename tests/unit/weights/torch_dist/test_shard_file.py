"""A file of shards: torch reads each of them, and the checksum is that of the file."""

from __future__ import annotations

import concurrent.futures.thread
import errno
import io
import os
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixtral_run.weights.io import host_parts
from mixtral_run.weights.torch_dist import shard_file


@pytest.fixture(params=["/dev/shm", None], ids=["memory", "disk"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=request.param) as name:
        yield Path(name)


def some_tensors() -> list[torch.Tensor]:
    numbers = torch.arange(60_000, dtype=torch.float32)
    return [
        numbers[:7],
        numbers.view(200, 300).t(),
        numbers[:4096].bfloat16().view(1, 64, 64),
        numbers[5:6].view(()).half(),
        numbers.view(100, 600)[:, 3:9],
        numbers[:0],
    ]


@pytest.mark.parametrize(("run_bytes", "part_bytes"), [(1, 2**22), (40_000, 1000), (2**30, 30_000)])
def test_torch_reads_every_tensor_and_the_checksum_is_the_files(
    folder: Path, run_bytes: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "_RUN_BYTES", run_bytes)
    monkeypatch.setattr(host_parts, "PART_BYTES", part_bytes)
    file, tensors = folder / "__0_0.distcp", some_tensors()
    file.write_bytes(b"x" * 3_000_000)  # of an earlier save
    places, crc = shard_file.write_shards(file, tensors, threads=3)
    content = file.read_bytes()
    assert crc == zlib.crc32(content) and len(content) < 3_000_000
    assert len(places) == len(tensors)
    for place, tensor in zip(places, tensors, strict=True):
        read = torch.load(io.BytesIO(content[place.start : place.start + place.length]), weights_only=True)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_a_rank_without_tensors_has_an_empty_file(tmp_path: Path) -> None:
    assert shard_file.write_shards(tmp_path / "file", [], threads=2) == ([], 0)
    assert (tmp_path / "file").read_bytes() == b""


def test_an_error_of_one_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, []

    def full(descriptor: int, data: bytes, position: int) -> int:
        calls.append(position)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Short, as the system may write.
        return real(descriptor, data[:1000], position)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(shard_file, "is_in_memory", lambda _: False)
    with pytest.raises(OSError, match="No space left on device"):
        shard_file.write_shards(tmp_path / "file", some_tensors(), threads=2)


def test_threads_that_wait_for_the_disk_do_not_keep_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, answers, waiting = os.pwrite, threading.Event(), threading.Semaphore(0)

    def stuck(descriptor: int, data: bytes, position: int) -> int:
        waiting.release()
        answers.wait()
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", stuck)
    monkeypatch.setattr(shard_file, "is_in_memory", lambda _: False)
    monkeypatch.setattr(shard_file, "_RUN_BYTES", 1)
    words = tmp_path / "file", some_tensors(), 2
    others = set(threading.enumerate())
    save = threading.Thread(target=shard_file.write_shards, args=words, daemon=True)
    save.start()
    try:
        assert waiting.acquire(timeout=30) and waiting.acquire(timeout=30)
        threads = set(threading.enumerate()) - others
        assert len(threads) == 3 and all(each.daemon for each in threads)
        # The interpreter joins the threads of a pool, although some versions make them daemons.
        assert not threads & set(concurrent.futures.thread._threads_queues)
    finally:
        answers.set()
    save.join(30)
    assert not any(each.is_alive() for each in threads)


def test_no_thread_copies_more_than_a_part_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_parts, "PART_BYTES", 1000)
    wide = torch.arange(60_000, dtype=torch.float32).view(3, 2, 10_000).transpose(0, 1)
    for tensor in [*some_tensors(), wide]:
        parts = list(host_parts.host_parts(tensor, host_parts.ToHost()))
        assert max(each.nbytes for each in parts) <= 1000
        assert torch.equal(torch.cat(parts), tensor.reshape(-1))


def test_what_has_no_frame_is_left_to_torch() -> None:
    assert shard_file.can_write(some_tensors())
    assert not shard_file.can_write([*some_tensors(), torch.arange(3)])
    # 4 GiB, without their memory.
    assert not shard_file.can_write([torch.zeros(1).expand(2**30)])
