"""Acceptance test of a machine in its container: `python -m mixtral_run.trial.acceptance`. Needs only torch.

Every GPU makes a CUDA call and multiplies matrices in bf16; all of them together measure all-reduce and all-to-all over
NCCL. Without GPUs only the parts for a CPU run, with gloo between two processes, and the report says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MIB, GIB = 2**20, 2**30
CPU_PROCESSES = 2
JOB_SECONDS = 300
"""Time limit of all processes together, after which they count as hung: a broken NVLink makes NCCL wait."""


@dataclass(frozen=True)
class Floors:
    """Least accepted figures; None accepts any. Rates in 10^9 bytes or 10^12 operations a second."""

    num_gpus: int | None = None
    all_reduce_gb_per_second: float | None = None
    all_to_all_gb_per_second: float | None = None
    matrix_tflops: float | None = None
    host_to_device_gb_per_second: float | None = None
    shared_memory_gib: float | None = None
    checkpoint_write_gb_per_second: float | None = None
    checkpoint_read_gb_per_second: float | None = None


@dataclass
class Report:
    """Figures of one machine. `problems` is empty if every part ran and reached its floor."""

    device: str
    num_gpus: int
    torch_version: str
    cuda_version: str | None
    figures: dict[str, Any] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        return not self.problems


def measure(checkpoint_folder: Path, floors: Floors, *, size_mib: int = 256) -> Report:
    """Run every part that this machine supports. size_mib: size of each process's messages and of the test file."""
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    report = Report(
        device="cuda" if num_gpus else "cpu",
        num_gpus=num_gpus,
        torch_version=torch.__version__,
        cuda_version=torch.version.cuda,
    )
    _part(report, "shared memory", lambda: {"shared_memory_gib": round(shutil.disk_usage("/dev/shm").total / GIB, 2)})
    _part(report, "checkpoint folder", lambda: _disk_rates(checkpoint_folder, size_mib))
    if not num_gpus:
        report.not_run = ["a CUDA call on each GPU", "collectives over NCCL", "host-to-device rate"]
        size_mib = min(size_mib, 16)
    _part(report, "processes", lambda: _processes(num_gpus, size_mib))
    _compare(report, floors)
    return report


def _part(report: Report, name: str, run: Callable[[], dict[str, Any]]) -> None:
    """Run one part. A failure becomes a problem of the report; the other parts still run."""
    try:
        report.figures.update(run())
    except Exception as error:
        report.problems.append(f"{name}: {type(error).__name__}: {error}")


def _compare(report: Report, floors: Floors) -> None:
    figures = {**report.figures, "num_gpus": report.num_gpus}
    for name, floor in asdict(floors).items():
        if floor is None or (report.device == "cpu" and name not in _CPU_FLOORS):
            continue
        if report.num_gpus == 1 and name in _RATES_BETWEEN_GPUS:
            continue
        found = figures.get(name)
        if found is None or found < floor:
            report.problems.append(f"{name}: expected at least {floor:g}; found {found}")


_RATES_BETWEEN_GPUS = ("all_reduce_gb_per_second", "all_to_all_gb_per_second")
"""Bus bandwidths. A single GPU exchanges nothing, and has 0."""
_CPU_FLOORS = ("num_gpus", "shared_memory_gib", "checkpoint_write_gb_per_second", "checkpoint_read_gb_per_second")


def _disk_rates(folder: Path, size_mib: int) -> dict[str, Any]:
    """Write a file to the disk and read it back, past the page cache if the system allows; compare and time both."""
    block = os.urandom(MIB)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".acceptance-") as file:
        began = time.perf_counter()
        for _ in range(size_mib):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        for _ in range(size_mib):
            if file.read(MIB) != block:
                raise OSError(f"{folder} returns other bytes than were written")
        read = time.perf_counter() - began
    gigabytes = size_mib * MIB / 1e9
    return {
        "checkpoint_write_gb_per_second": round(gigabytes / written, 3),
        "checkpoint_read_gb_per_second": round(gigabytes / read, 3),
    }


def _processes(num_gpus: int, size_mib: int) -> dict[str, Any]:
    """Run one process per GPU (two on a CPU). Return the slowest figures. RuntimeError names the failed ranks."""
    world = num_gpus or CPU_PROCESSES
    context = multiprocessing.get_context("spawn")
    answers: Any = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        context.Process(target=_worker, args=(rank, world, port, num_gpus > 0, size_mib, answers), daemon=True)
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    until = time.monotonic() + JOB_SECONDS
    found: list[tuple[int, dict[str, Any], str]] = []
    while len(found) < world and time.monotonic() < until:
        while not answers.empty():
            found.append(answers.get())
        if any(error for _, _, error in found) or not any(worker.is_alive() for worker in workers):
            break
        time.sleep(0.05)
    while not answers.empty():
        found.append(answers.get())
    for worker in workers:
        worker.join(timeout=5)
        if worker.is_alive():
            worker.kill()
    errors = [f"rank {rank}: {error}" for rank, _, error in sorted(found) if error]
    answered = {rank for rank, _, _ in found}
    errors += [
        f"rank {rank}: no answer within {JOB_SECONDS} s" for rank in range(world) if rank not in answered and not errors
    ]
    if errors:
        raise RuntimeError("; ".join(errors))
    return _slowest([figures for _, figures, _ in found])


def _slowest(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: min(figures[name] for figures in ranks) for name in ranks[0]}


def _worker(rank: int, world: int, port: int, on_gpu: bool, size_mib: int, answers: Any) -> None:
    try:
        answers.put((rank, _measure_rank(rank, world, port, on_gpu, size_mib), ""))
    except Exception as error:
        if os.environ.get("MIXTRAL_RUN_DEBUG"):
            traceback.print_exc()
        answers.put((rank, {}, f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def _measure_rank(rank: int, world: int, port: int, on_gpu: bool, size_mib: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        figures = _gpu_figures(device)
    else:
        torch.set_num_threads(1)
        figures = {"cpu_matrix_gflops": round(_matrix_rate(device, torch.float32, 512) / 1e9, 2)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not on_gpu:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", rank=rank, world_size=world, device_id=device if on_gpu else None
    )
    try:
        return figures | _collective_rates(device, world, size_mib)
    finally:
        dist.destroy_process_group()


def _gpu_figures(device: Any) -> dict[str, Any]:
    """Check the result of a CUDA call; measure the matrix rate in bf16 and the copy rate from pinned memory."""
    import torch

    if int(torch.arange(1000, device=device).sum()) != 499500:
        raise RuntimeError("the GPU computes a wrong sum")
    source = torch.empty(GIB // 4, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    seconds = _seconds(lambda: target.copy_(source, non_blocking=True), device)
    return {
        "matrix_tflops": round(_matrix_rate(device, torch.bfloat16, 8192) / 1e12, 1),
        "host_to_device_gb_per_second": round(source.numel() / seconds / 1e9, 1),
    }


def _matrix_rate(device: Any, dtype: Any, size: int) -> float:
    """Return the operations a second of a square matrix product."""
    import torch

    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, device)


def _collective_rates(device: Any, world: int, size_mib: int) -> dict[str, Any]:
    """Measure bus bandwidths as nccl-tests defines them (PERFORMANCE.md): bytes · 2(n-1)/n, or (n-1)/n, per second."""
    import torch
    import torch.distributed as dist

    count = size_mib * MIB // 4 // world * world
    buffer = torch.ones(count, dtype=torch.float32, device=device)
    dist.all_reduce(buffer)
    if float(buffer[0]) != world or float(buffer[-1]) != world:
        raise RuntimeError("all-reduce gives a wrong sum")
    buffer.fill_(dist.get_rank())
    received = torch.empty_like(buffer)
    dist.all_to_all_single(received, buffer)
    if received.view(world, -1)[:, 0].tolist() != [float(rank) for rank in range(world)]:
        raise RuntimeError("all-to-all delivers the wrong parts")
    buffer.zero_()
    remote = (world - 1) / world
    size = count * 4 / 1e9
    return {
        "all_reduce_gb_per_second": round(2 * remote * size / _seconds(lambda: dist.all_reduce(buffer), device), 2),
        "all_to_all_gb_per_second": round(
            remote * size / _seconds(lambda: dist.all_to_all_single(received, buffer), device), 2
        ),
    }


def _seconds(action: Callable[[], object], device: Any, repeats: int = 5) -> float:
    """Return the mean duration of an action in seconds, after two runs for warm-up."""
    import torch

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        action()
    settle()
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    settle()
    return (time.perf_counter() - began) / repeats


def main(argv: list[str]) -> int:
    """Measure and print. Exit codes: 0 accepted, 4 not accepted."""
    parser = argparse.ArgumentParser(prog="python -m mixtral_run.trial.acceptance", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--checkpoint-folder", type=Path, default=Path("/checkpoints"))
    parser.add_argument("--size-mib", type=int, default=256, help="size of messages and of the file [default: 256]")
    parser.add_argument(
        "--floors", type=json.loads, default={}, help="JSON object of the least figures, by their names"
    )
    words = parser.parse_args(argv)
    unknown = sorted(set(words.floors) - set(Floors.__dataclass_fields__))
    if unknown:
        parser.error(f"--floors: unknown {', '.join(unknown)}; known: {', '.join(Floors.__dataclass_fields__)}")
    report = measure(words.checkpoint_folder, Floors(**words.floors), size_mib=words.size_mib)
    if words.json:
        print(json.dumps({**asdict(report), "accepted": report.accepted}))
    else:
        for name, value in report.figures.items():
            print(f"{name:34} {value}")
        print(
            "\n".join([f"not run: {part}" for part in report.not_run] + [f"✗ {problem}" for problem in report.problems])
        )
        print("✓ accepted" if report.accepted else "✗ not accepted")
    return 0 if report.accepted else 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
