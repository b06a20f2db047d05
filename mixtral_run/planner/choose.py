"""What the plan decides for a run on the GPUs at hand: its layout, how much is computed again, whether it fits."""

from __future__ import annotations

import dataclasses
import math
import re

from mixtral_run.config.verbs import RECOMPUTE, FinetuneConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.launch import processes
from mixtral_run.planner.available import GpuMemory, gpu_memory, host_memory
from mixtral_run.planner.memory_model import (
    EXPERT_BYTES,
    GIB,
    USABLE,
    USABLE_OF_HOST,
    Choice,
    Layout,
    Workload,
    host_bytes,
    memory,
    ranked,
    within,
)
from mixtral_run.planner.suggestions import remedies
from mixtral_run.report import Report
from mixtral_run.weights.manifest.describe import BaseDescription, describe_base


def settled(config: FinetuneConfig, base: BaseDescription | None = None) -> FinetuneConfig:
    """The config with what was left to the plan: --layout auto, and --recompute where none was given.

    base: what --load is, where it is known already; then nothing is said.

    On a CPU: EP over all processes, nothing computed again. Processes that this program started get a settled one.
    Raises ConfigError when --layout auto finds none that fits.
    """
    if processes.is_ours() or (config.layout != "auto" and _recompute_given(config)):
        return config
    quiet = base is not None
    try:
        base = base or describe_base(config.load)
    except WeightsError:
        # The checks that follow tell this with all else that is wrong.
        return config
    world_size = processes.process_count(config)
    gpu = gpu_memory(config.device, world_size)
    if gpu is None:
        return _settled_on_cpu(config, base, world_size)
    candidates = _candidates(config, base, world_size, gpu)
    fitting = [each for each in candidates if each.fits]
    if not fitting and config.layout == "auto":
        raise _refusal(config, base, world_size, gpu, "auto", candidates)
    # Where the layout is given and nothing fits, `memory_error` says so.
    chosen = fitting[0].layout if fitting else dataclasses.replace(_given(config), recompute=RECOMPUTE[-1])
    if fitting and processes.rank() == 0 and not quiet:
        pinned = fitting[0].host_bytes
        Report().say(
            f"Plan: {chosen}, recompute {chosen.recompute}: {fitting[0].memory.total / GIB:.1f} of "
            f"{gpu.total / GIB:.1f} GiB a GPU" + (f", {pinned / GIB:.1f} GiB of host RAM" if pinned else "")
        )
    return dataclasses.replace(config, layout="given", **dataclasses.asdict(chosen))


def memory_error(config: FinetuneConfig, base: BaseDescription, world_size: int) -> ConfigError | None:
    """What to tell when the run cannot fit on these GPUs, with the best that can; None when it can, or on a CPU."""
    if processes.is_ours() or base.architecture.layout_problems(*_sizes(config)):
        return None
    gpu = gpu_memory(config.device, world_size)
    if gpu is None:
        return None
    layout = dataclasses.replace(_given(config), recompute=config.recomputation)
    workload = workload_of(config, base, world_size)
    if memory(within(workload, layout, gpu.free), layout).total <= gpu.free:
        return _host_refusal(workload, layout)
    anything = dataclasses.replace(config, layout="auto", recompute=None, recompute_activations=False)
    found = f"{layout}, --recompute {layout.recompute}"
    return _refusal(config, base, world_size, gpu, found, _candidates(anything, base, world_size, gpu))


def reads_fit(config: FinetuneConfig, base: BaseDescription, world_size: int, usable: float) -> bool:
    """Whether so many bytes, beside what the driver and NCCL hold, are enough for reading rows from other GPUs."""
    layout = dataclasses.replace(_given(config), recompute=config.recomputation)
    workload = workload_of(config, base, world_size)
    return within(workload, layout, usable + memory(workload, layout).context).reads


def workload_of(config: FinetuneConfig, base: BaseDescription, world_size: int) -> Workload:
    """The run as the plan sees it."""
    whole = 4 if config.dtype == "fp32" or (config.dtype == "auto" and base.dtype == "float32") else 2
    return Workload(
        architecture=base.architecture,
        gpus=world_size,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        lora_rank=config.lora_rank,
        lora_dropout=config.lora_dropout,
        lora_target_modules=config.lora_target_modules,
        weight_bytes=whole,
        expert_bytes=EXPERT_BYTES.get(config.base_precision, whole),
        gpus_per_host=processes.host_process_count(world_size),
        recorded=config.cuda_graphs,
        validates=config.valid_data_path is not None,
    )


def _recompute_given(config: FinetuneConfig) -> bool:
    return config.recompute_activations or config.recompute is not None


def _sizes(config: FinetuneConfig) -> tuple[int, int]:
    return config.tensor_model_parallel_size, config.expert_model_parallel_size


def _given(config: FinetuneConfig) -> Layout:
    return Layout(*_sizes(config), config.recomputation)


def _settled_on_cpu(config: FinetuneConfig, base: BaseDescription, world_size: int) -> FinetuneConfig:
    config = dataclasses.replace(config, recompute=config.recomputation)
    if config.layout != "auto":
        return config
    return dataclasses.replace(
        config,
        layout="given",
        tensor_model_parallel_size=1,
        expert_model_parallel_size=math.gcd(world_size, base.architecture.num_experts),
    )


def _candidates(config: FinetuneConfig, base: BaseDescription, world_size: int, gpu: GpuMemory) -> list[Choice]:
    """The layouts that this run may take, in the plan's order."""
    recompute = (config.recomputation,) if _recompute_given(config) else RECOMPUTE
    # All processes must come to the same, and what is free may differ from one to the next.
    if processes.is_worker():
        available, host = gpu.total, math.inf
    else:
        available, host = min(gpu.total, gpu.free / USABLE), host_memory()
    choices = ranked(workload_of(config, base, world_size), available, host)
    return [
        each
        for each in choices
        if each.layout.recompute in recompute
        and (config.layout == "auto" or str(each.layout) == str(_given(config)))
        # Each data-parallel replica takes the same number of micro batches.
        and config.global_batch_size * each.layout.tensor_model_parallel_size % (config.micro_batch_size * world_size)
        == 0
    ]


def _host_refusal(workload: Workload, layout: Layout) -> ConfigError | None:
    """What to tell when the host's RAM does not hold what the run puts there; None when it does."""
    pinned, free = host_bytes(workload, layout), host_memory()
    usable = USABLE_OF_HOST * free
    if pinned <= usable:
        return None
    return ConfigError(
        "The run does not fit into this host's RAM.",
        where=f"{layout}, --recompute {layout.recompute}, seq {workload.seq_length:,} × {workload.micro_batch_size}",
        expected=f"at most {usable / GIB:.1f} GiB, {USABLE_OF_HOST:.0%} of the {free / GIB:.1f} that are free",
        found=f"{pinned / GIB:.1f} GiB for the layers' inputs on {min(workload.gpus, workload.gpus_per_host)} GPUs",
        next_command=f"mixtral-run plan --gpus {workload.gpus} --gpu-memory … --host-memory {free / GIB:.0f} "
        f"--seq-length {workload.seq_length} --micro-batch-size {workload.micro_batch_size} --all",
    )


def _refusal(
    config: FinetuneConfig, base: BaseDescription, world_size: int, gpu: GpuMemory, asked: str, choices: list[Choice]
) -> ConfigError:
    layout = _given(config)
    parts = dataclasses.asdict(memory(within(workload_of(config, base, world_size), layout, gpu.free), layout))
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    fitting = [each for each in choices if each.fits]
    plan = (
        f"mixtral-run plan --gpus {world_size} --gpu-memory {gpu.total / GIB:.0f} --seq-length {config.seq_length} "
        f"--micro-batch-size {config.micro_batch_size} --all"
    )
    ways = [
        re.sub(r" ?--gpus (\d+)", r" on \1 GPUs", flags).strip()
        for flags in ([] if fitting else remedies(workload_of(config, base, world_size), gpu.free / USABLE))
    ]
    return ConfigError(
        "The run does not fit on these GPUs.",
        where=f"{asked}, seq {config.seq_length:,} × {config.micro_batch_size}, {world_size} GPUs",
        expected=f"at most {gpu.free / GIB:.1f} GiB a GPU, which are free of {gpu.total / GIB:.1f}",
        found=f"{sum(parts.values()) / GIB:.1f} GiB with {layout}: "
        + ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest),
        next_command=f"mixtral-run finetune … {fitting[0].layout.flags()}"
        if fitting
        else f"{plan}; no layout fits on these GPUs" + (f", but {' or '.join(ways)}" if ways else ""),
    )
