"""The planner's decisions for full fine-tuning with AdamW: layout, recomputation, and whether it fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.errors import ConfigError
from mixtral_run.launch import processes
from mixtral_run.planner.available import AvailableGpu, host_memory
from mixtral_run.planner.full_memory import FullChoice, full_choices, full_host_bytes, full_memory
from mixtral_run.planner.memory_model import USABLE_OF_HOST
from mixtral_run.planner.spread import allows
from mixtral_run.planner.workload import GIB, Layout, Workload


def settled_full(
    config: PretrainConfig, workload: Workload, gpu: AvailableGpu, say: Callable[[str], None]
) -> PretrainConfig:
    """Return the config with the layout and --recompute that are left to the planner: the best ones that fit.

    Without one that fits, the config stays as it is; `full_memory_error` reports it.
    """
    found = [each for each in _candidates(config, workload, gpu) if each.fits]
    if not found:
        return config
    chosen = found[0]
    layout, pinned = chosen.layout, chosen.host_bytes
    say(
        f"Plan: {layout}, recompute {layout.recompute}: {chosen.memory.total / GIB:.1f} of {gpu.total / GIB:.1f} GiB a "
        "GPU" + (f", {pinned / GIB:.1f} GiB of host RAM" if pinned else "")
    )
    return dataclasses.replace(
        config,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        recompute=None if config.recompute_activations else layout.recompute,
    )


def full_memory_error(config: PretrainConfig, workload: Workload, gpu: AvailableGpu) -> ConfigError | None:
    """Return the error of a run that cannot fit, which names what can; None if it fits."""
    offload = config.offload_optimizer
    if config.has_layout:
        layout = Layout(
            *config.layout_sizes, config.recomputation, config.context_size, recompute_layers=config.recompute_layers
        )
        accumulates = _accumulates(config, workload, layout)
        needed = full_memory(workload, layout, offload=offload, accumulates=accumulates).total
        pinned, free = full_host_bytes(workload, layout, offload=offload), host_memory()
        if needed <= gpu.free and pinned <= USABLE_OF_HOST * free:
            return None
        found = (
            f"{needed / GIB:.1f} GiB with {layout}, --recompute {layout.recompute}, and {pinned / GIB:.1f} GiB of the "
            "host's RAM"
        )
    else:
        found = "no layout that fits"
    anything = dataclasses.replace(
        config,
        tensor_model_parallel_size=None,
        expert_model_parallel_size=None,
        recompute=None,
        recompute_activations=False,
        recompute_layers=None,
    )
    without = dataclasses.replace(workload, recompute_layers=None)
    others = [
        each
        for context in _contexts(config, workload)
        for offloads in (offload, True)
        for each in _candidates(
            dataclasses.replace(anything, offload_optimizer=offloads, context_parallel_size=context),
            dataclasses.replace(without, context_parallel_size=context),
            gpu,
        )
        if each.fits
    ]
    kept = config.flags({"load", "context_parallel_size", "kernels"})
    plan = (
        f"mixtral-run plan --full --gpus {2 * workload.gpus} --gpu-memory {gpu.total / GIB:.0f} --seq-length "
        f"{config.seq_length} --micro-batch-size {config.micro_batch_size}"
    )
    more = f"{' '.join([plan, *kept])}, for more GPUs; or LoRA, with mixtral-run finetune"
    if others:
        more = others[0].layout.flags() + (" --offload-optimizer" if others[0].offload else "")
    return ConfigError(
        "Full fine-tuning does not fit.",
        expected=f"at most {gpu.free / GIB:.1f} GiB a GPU, and {USABLE_OF_HOST:.0%} of the "
        f"{host_memory() / GIB:.1f} GiB of RAM that are free",
        found=found,
        next_command=more,
    )


def _contexts(config: PretrainConfig, workload: Workload) -> list[int]:
    """Return the sizes of CP that another layout may have: the given one first, then all that the run allows."""
    if config.needs_whole_rows is not None:
        return [1]
    return [config.context_size, *(each for each in range(1, workload.gpus + 1) if workload.gpus % each == 0)]


def _candidates(config: PretrainConfig, workload: Workload, gpu: AvailableGpu) -> list[FullChoice]:
    """Return the layouts that this run may use, in the planner's order."""
    given = config.recompute_activations or config.recompute is not None
    found = []
    # All ranks must decide alike, and their free memory may differ.
    host = math.inf if processes.is_worker() else host_memory()
    for accumulates in (True, False):
        for each in full_choices(workload, gpu.total, host, accumulates=accumulates):
            layout = each.layout
            if (
                each.offload == config.offload_optimizer
                and (not given or layout.recompute == config.recomputation)
                and config.tensor_model_parallel_size in (None, layout.tensor_model_parallel_size)
                and config.expert_model_parallel_size in (None, layout.expert_model_parallel_size)
                and allows(config, layout, workload.gpus)
                and accumulates == _accumulates(config, workload, layout)
            ):
                found.append(each)
    # False comes first: what fits.
    return sorted(found, key=lambda each: not each.fits)


def _accumulates(config: PretrainConfig, workload: Workload, layout: Layout) -> bool:
    """Return True if a process adds up several micro batches, in fp32."""
    replicas = max(1, workload.gpus // layout.ranks_of_a_row)
    return config.global_batch_size > config.micro_batch_size * replicas and workload.weight_bytes < 4
