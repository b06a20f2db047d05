"""How much memory a job needs, next to what there is."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.verbs import LaunchConfig, VerifyConfig
from mixtral_run.launch.processes import is_worker, process_count
from mixtral_run.planner.memory_model import CONTEXT
from mixtral_run.report import Report
from mixtral_run.weights.manifest.describe import describe_base

BYTES = {"bf16": 2, "fp32": 4}


def logits_fit(config: VerifyConfig) -> bool:
    """Whether both models of the logits comparison fit into memory; says so where they do not."""
    import psutil

    base = describe_base(config.load)
    each = BYTES.get(config.dtype, 2 if base.dtype != "float32" else 4)
    # HF's model lies in RAM in any case; ours beside it, unless it is on the GPUs. A fifth more for activations.
    needed = 1.2 * 2 * each * base.architecture.num_parameters
    free: float = psutil.virtual_memory().available
    where = "both models"
    count = process_count(config)
    gpu = gpu_memory(config.device, count)
    if needed <= free and gpu is not None:
        # The least that a GPU can hold of it: layouts that repeat weights take more, and say so themselves.
        where, needed, free = "the weights on each GPU", each * base.architecture.num_parameters / count, gpu.free
    if needed <= free:
        return True
    report = Report.on_stderr() if config.json else Report()
    report.warn(
        f"logits not compared: {where} need {needed / 1e9:,.0f} GB of memory, {free / 1e9:,.0f} GB are free "
        "(every tensor was compared)"
    )
    return False


def host_memory() -> float:
    """Bytes of RAM that are free on this host, within its container's limit."""
    from mixtral_run.weights.io.disk import available_bytes

    return available_bytes()


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU: the least among those that a job uses."""

    total: float
    free: float


# In a process of its own: asking makes a CUDA context, which would stay on every GPU as long as the asking process.
_ASK = """
import json, sys, torch
count = min(int(sys.argv[1]) or sys.maxsize, torch.cuda.device_count())
print(json.dumps([torch.cuda.mem_get_info(index) for index in range(count)]))
"""

_asked_ahead: list[subprocess.Popen[str]] = []


def ask_ahead(config: LaunchConfig) -> None:
    """Begin to ask the GPUs of the job what `gpu_memory` will tell, where this host has any.

    To be called before torch is imported here: both take seconds, and can take them at the same time.
    """
    if config.device != "cpu" and not is_worker() and Path("/dev/nvidiactl").exists():
        _asked_ahead.append(_ask(config.nproc_per_node or 0))


def _ask(num_gpus: int) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", _ASK, str(num_gpus)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@functools.cache
def gpu_memory(device: str, num_processes: int) -> GpuMemory | None:
    """What the GPUs of a job of `num_processes` have, before it starts; None where it runs on the CPU. Asked once.

    In a process that torchrun started, `free` is of its own GPU and `total` the least of all here, so that the
    processes of one host agree on it.
    """
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return None
    if is_worker():
        from mixtral_run.model.parallel.mesh import pick_device

        free, total = torch.cuda.mem_get_info(pick_device(device))
        totals = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return GpuMemory(min(total, *totals), min(total, free + CONTEXT))
    asked = _asked_ahead.pop() if _asked_ahead else _ask(num_processes)
    answer, _ = asked.communicate()
    # What is wrong with a GPU that cannot say this is told where the job first uses it.
    if asked.returncode != 0:
        return None
    pairs = json.loads(answer.splitlines()[-1])[:num_processes]
    # Each figure was taken with the asking process's own context on the GPU.
    total = min(total for _, total in pairs)
    return GpuMemory(total, min(total, min(free for free, _ in pairs) + CONTEXT))
