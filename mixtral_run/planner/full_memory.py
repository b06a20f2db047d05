"""GPU and host memory that full fine-tuning needs in each layout, computed before anything runs.

Standard library and sizes only. Every process holds its weights whole and their gradients; the state of AdamW, 12 bytes
a weight, is shared among the processes that hold the same weights (train/full/sharded_adamw.py), or in host memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from mixtral_run.config.recompute import RUNS_AGAIN
from mixtral_run.planner.memory_model import (
    ANOTHER_GROUP,
    USABLE,
    USABLE_OF_HOST,
    host_bytes,
    memory,
)
from mixtral_run.planner.ranking import layouts, recomputed_rate
from mixtral_run.planner.workload import Layout, Memory, Workload, weight_bytes

STATE_BYTES = 12
"""Bytes per weight of AdamW's state: the fp32 master weight and two moments."""
FULL_ACTIVATIONS = 2
"""Full training saves about twice as much for the backward pass as LoRA: the inputs of all linear layers."""


@dataclass(frozen=True)
class FullChoice:
    """A layout of full fine-tuning. host_bytes: of RAM on each host. fits: True if GPUs and hosts have enough."""

    layout: Layout
    offload: bool
    memory: Memory
    host_bytes: float
    fits: bool


def full_workload(workload: Workload) -> Workload:
    """Return the workload as full training runs it: eager, with the all-to-all dispatch."""
    context = workload.context_parallel_size or 1
    return dataclasses.replace(
        workload, cuda_graphs=False, peer_access=False, expert_chunks=1, context_parallel_size=context
    )


def full_memory(workload: Workload, layout: Layout, *, offload: bool, accumulates: bool) -> Memory:
    """Return the bytes of one GPU at the peak of a step: in the backward pass, or in the update.

    Args:
        workload: of the run.
        layout: of it.
        offload: the optimizer's state is in host memory.
        accumulates: a process adds up the gradients of several micro batches, in fp32.
    """
    workload = full_workload(workload)
    lora = memory(workload, layout)
    experts, dense = local_weights(workload, layout)
    each = 4 if accumulates else workload.weight_bytes
    # With layers behind those that run again, nearly all of the activations are theirs.
    again = layout.recompute in RUNS_AGAIN and layout.recompute_layers is None
    activations = lora.activations * (1 if again else FULL_ACTIVATIONS)
    state = 0.0 if offload else STATE_BYTES * _sharded(workload, layout)
    groups = workload.gpus // layout.expert_model_parallel_size > 1
    return Memory(
        weights=lora.weights,
        adapters=0.0,
        gradients=(experts + dense) * each,
        optimizer=state,
        activations=activations,
        buffers=max(lora.buffers * FULL_ACTIVATIONS, _update_bytes(workload, layout, offload=offload)),
        context=lora.context + groups * ANOTHER_GROUP,
    )


def local_weights(workload: Workload, layout: Layout) -> tuple[float, float]:
    """Return the numbers of weights on one GPU: those of experts, and all others."""
    shape = workload.architecture
    experts = shape.num_layers * shape.num_experts * 3 * shape.hidden_size * shape.ffn_hidden_size
    local = experts / layout.expert_model_parallel_size
    plain = dataclasses.replace(workload, weight_bytes=1, expert_bytes=0)
    return local, weight_bytes(plain, layout)


def _sharded(workload: Workload, layout: Layout) -> float:
    """Return the number of weights whose state one GPU keeps."""
    experts, dense = local_weights(workload, layout)
    replicas = workload.gpus // layout.expert_model_parallel_size
    return experts / replicas + dense / (workload.gpus // layout.tensor_model_parallel_size)


def _update_bytes(workload: Workload, layout: Layout, *, offload: bool) -> float:
    """Return the temporary bytes of reducing and updating the largest weight.

    Its whole gradient in fp32 where ranks sum it, or that of the slice; the slice's state where it is in host memory.
    """
    shape = workload.architecture
    local = shape.num_experts / layout.expert_model_parallel_size
    largest = local * 2 * shape.ffn_hidden_size * shape.hidden_size
    replicas = workload.gpus // layout.expert_model_parallel_size
    reduced = 4 * largest * (1 + 1 / replicas) if replicas > 1 else 0.0
    updated = (4 + (STATE_BYTES if offload else 0)) * largest / replicas + workload.weight_bytes * largest
    return max(reduced, updated)


def full_host_bytes(workload: Workload, layout: Layout, *, offload: bool) -> float:
    """Return the bytes of RAM that a host pins: inputs of layers under --recompute offload, and the state."""
    gpus = min(workload.gpus, workload.gpus_per_host)
    state = STATE_BYTES * _sharded(workload, layout) * gpus if offload else 0.0
    return host_bytes(workload, layout) + state


def full_copy_bytes(workload: Workload, layout: Layout) -> float:
    """Return the bytes of RAM of a host that a save in the background copies: weights, masters and moments.

    One rank of the job writes each weight: with several hosts, one may have all of them.
    """
    gpus = min(workload.gpus, workload.gpus_per_host)
    experts, dense = local_weights(workload, layout)
    on_host = min(workload.architecture.num_parameters, (experts + dense) * gpus)
    # TP has padding, and norms and routers on each rank, which are written once.
    state = min(workload.architecture.num_parameters, _sharded(workload, layout) * gpus)
    return workload.weight_bytes * on_host + STATE_BYTES * state


def full_choices(
    workload: Workload, gpu_memory: float, host_memory: float = math.inf, *, accumulates: bool
) -> list[FullChoice]:
    """Return all layouts with the state on the GPUs and in host memory, the best one that fits first.

    Rows are split over as many ranks (CP) as the workload says; by default they are whole.
    The state on the GPUs comes first: its way from the host and back takes seconds a step. gpu_memory, host_memory:
    bytes of one GPU and of one host's RAM.
    """
    plain = full_workload(workload)
    found = list(_choices(plain, gpu_memory, host_memory, accumulates=accumulates))
    return sorted(
        found,
        key=lambda each: (
            not each.fits,
            each.fits and each.offload,
            each.fits and each.layout.recompute == "offload",
            -_relative_speed(plain, each.layout) if each.fits else 0.0,
            each.memory.total,
        ),
    )


def _relative_speed(workload: Workload, layout: Layout) -> float:
    """Return what ranking.relative_speed does, with the all-to-all dispatch."""
    spread = {1: 1.0, 2: 0.88}.get(layout.expert_model_parallel_size, 0.78)
    recomputed = recomputed_rate(workload, layout)
    return float(spread * recomputed * 0.8 ** (layout.tensor_model_parallel_size.bit_length() - 1))


def _choices(workload: Workload, gpu_memory: float, host_memory: float, *, accumulates: bool) -> Iterator[FullChoice]:
    for layout in layouts(workload, workload.context_parallel_size or 1):
        for offload in (False, True):
            needed = full_memory(workload, layout, offload=offload, accumulates=accumulates)
            pinned = full_host_bytes(workload, layout, offload=offload)
            fits = needed.total <= USABLE * gpu_memory and pinned <= USABLE_OF_HOST * host_memory
            yield FullChoice(layout, offload, needed, pinned, fits)
