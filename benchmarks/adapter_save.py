"""Time to save an adapter with AdamW's moments: by Megatron's own strategy, and by the kit's.

    python -m benchmarks.adapter_save                       # Mixtral 8x7B's at rank 16, 2.6 GB, two processes
    python -m benchmarks.adapter_save --layers 8 --folder /on/the/disk

One adapter an expert, fp32, random numbers; experts are split over the processes (gloo, on the CPU). Each way in
processes of its own, which had saved nothing before: the first round is what a short run pays. Memory is that of all
processes together, with the adapter; what a forked one shares with its parent counts in both. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.support import process_memory
from tests.support.references.megatron_writer import let_it_write_from_a_cpu

WAYS = ("megatron", "kit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where to write [default: /dev/shm]")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--ffn-hidden-size", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        save_rounds(options)
        return
    # torchrun would set it as well, and say so.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict[str, Any] = {}
    for way in WAYS:
        result |= {f"{way}_{name}": value for name, value in run(way, options).items()}
        print(f"{way}: {result[f'{way}_seconds']} s a round, {result[f'{way}_peak_gb']:.1f} GB of memory", flush=True)
    print(json.dumps(result))


def run(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way's seconds of each round and its peak memory, in processes of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        argv += [str(options.processes), "-m", "benchmarks.adapter_save", "--way", way, "--folder", folder]
        for name in ("layers", "hidden_size", "ffn_hidden_size", "rank", "rounds"):
            argv += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        found, memory = process_memory.measured(argv)
    return found | {"peak_gb": memory.peak_anonymous_bytes / 1e9}


def save_rounds(options: argparse.Namespace) -> None:
    """In one of the processes: save as often as asked; the first one prints the seconds and the adapter's GB."""
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from mixtral_run.model.parallel.cpu import stand_in_for_cuda
    from mixtral_run.model.parallel.megatron import ShardedTensor
    from mixtral_run.train.checkpoints.adapter_writer import AdapterWriter

    stand_in_for_cuda()
    let_it_write_from_a_cpu()
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    hidden, ffn, r, experts = options.hidden_size, options.ffn_hidden_size, options.rank, 8
    shapes = {"fc1.in": (r, hidden), "fc1.out": (2 * ffn, r), "fc2.in": (r, ffn), "fc2.out": (hidden, r)}
    shards: dict[str, Any] = {
        f"{kind}.{layer}.{expert}.{name}": ShardedTensor.from_rank_offsets(
            f"{kind}.{name}", torch.randn(shape), (0, layer, options.layers), (1, expert, experts), prepend_axis_num=2
        )
        for kind in ("adapter", "exp_avg", "exp_avg_sq")
        for layer in range(options.layers)
        for expert in range(experts)
        if expert * count // experts == rank
        for name, shape in shapes.items()
    }
    num_bytes = sum(shard.data.nbytes for shard in shards.values()) * count
    seconds = []
    for number in range(options.rounds):
        folder = options.folder / str(number)
        if rank == 0:
            folder.mkdir()
        dist.barrier()
        began = time.perf_counter()
        if options.way == "kit":
            write_by_kit(AdapterWriter(shards), folder)
        else:
            dist_checkpointing.save(dict(shards), str(folder))
        dist.barrier()
        seconds.append(round(time.perf_counter() - began, 2))
        if rank == 0:
            shutil.rmtree(folder)
        dist.barrier()
    if rank == 0:
        print(json.dumps({"seconds": seconds, "gb": round(num_bytes / 1e9, 2)}))
    dist.destroy_process_group()


def write_by_kit(writer: Any, folder: Path) -> None:
    """Write the tensors as saving.py does, without its checks and names."""
    import torch.distributed as dist

    written: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(written, writer.write(folder)[0])
    if dist.get_rank() == 0:
        writer.finish(folder, written)


if __name__ == "__main__":
    main()
