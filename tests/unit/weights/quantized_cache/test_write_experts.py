"""Experts written by several threads: every byte in its place, no thread left behind, errors kept."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from isal.isal_zlib import crc32
from torch import Tensor

from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.weights.io import host_parts
from mixtral_run.weights.quantized_cache import write_experts, writer
from mixtral_run.weights.quantized_cache.layout import Files, cache_folder
from mixtral_run.weights.quantized_cache.write_experts import AT_ONCE, Writer

LAYERS, HIDDEN, FFN = 5, 64, 192
ARCHITECTURE = dataclasses.replace(
    MIXTRAL_8X7B, num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=8, kv_channels=8
)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return writer.begin(tmp_path, Files(cache_folder(tmp_path, "fp8"), ARCHITECTURE, "fp8"), 0, lambda: False).files


@pytest.fixture(autouse=True)
def many_threads_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_experts, "num_threads", lambda: 12)
    monkeypatch.setattr(host_parts, "PART_BYTES", 1000)


def experts_of(layer: int) -> dict[tuple[str, str], Tensor]:
    generator = torch.Generator().manual_seed(layer)
    found = {}
    for linear, (outputs, inputs) in {"linear_fc1": (2 * FFN, HIDDEN), "linear_fc2": (HIDDEN, FFN)}.items():
        values = torch.randint(0, 255, (8, outputs, inputs), dtype=torch.uint8, generator=generator)
        found[linear, "values"] = values.view(torch.float8_e4m3fn)
        found[linear, "scales"] = torch.rand(8, outputs, generator=generator)
    return found


def written(files: Files) -> dict[str, int]:
    """Return the CRC-32 of each tensor's bytes in the files."""
    found = {}
    for layer in range(LAYERS):
        content = files.file(layer).read_bytes()
        for name, entry in files.entries(layer).items():
            found[name] = crc32(content[entry.start : entry.start + entry.num_bytes])
    return found


def expected() -> dict[str, int]:
    return {
        f"layers.{layer}.experts.{expert}.{linear}.{part}": crc32(tensor.view(-1).view(torch.uint8).numpy().data)
        for layer in range(LAYERS)
        for (linear, part), stacked in experts_of(layer).items()
        for expert, tensor in enumerate(stacked)
    }


def test_every_tensor_is_in_its_place(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = [], os.fsync
    monkeypatch.setattr(write_experts.os, "fsync", lambda descriptor: (synced.append(descriptor), sync(descriptor)))
    one = Writer(files, 0)
    for layer in range(LAYERS):
        one.add(layer, experts_of(layer))
    one.finish()
    assert one.failure is None
    assert one.checksums == written(files) == expected()
    assert len(synced) == LAYERS
    assert not any(each.is_alive() for each in one._threads)


def test_ranks_write_their_own_experts(files: Files) -> None:
    checksums: dict[str, int] = {}
    for first in (0, 4):
        half = Writer(files, first)
        for layer in range(LAYERS):
            half.add(layer, {key: each[first : first + 4] for key, each in experts_of(layer).items()})
        half.finish()
        checksums |= half.checksums
    assert checksums == written(files) == expected()


def test_threads_share_out_over_the_files(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer files than threads, no more than AT_ONCE write each, and every file is written meanwhile."""
    most: dict[int, int] = {}
    now: dict[int, int] = {}
    lock, all_write = threading.Lock(), threading.Barrier(LAYERS * AT_ONCE, timeout=20)
    write = write_experts._write_tensor
    calls = []

    def counted(descriptor: int, *arguments: object) -> int:
        with lock:
            now[descriptor] = now.get(descriptor, 0) + 1
            most[descriptor] = max(most.get(descriptor, 0), now[descriptor])
            calls.append(descriptor)
            is_early = len(calls) <= LAYERS * AT_ONCE
        if is_early:
            all_write.wait()
        crc = write(descriptor, *arguments)
        with lock:
            now[descriptor] -= 1
        return crc

    monkeypatch.setattr(write_experts, "_write_tensor", counted)
    one = Writer(files, 0)
    for layer in range(LAYERS):
        one.add(layer, experts_of(layer))
    one.finish()
    assert one.checksums == expected()
    assert list(most.values()) == [AT_ONCE] * LAYERS


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fails(files: Files, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(write_experts.os, call, fail)
    one = Writer(files, 0)
    for layer in range(LAYERS):
        one.add(layer, experts_of(layer))
    one.finish()
    assert one.failure == "Input/output error"
    assert not any(each.is_alive() for each in one._threads)
    assert not one._layers


def test_other_errors_are_raised(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_experts, "_write_tensor", lambda *_: 1 // 0)
    one = Writer(files, 0)
    one.add(0, experts_of(0))
    with pytest.raises(ZeroDivisionError):
        one.finish()


def test_what_is_abandoned_is_not_written_to_its_end(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go = threading.Event(), threading.Event()
    write = write_experts._write_tensor

    def held(*arguments: object) -> int:
        began.set()
        assert go.wait(20)
        return write(*arguments)

    monkeypatch.setattr(write_experts, "_write_tensor", held)
    one = Writer(files, 0)
    for layer in range(LAYERS):
        one.add(layer, experts_of(layer))
    assert began.wait(20)
    threading.Timer(0.2, go.set).start()
    one.abandon()
    assert len(one.checksums) <= 12
    assert not any(each.is_alive() for each in one._threads)
