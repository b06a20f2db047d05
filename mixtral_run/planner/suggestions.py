"""Changes that make a LoRA run fit. Each is checked with the planner, so that nothing useless is suggested."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from mixtral_run.planner.memory_model import EXPERT_BYTES
from mixtral_run.planner.ranking import ranked
from mixtral_run.planner.workload import Workload

MAX_GPUS = 64
MIN_SEQ_LENGTH = 64
"""Tokens of a sample below which training is of no use."""


def remedies(
    workload: Workload, gpu_memory: float, host_memory: float = math.inf, most_gpus: int = MAX_GPUS
) -> list[str]:
    """Return flags of `plan`, any of which makes the run fit: experts in fewer bits, smaller batches, more GPUs.

    Each kind of change is as small as possible. If no change helps on the given GPUs, experts in the fewest bits are
    combined with the other changes. gpu_memory, host_memory: bytes of one GPU and of one host's RAM. most_gpus: a host
    of the job may have.
    """
    single = _fitting(workload, gpu_memory, host_memory, most_gpus)
    smallest = min(EXPERT_BYTES, key=EXPERT_BYTES.__getitem__)
    if workload.expert_bytes <= EXPERT_BYTES[smallest] or any("--gpus" not in flags for flags in single):
        return single
    narrow = dataclasses.replace(workload, expert_bytes=EXPERT_BYTES[smallest])
    combined = [flags for flags in _fitting(narrow, gpu_memory, host_memory, most_gpus) if flags not in single]
    return [*(f"--base-precision {smallest} {flags}" for flags in combined), *single]


def _fitting(workload: Workload, gpu_memory: float, host_memory: float, most_gpus: int) -> list[str]:
    found = []
    more = _more_gpus(workload, most_gpus)
    for changes in (_precisions(workload), _micro_batches(workload), _lengths(workload), more):
        fitting = (flags for flags, each in changes if _fits(each, gpu_memory, host_memory))
        found += [flags for flags in [next(fitting, None)] if flags is not None]
    return found


def _fits(workload: Workload, gpu_memory: float, host_memory: float) -> bool:
    return any(each.fits for each in ranked(workload, gpu_memory, host_memory)[:1])


def _precisions(workload: Workload) -> Iterator[tuple[str, Workload]]:
    for name, size in sorted(EXPERT_BYTES.items(), key=lambda item: -item[1]):
        if size < workload.expert_bytes:
            yield f"--base-precision {name}", dataclasses.replace(workload, expert_bytes=size)


def _micro_batches(workload: Workload) -> Iterator[tuple[str, Workload]]:
    size = workload.micro_batch_size
    while (size := size // 2) >= 1:
        yield f"--micro-batch-size {size}", dataclasses.replace(workload, micro_batch_size=size)


def _lengths(workload: Workload) -> Iterator[tuple[str, Workload]]:
    length = workload.seq_length
    while (length := length // 2) >= MIN_SEQ_LENGTH:
        yield f"--seq-length {length}", dataclasses.replace(workload, seq_length=length)


def _more_gpus(workload: Workload, most: int = MAX_GPUS) -> Iterator[tuple[str, Workload]]:
    gpus = 1
    while (gpus := 2 * gpus) <= most:
        if gpus > workload.gpus:
            yield f"--gpus {gpus}", dataclasses.replace(workload, gpus=gpus)
