"""Bandwidth of an all-reduce among the processes of several hosts, as one JSON object of the first process.

python -m mixtral_run.trial.pair_bandwidth --node-rank N --address ADDRESS runs on each host at the same time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

MIB = 2**20
REPEATS = 3
ENOUGH_SECONDS = 0.5
"""Larger messages are not measured once REPEATS of one size take this long: a slow link would take minutes."""
CONNECT_SECONDS = 90
VIA_NETWORK = re.compile(r"via NET/(\w+)/\d+(?:\(\d+\))?(/GDRDMA)?")
"""Form of a connection. The number in parentheses is the rank whose NIC it uses, on another GPU (PXN)."""


def transports_of(log: str) -> dict[str, int]:
    """Count the connections between hosts in the output of NCCL_DEBUG=INFO, by kind, such as IB/GDRDMA or Socket."""
    return dict(collections.Counter(kind + direct for kind, direct in VIA_NETWORK.findall(log)))


def measure(rank: int, world: int, local_rank: int, address: str, port: int, size_mib: int) -> dict[str, Any]:
    """Measure in this process; all processes must call. Return the figures, which are the same in all of them.

    Bandwidth is bus bandwidth as nccl-tests defines it: bytes · 2(n-1)/n per second, with 10^9 bytes in a GB. Raises
    RuntimeError if the processes do not meet or a sum is wrong.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        _ask_nccl_for_its_log(Path(folder) / "nccl.log")
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=world,
            timeout=timedelta(seconds=CONNECT_SECONDS), device_id=device if on_gpu else None,
        )  # fmt: skip
        try:
            size, seconds = _all_reduce(device, world, size_mib)
            counts = transports_of(_text(Path(folder) / "nccl.log"))
            found: list[dict[str, int]] = [{} for _ in range(world)]
            dist.all_gather_object(found, counts)
        finally:
            dist.destroy_process_group()
    transports: collections.Counter[str] = collections.Counter()
    for each in found:
        transports.update(each)
    return {
        "all_reduce_gb_per_second": round(2 * (world - 1) / world * size * MIB / seconds / 1e9, 4),
        "size_mib": size,
        "backend": "nccl" if on_gpu else "gloo",
        "transports": dict(transports),
    }


def _ask_nccl_for_its_log(file: Path) -> None:
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(file)}
    # Between two hosts NCCL may choose a tree, whose bus bandwidth can exceed that of the network.
    os.environ.setdefault("NCCL_ALGO", "RING")


def _all_reduce(device: Any, world: int, size_mib: int) -> tuple[int, float]:
    """Return the largest size that was measured, in MiB, and the seconds of one all-reduce of it."""
    import torch
    import torch.distributed as dist

    size = 1
    while True:
        buffer = torch.ones(size * MIB // 4, dtype=torch.float32, device=device)
        dist.all_reduce(buffer)
        if float(buffer[0]) != world or float(buffer[-1]) != world:
            raise RuntimeError("all-reduce gives a wrong sum")
        buffer.zero_()
        dist.barrier()
        began = time.perf_counter()
        for _ in range(REPEATS):
            dist.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # All processes must agree on the next size.
        slowest = torch.tensor([time.perf_counter() - began], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds = float(slowest)
        if seconds > ENOUGH_SECONDS or size * 4 > size_mib:
            return size, seconds / REPEATS
        size *= 4


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")
    return ""


def _work(words: Mapping[str, Any], local_rank: int) -> None:
    """Measure in one process of this host. The first process of all prints the figures; an error ends the process."""
    rank, world = words["node_rank"] * words["processes"] + local_rank, words["num_hosts"] * words["processes"]
    try:
        figures = measure(rank, world, local_rank, words["address"], words["port"], words["size_mib"])
    except Exception as error:
        print(f"rank {rank}: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        sys.exit(6)
    if rank == 0:
        print(json.dumps(figures), flush=True)


def main(argv: list[str]) -> int:
    """Measure with all processes of this host. Exit codes: 0, or 6 if a process failed."""
    parser = argparse.ArgumentParser(prog="python -m mixtral_run.trial.pair_bandwidth", description=__doc__)
    parser.add_argument("--address", required=True, help="address of the first host")
    for name, default in (("node-rank", 0), ("num-hosts", 2), ("processes", 1), ("port", 29400), ("size-mib", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    words = vars(parser.parse_args(argv))
    if words["processes"] == 1:
        _work(words, 0)
        return 0
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(words, rank), daemon=True) for rank in range(words["processes"])]
    for worker in workers:
        worker.start()
    # The others would wait for a process that failed.
    while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
        time.sleep(0.1)
    failed = any(worker.exitcode for worker in workers)
    for worker in workers:
        if failed:
            worker.kill()
        worker.join()
    return 6 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
