"""Convert Megatron torch_dist to HF safetensors in the released layout, as a stream."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32

from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.adapter_sum import AdapterSum, open_sum
from mixtral_run.weights.adapter.lora_factors import Factors, as_bytes, as_tensor
from mixtral_run.weights.adapter.merge import Adding, row_blocks
from mixtral_run.weights.hf.fingerprint import fingerprint_of_checksums
from mixtral_run.weights.hf.safetensors_files import INDEX_NAME, header_of
from mixtral_run.weights.hf.stored_tensors import row_pieces
from mixtral_run.weights.hf.tokenizer_files import copy_tokenizer
from mixtral_run.weights.io.atomic_folder import GIB, Staging, disk_problems, next_output, output_problems
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.io.interrupts import interrupts
from mixtral_run.weights.manifest.base_checkpoint import check_base, is_as_converted, is_of_model, open_base
from mixtral_run.weights.manifest.checkpoint_folder import Checkpoint
from mixtral_run.weights.manifest.manifest import (
    MANIFEST_NAME,
    UNKNOWN_FINGERPRINT,
    BaseManifest,
    TrainedManifest,
    is_kind,
    write_manifest,
)
from mixtral_run.weights.manifest.proof import PROOF_NAME
from mixtral_run.weights.mapping.hf_to_megatron import LINEAR_QKV_KEY, RowRanges, Shape, hf_tensors, row_ranges
from mixtral_run.weights.torch_dist.checkpoint_reader import Bits, Reader

SHARD_BYTES = 5 * 10**9
"""Largest size of a file, as in the released shards."""

_SIDECAR_BYTES = 16 * 2**20
_STEPS = 3


@dataclass(frozen=True)
class ToHFResult:
    """Result of a conversion to HF: sizes of the tensors in bytes, and seconds."""

    output_path: Path
    num_tensors: int
    num_files: int
    num_bytes: int
    fingerprint: str
    seconds: float


def to_hf(config: ConvertConfig, report: Report | None = None) -> ToHFResult:
    """Write the HF model of a base checkpoint completely or not at all. Only one process may call.

    Every tensor is equal bit by bit to the one that was converted. The fingerprint is computed from the bytes that are
    read and must be the recorded one, unless the weights were trained since, which is reported. With `config.adapter`
    every tensor that it changes is `W + alpha / r · B·A`, bit by bit what `export --merge` writes. Raises ConfigError
    or WeightsError.
    """
    report = report or Report()
    path = config.check().from_megatron
    if path is None:
        raise ConfigError("There is nothing to convert.", expected="--from-megatron")
    started = time.monotonic()
    report.step(1, _STEPS, f"Read {path}{' and '.join(('', *config.adapter))}")
    checkpoint, tokenizer = open_base(path, config.hf_model_path, report)
    with (
        Reader(checkpoint.iteration_folder, is_of_model) as reader,
        _open_adapters(config, checkpoint, report) as (adapters, factors),
    ):
        files = _check(config, checkpoint, reader, report)
        num_bytes = checkpoint.architecture.num_parameters * reader.tensors[LINEAR_QKV_KEY].item_size
        with interrupts(), Staging(config.output_path, MANIFEST_NAME, "mixtral-run convert") as staging:
            staging.clear()
            report.step(2, _STEPS, f"Write {len(files)} files ({num_bytes / GIB:,.2f} GiB)")
            with report.progress(num_bytes, "written") as progress:
                writer = _Writer(checkpoint, reader, factors, progress.advance)
                for name, tensors in files.items():
                    writer.write(staging.folder / name, tensors)
            report.step(3, _STEPS, "Check the fingerprint, wait for the disk")
            fingerprint = _check_fingerprint(config, checkpoint, writer, report)
            _write_sidecars(adapters, checkpoint, files, num_bytes, staging.folder, fingerprint)
            copy_tokenizer(tokenizer, staging.folder)
            template = None if adapters is None else adapters.first.manifest.chat_template
            if template is not None:
                template.write(staging.folder)
            staging.publish()
    num_tensors = sum(len(tensors) for tensors in files.values())
    result = ToHFResult(config.output_path, num_tensors, len(files), num_bytes, fingerprint, time.monotonic() - started)
    report.done("Conversion complete")
    report.say(f"  {num_tensors:,} tensors, {num_bytes / 1e6:,.0f} MB in {result.seconds:,.1f} s")
    report.say(f"  next: mixtral-run generate --load {shlex.quote(str(config.output_path))} --instruction …")
    return result


@contextmanager
def _open_adapters(
    config: ConvertConfig, checkpoint: Checkpoint, report: Report
) -> Iterator[tuple[AdapterSum | None, Factors | None]]:
    """Give the adapters to merge and the factors of their sum; None without --adapter."""
    if not config.adapter:
        yield None, None
        return
    adapters = open_sum(config.adapter, report)
    fingerprint = _recorded_fingerprint(checkpoint)
    if adapters.first.base_fingerprint != fingerprint:
        raise WeightsError(
            "The adapter was trained on another base.",
            where=", ".join(config.adapter),
            expected=f"the base with fingerprint {adapters.first.base_fingerprint}",
            found=f"{checkpoint.folder}, fingerprint {fingerprint or 'not recorded'}",
            next_command="give --from-megatron the checkpoint that the adapter was trained on",
        )
    with adapters.factors(report) as factors:
        yield adapters, factors


def _check(
    config: ConvertConfig, checkpoint: Checkpoint, reader: Reader, report: Report
) -> dict[str, dict[str, Shape]]:
    """Raise everything that can be found before the first byte is written; return the files to write."""
    check_base(checkpoint, reader, report)
    problems = output_problems(
        config.output_path,
        overwrite=config.overwrite,
        is_ours=lambda folder: is_kind(folder, "hf"),
        what="an earlier HF model of this kit",
    )
    problems += disk_problems(config.output_path, reader.num_bytes + _SIDECAR_BYTES)
    if problems:
        raise ConfigError("The HF model cannot be written.", problems=problems, next_command=next_output(problems))
    return _files(checkpoint, reader.tensors[LINEAR_QKV_KEY].item_size)


def _files(checkpoint: Checkpoint, item_size: int) -> dict[str, dict[str, Shape]]:
    """Distribute the tensors over files, which are filled one after another."""
    groups: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in hf_tensors(checkpoint.architecture).items():
        size = prod(shape) * item_size
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    count = len(groups)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": group for number, group in enumerate(groups, 1)}


class _Writer:
    """Writer of HF files. checksums: CRC-32 of the checkpoint's tensors, before an adapter is added."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        reader: Reader,
        factors: Factors | None,
        advance: Callable[[int], None],
    ) -> None:
        self._reader = reader
        self._factors = factors
        self._advance = advance
        self._ranges: dict[str, RowRanges] = row_ranges(checkpoint.architecture)
        self.dtype = reader.tensors[LINEAR_QKV_KEY].dtype
        self.checksums: dict[str, int] = {}

    def write(self, file: Path, tensors: dict[str, Shape]) -> None:
        """Write one file; it is on the disk when this returns."""
        try:
            with file.open("wb") as stream:
                stream.write(header_of(tensors, self.dtype))
                for name in tensors:
                    blocks = self._blocks
                    if self._factors is not None and name in self._factors.trained_also:
                        blocks = self._replaced
                    elif self._factors is not None and name in self._factors.places:
                        blocks = self._merged
                    for block in blocks(name):
                        stream.write(block)
                        self._advance(len(block))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise WeightsError(
                "The HF model cannot be written.",
                where=str(file),
                found=error.strerror,
                next_command=f"df -h {shlex.quote(str(file.parent.parent))}, then the same command again",
            ) from error

    def _blocks(self, name: str) -> Iterator[memoryview]:
        ranges, crc = self._ranges[name], 0
        for first, last in row_pieces(ranges, self._reader.tensors[ranges.key].item_size):
            block = self._rows(ranges, first, last).data.cast("B")
            crc = crc32(block, crc)
            yield block
        self.checksums[name] = crc

    def _rows(self, ranges: RowRanges, start: int, stop: int) -> Bits:
        """Read rows of the checkpoint's tensor in the model's dtype; local layers store norms in fp32."""
        rows = self._reader.rows(ranges.key, ranges.leading, start, stop)
        dtype = self._reader.tensors[ranges.key].dtype
        if dtype == self.dtype:
            return rows
        cast = as_tensor(rows, dtype).to(getattr(torch, self.dtype)).contiguous()
        bits: Bits = cast.view(torch.uint8).numpy().view(f"u{cast.element_size()}")
        return bits

    def _merged(self, name: str) -> Iterator[memoryview]:
        assert self._factors is not None
        ranges, crc = self._ranges[name], 0
        adding = Adding(self._factors, name, getattr(torch, self.dtype))
        item_size = self._reader.tensors[ranges.key].item_size
        for start, stop in row_blocks(sum(last - first for first, last in ranges.rows), ranges.columns * item_size):
            rows = self._hf_rows(ranges, start, stop)
            crc = crc32(rows.data.cast("B"), crc)
            yield as_bytes(adding.to_rows(as_tensor(rows, self.dtype), start, stop))
        self.checksums[name] = crc

    def _replaced(self, name: str) -> Iterator[memoryview]:
        """Yield a weight that was trained with the adapter, after a pass over the base's, for its checksum."""
        assert self._factors is not None
        for _ in self._blocks(name):
            pass
        yield as_bytes(self._factors.trained(name).to(getattr(torch, self.dtype)))

    def _hf_rows(self, ranges: RowRanges, start: int, stop: int) -> Bits:
        """Read rows start…stop of the HF tensor, which may be several ranges of the checkpoint's tensor."""
        parts, row = [], 0
        for first, last in ranges.rows:
            begin, end = max(start, row), min(stop, row + last - first)
            if begin < end:
                parts.append(self._rows(ranges, first + begin - row, first + end - row))
            row += last - first
        return np.ascontiguousarray(np.concatenate(parts))


def _recorded_fingerprint(checkpoint: Checkpoint) -> str:
    """Return the fingerprint of the conversion, UNKNOWN_FINGERPRINT if another program wrote the checkpoint."""
    manifest = checkpoint.manifest
    return manifest.fingerprint if isinstance(manifest, BaseManifest) else UNKNOWN_FINGERPRINT


def _check_fingerprint(config: ConvertConfig, checkpoint: Checkpoint, writer: _Writer, report: Report) -> str:
    recorded = _recorded_fingerprint(checkpoint)
    found = fingerprint_of_checksums(checkpoint.architecture, writer.dtype, writer.checksums)
    if found == recorded:
        return found
    if is_as_converted(checkpoint) or config.adapter or isinstance(checkpoint.manifest, TrainedManifest):
        raise WeightsError(
            "The checkpoint's weights are not those that were converted or saved.",
            where=str(checkpoint.folder),
            expected=f"fingerprint {recorded or 'not recorded'}",
            found=f"fingerprint {found}",
            next_command=f"mixtral-run verify --load {shlex.quote(str(checkpoint.folder))} --proof, which names what "
            "differs",
        )
    report.warn(
        f"{checkpoint.iteration_folder} has no {PROOF_NAME}: that its bytes are those that were saved is not checked"
    )
    if recorded != UNKNOWN_FINGERPRINT:
        report.warn(f"the weights are not those that were converted ({recorded}) but {found}: trained on since")
    return found


def _write_sidecars(
    adapters: AdapterSum | None,
    checkpoint: Checkpoint,
    files: dict[str, dict[str, Shape]],
    num_bytes: int,
    folder: Path,
    fingerprint: str,
) -> None:
    index = {
        "metadata": {"total_size": num_bytes},
        "weight_map": {tensor: file for file, tensors in files.items() for tensor in tensors},
    }
    write_atomically(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    what: dict[str, Any] = {"fingerprint": fingerprint}
    if adapters is not None:
        # With an adapter the weights are no longer those of the fingerprint.
        what = {**adapters.record(), "base": {"fingerprint": fingerprint, "path": str(checkpoint.folder)}}
    write_manifest(
        folder,
        "hf",
        architecture=checkpoint.architecture.to_mapping(),
        source=str(checkpoint.folder),
        **what,
    )
