"""Memory and GPUs that this machine has for a job."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.verbs.weights import VerifyConfig
from mixtral_run.launch.processes import is_worker, process_count
from mixtral_run.model.kernels.cache import copy_from_image
from mixtral_run.planner.memory_model import CONTEXT
from mixtral_run.terminal.report import Report
from mixtral_run.weights.manifest.describe import describe_base

DTYPE_BYTES = {"bf16": 2, "fp32": 4}


def logits_fit(config: VerifyConfig) -> bool:
    """Return True if both models of the logits comparison fit into memory; print a warning if they do not."""
    import psutil

    base = describe_base(config.load)
    element_bytes = DTYPE_BYTES.get(config.dtype, 2 if base.dtype != "float32" else 4)
    # HF's model is in RAM in any case, the kit's too unless it is on the GPUs. Activations take a fifth more.
    needed = 1.2 * 2 * element_bytes * base.architecture.num_parameters
    free: float = psutil.virtual_memory().available
    where = "both models"
    count = process_count(config)
    gpu = available_gpu(config.device, count)
    if needed <= free and gpu is not None:
        # The least that one GPU can hold: layouts that replicate weights need more, and report it themselves.
        needed, free = element_bytes * base.architecture.num_parameters / count, gpu.free
        where = "the weights on each GPU"
    if needed <= free:
        return True
    report = Report.on_stderr() if config.json else Report()
    report.warn(
        f"logits not compared: {where} need {needed / 1e9:,.0f} GB of memory, {free / 1e9:,.0f} GB are free "
        "(every tensor was compared)"
    )
    return False


def host_memory() -> float:
    """Return the bytes of RAM that are free on this host, within the limit of its container."""
    from mixtral_run.weights.io.disk import available_bytes

    return available_bytes()


@dataclass(frozen=True)
class AvailableGpu:
    """The least that any of a job's GPUs has. total, free: bytes; compute_capability: major and minor number."""

    total: float
    free: float
    compute_capability: tuple[int, int]


# Runs in a process of its own: the query creates a CUDA context on each GPU, which lasts as long as its process.
# -P: the modules next to that file must not hide those of the standard library.
_QUERY = ("-P", str(Path(__file__).with_name("ask_driver.py")))

QUERY_SECONDS = 60.0
"""Longest time that the driver gets to answer. Without its persistence mode it takes seconds for each GPU."""

_started_queries: list[subprocess.Popen[str]] = []


def ask_ahead(config: LaunchConfig) -> None:
    """Start the query that `available_gpu` will need if this host has GPUs, and bring the image's kernels to the cache.

    Call it before importing torch: all of it can run at the same time.
    """
    if config.device != "cpu" and not is_worker() and has_nvidia_driver():
        _started_queries.append(_start_query(config.nproc_per_node or 0))
        # Thousands of small files in the first job. Its processes copy what is missing then. A daemon: a command that
        # a wrong path ends must not wait for them.
        threading.Thread(target=copy_from_image, name="kernels of the image", daemon=True).start()


def has_nvidia_driver() -> bool:
    """Return True if the NVIDIA driver is loaded. Needs no torch."""
    return Path("/dev/nvidiactl").exists()


def _start_query(num_gpus: int) -> subprocess.Popen[str]:
    argv = [sys.executable, *_QUERY, str(num_gpus)]
    # Nobody reads its errors, and a pipe that is full would stop it.
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace")


def _query_result(query: subprocess.Popen[str], num_gpus: int | None = None) -> AvailableGpu | None:
    """Wait until a query has ended. Return None if it failed: the cause is reported when the job first uses the GPU.

    Its contexts end with it: where a GPU takes one process at a time, a job must not start before. A query that does
    not end is killed and reported.
    """
    try:
        answer, _ = query.communicate(timeout=QUERY_SECONDS)
    except subprocess.TimeoutExpired:
        query.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for its driver may not end
            query.communicate(timeout=1)
        # Not to standard output, where a verb may print a JSON document.
        Report(sys.stderr).warn(
            f"The NVIDIA driver did not answer within {QUERY_SECONDS:.0f} s, so memory and compute capability of this "
            "machine's GPUs are not known; nvidia-smi shows whether the driver answers"
        )
        return None
    gpus = _parsed(answer)[:num_gpus] if query.returncode == 0 else []
    if not gpus:
        return None
    total = min(total for _, total, _ in gpus)
    # The querying process has its own context on the GPU while it measures.
    free = min(total, min(free for free, _, _ in gpus) + CONTEXT)
    return AvailableGpu(total, free, min(capability for _, _, capability in gpus))


def _parsed(answer: str) -> list[tuple[int, int, tuple[int, int]]]:
    """Return the answer of `ask_driver.py`, which is the last line that can be one. A driver may print others."""
    for line in reversed(answer.splitlines()):
        try:
            gpus = [
                (int(free), int(total), (int(major), int(minor))) for free, total, (major, minor) in json.loads(line)
            ]
        except (TypeError, ValueError, OverflowError):
            continue
        if gpus:
            return gpus
    return []


@functools.cache
def available_gpu(device: str, num_processes: int) -> AvailableGpu | None:
    """Return the memory of the GPUs of a job of `num_processes` before it starts, or None on a CPU. Cached.

    In a process that torchrun started, `free` is that of its own GPU; `total` and the compute capability are the least
    of all GPUs of the host, so that the ranks of one host agree on them.
    """
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return None
    if is_worker():
        from mixtral_run.model.parallel.mesh import pick_device

        free, total = torch.cuda.mem_get_info(pick_device(device))
        gpus = range(torch.cuda.device_count())
        totals = [torch.cuda.get_device_properties(index).total_memory for index in gpus]
        capability = min(torch.cuda.get_device_capability(index) for index in gpus)
        return AvailableGpu(min(total, *totals), min(total, free + CONTEXT), capability)
    return _query_result(_started_queries.pop() if _started_queries else _start_query(num_processes), num_processes)


def local_gpu() -> AvailableGpu | None:
    """Return the least of this machine's GPUs, or None if its driver names none. Does not import torch.

    A GPU counts even if the installed torch cannot use it: the plan of a run needs no torch, and a run reports such a
    torch itself. Asks the driver in a process of its own, which takes seconds, and only if the driver is loaded.
    """
    return _query_result(_start_query(0)) if has_nvidia_driver() else None
