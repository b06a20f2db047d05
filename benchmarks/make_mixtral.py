"""A Mixtral of random weights in the released layout, of full size or less, as fast as the disk or memory takes it.

    python -m benchmarks.make_mixtral FOLDER                        # 46.7 B parameters, 19 files, 93.4 GB
    python -m benchmarks.make_mixtral FOLDER --layers 8 --hidden-size 1024 --ffn-hidden-size 3584

Weights are of N(0, 0.02²), layer norms ones. They are drawn once, 32 Mi numbers, and every tensor is written from a
place of its own in them, so that no tensor is like another and nothing has to be drawn while bytes are moved. The same
seed and sizes give the same bytes, whatever the number of workers. Memory: the drawn numbers, 192 MiB while they are
drawn and 64 MiB after that.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat, zip_longest
from math import prod
from pathlib import Path

import numpy as np

from mixtral_run.model.architecture import MIXTRAL_8X7B, MixtralArchitecture
from mixtral_run.trial.random_mixtral import INDEX_NAME, hf_config, split_into_shards
from mixtral_run.trial.sizes import tokenizer_texts
from mixtral_run.trial.tiny_tokenizer import write_tokenizer
from mixtral_run.weights.hf.safetensors_files import header_of
from mixtral_run.weights.io.atomic_folder import disk_problems
from mixtral_run.weights.io.disk import allocate

POOL_NUMBERS = 32 * 2**20
PART_BYTES = 16 * 2**20
STANDARD_DEVIATION = 0.02
_ITEM_SIZE = 2
_ONE = 0x3F80  # bfloat16


@dataclass(frozen=True)
class Run:
    """Bytes start…start + count of a tensor, and where they go."""

    name: str
    is_norm: bool
    file: Path
    position: int
    start: int
    count: int


def scaled(layers: int, hidden_size: int, ffn_hidden_size: int, vocab_size: int) -> MixtralArchitecture:
    """Mixtral 8x7B with other sizes; heads keep their 128 numbers, or 64 where that leaves fewer than 8 heads.

    With the width of 8x22B the heads are its own: 48 of queries, 8 of keys and values.
    """
    if (layers, hidden_size, ffn_hidden_size, vocab_size) == (32, 4096, 14336, 32000):
        return MIXTRAL_8X7B
    channels = 128 if hidden_size >= 1024 else 64
    heads = hidden_size // channels
    return MixtralArchitecture(
        num_layers=layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=8 if heads > 32 and heads % 8 == 0 else max(heads // 4, 2),
        kv_channels=channels,
        num_experts=8,
        moe_router_topk=2,
        vocab_size=vocab_size,
        max_position_embeddings=32768,
        rotary_base=1e6,
        layernorm_epsilon=1e-5,
    )


def make(folder: Path, architecture: MixtralArchitecture, *, num_shards: int, seed: int, workers: int) -> int:
    """Write the model into `folder`, which must be new or empty; its bytes are on the disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder} holds something already")
    total = architecture.num_parameters * _ITEM_SIZE
    problems = disk_problems(folder, total)
    if problems:
        raise SystemExit(problems[0])
    pool, ones = _pool(seed), _ones()
    shards = split_into_shards(architecture, num_shards)
    names = [f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]
    descriptors: dict[Path, int] = {}
    runs_by_file: list[list[Run]] = []
    sizes: list[int] = []
    for name, shard in zip(names, shards, strict=True):
        header = header_of(dict(shard), "bfloat16")
        file = folder / name
        descriptors[file] = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.pwrite(descriptors[file], header, 0)
        sizes.append(len(header) + sum(prod(shape) for _, shape in shard) * _ITEM_SIZE)
        runs_by_file.append(list(_runs(file, len(header), shard)))
    # The kernel lets one writer at a time into a file: neighbors in the order go to different ones.
    runs = [run for column in zip_longest(*runs_by_file) for run in column if run is not None]

    def write(run: Run) -> None:
        source = ones if run.is_norm else pool
        first = 0 if run.is_norm else zlib.crc32(f"{seed} {run.name}".encode()) % POOL_NUMBERS * _ITEM_SIZE
        position, at, remaining = run.position, (first + run.start) % len(source), run.count
        while remaining:
            block = source[at : at + min(remaining, 2**20)]
            done = os.pwrite(descriptors[run.file], block, position)
            position, at, remaining = position + done, (at + done) % len(source), remaining - done

    try:
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(allocate, descriptors.values(), repeat(0), sizes))
            list(threads.map(write, runs))
            list(threads.map(os.fsync, descriptors.values()))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    _write_next_to(folder, architecture, {n: f for f, shard in zip(names, shards, strict=True) for n, _ in shard})
    return total


def _pool(seed: int) -> memoryview:
    """The drawn numbers as bfloat16, rounded to the nearest."""
    numbers = np.random.default_rng(seed).standard_normal(POOL_NUMBERS, np.float32) * np.float32(STANDARD_DEVIATION)
    bits = numbers.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16).data.cast("B")


def _ones() -> memoryview:
    return np.full(2**16, _ONE, np.uint16).data.cast("B")


def _runs(file: Path, position: int, shard: list[tuple[str, tuple[int, ...]]]) -> Iterator[Run]:
    for name, shape in shard:
        size = prod(shape) * _ITEM_SIZE
        for start in range(0, size, PART_BYTES):
            yield Run(name, len(shape) == 1, file, position + start, start, min(PART_BYTES, size - start))
        position += size


def _write_next_to(folder: Path, architecture: MixtralArchitecture, weight_map: dict[str, str]) -> None:
    write_tokenizer(folder, tokenizer_texts(), architecture.vocab_size, architecture.max_position_embeddings)
    index = {
        "metadata": {"total_size": architecture.num_parameters * _ITEM_SIZE},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    config = hf_config(architecture, dtype="bfloat16", initializer_range=STANDARD_DEVIATION)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def add_size_options(parser: argparse.ArgumentParser, *, layers: int, hidden_size: int, ffn_hidden_size: int) -> None:
    """The sizes of the model, with these defaults."""
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--hidden-size", type=int, default=hidden_size)
    parser.add_argument("--ffn-hidden-size", type=int, default=ffn_hidden_size)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    add_size_options(parser, layers=32, hidden_size=4096, ffn_hidden_size=14336)
    parser.add_argument("--shards", type=int, help="files (default: as released, 5 GB each and at least 2)")
    parser.add_argument("--workers", type=int, default=min(32, 2 * (os.cpu_count() or 1)))
    options = parser.parse_args()
    architecture = scaled(options.layers, options.hidden_size, options.ffn_hidden_size, options.vocab_size)
    num_shards = options.shards or max(2, -(-architecture.num_parameters * _ITEM_SIZE // (5 * 10**9)))
    started = time.perf_counter()
    total = make(options.folder, architecture, num_shards=num_shards, seed=options.seed, workers=options.workers)
    seconds = time.perf_counter() - started
    print(
        f"{architecture.num_parameters:,} parameters, {num_shards} files, {total / 1e9:.2f} GB in {seconds:.1f} s, "
        f"{total / 1e9 / seconds:.2f} GB/s"
    )


if __name__ == "__main__":
    main()
