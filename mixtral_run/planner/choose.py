"""The planner's decisions for a run on the available GPUs: layout, recomputation, and whether it fits."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

from mixtral_run.config.fields import SETTINGS_ERROR
from mixtral_run.config.launch import CONVERTED_LAYOUT, LaunchConfig
from mixtral_run.config.lora import LORA_SHAPE
from mixtral_run.config.precision import StoredBaseConfig
from mixtral_run.config.recompute import RECOMPUTE, RUNS_AGAIN
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.generate import InferenceConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig, TrainingConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.launch import processes
from mixtral_run.planner.available import AvailableGpu, available_gpu, host_memory
from mixtral_run.planner.full_plan import full_memory_error, settled_full
from mixtral_run.planner.memory_model import EXPERT_BYTES, USABLE, USABLE_OF_HOST, fit_dispatch, host_bytes, memory
from mixtral_run.planner.ranking import Choice, eight_bit_problems, ranked
from mixtral_run.planner.spread import allows, held_bytes, needed_bytes, spread_layout
from mixtral_run.planner.suggestions import remedies
from mixtral_run.planner.workload import GIB, Layout, Workload
from mixtral_run.terminal.report import Report
from mixtral_run.weights.manifest.describe import BaseDescription, describe_base

PLANNED_FLAGS = {"load", "method", "base_precision", "attention_precision", "kernels", *LORA_SHAPE}
"""Settings that the command of `plan` in an error repeats."""
JobConfigT = TypeVar("JobConfigT", bound=TrainingConfig | InferenceConfig)


def settled(config: JobConfigT, base: BaseDescription | None = None) -> JobConfigT:
    """Return the config with the settings that are left to the planner: TP and EP, and --recompute of a LoRA run.

    LoRA on GPUs gets the fastest layout that fits by the memory model, everything else the layout of spread.py. Given
    settings are kept. What was chosen is printed in one line, by the first process. Processes that this program started
    get a config that is settled already.

    Args:
        config: the settings as given.
        base: the description of --load if it is known already; then nothing is printed.

    Raises:
        ConfigError: No layout of a LoRA run fits, and none was given.
    """
    config = _without_former_setting(config)
    if config.has_layout and not _leaves_memory_open(config):
        return config
    say = _report_of(config).say if base is None else Report.silent().say
    try:
        base = base or describe_base(config.load)
    except WeightsError:
        # The checks that follow report this together with all other problems.
        return config
    world_size = processes.process_count(config)
    gpu = available_gpu(config.device, world_size)
    if isinstance(config, FinetuneConfig) and gpu is not None:
        return cast(JobConfigT, _settled_lora(config, base, world_size, gpu, say))
    if isinstance(config, PretrainConfig) and config.uses_adamw and gpu is not None:
        workload = job_workload(config, base, world_size, gpu.compute_capability)
        return cast(JobConfigT, settled_full(config, workload, gpu, say))
    recompute = config.recomputation if isinstance(config, TrainingConfig) else "none"
    if gpu is None:
        layout = spread_layout(config, base.architecture, world_size, recompute)
    else:
        workload = job_workload(config, base, world_size, gpu.compute_capability)

        def fits(layout: Layout) -> bool:
            return needed_bytes(config, workload, layout) <= USABLE * gpu.total

        layout = spread_layout(config, base.architecture, world_size, recompute, fits)
    if not config.has_layout and not (
        world_size % layout.ranks_of_a_row or world_size % layout.expert_model_parallel_size
    ):
        count = "1 process" if world_size == 1 else f"{world_size} processes"
        say(f"Layout: {layout} for {count}, chosen by the planner")
    return _with_layout(config, layout)


def _settled_lora(
    config: FinetuneConfig, base: BaseDescription, world_size: int, gpu: AvailableGpu, say: Callable[[str], None]
) -> FinetuneConfig:
    candidates = _candidates(config, base, world_size, gpu)
    fitting = [each for each in candidates if each.fits]
    if not candidates and not config.has_layout and config.attention_precision == "fp8":
        plain = _candidates(dataclasses.replace(config, attention_precision="bf16"), base, world_size, gpu)
        otherwise = {each.layout.tensor_model_parallel_size for each in plain}
        if problems := eight_bit_problems(workload_of(config, base, world_size, gpu.compute_capability), otherwise):
            next_command = "the same command without --attention-precision"
            raise ConfigError(SETTINGS_ERROR, problems=problems, next_command=next_command)
    if not fitting and not config.has_layout:
        raise _refusal(config, base, world_size, gpu, "every layout", candidates)
    if not fitting:
        # `memory_error` reports it; the smallest one comes first if none fits.
        smallest = _layout_of(config) if _has_recompute(config) else Layout(*config.layout_sizes, RECOMPUTE[-1])
        return _with_layout(config, candidates[0].layout if candidates else smallest)
    chosen, pinned = fitting[0].layout, fitting[0].host_bytes
    say(
        f"Plan: {chosen}, recompute {chosen.recompute}"
        + (f" in {chosen.recompute_layers} layers" if chosen.recompute_layers is not None else "")
        + (f", experts in {chosen.expert_chunks} chunks" if chosen.expert_chunks > 1 else "")
        + f": {fitting[0].memory.total / GIB:.1f} of "
        f"{gpu.total / GIB:.1f} GiB a GPU" + (f", {pinned / GIB:.1f} GiB of host RAM" if pinned else "")
    )
    return _with_layout(config, chosen)


def _without_former_setting(config: JobConfigT) -> JobConfigT:
    """Return the config without --layout, which earlier versions had: auto ignored TP and EP, given had TP2/EP4."""
    if not isinstance(config, FinetuneConfig) or config.layout is None:
        return config
    tp, ep = (None, None) if config.layout == "auto" else CONVERTED_LAYOUT
    if config.layout == "given":
        tp, ep = config.tensor_model_parallel_size or tp, config.expert_model_parallel_size or ep
    return dataclasses.replace(config, layout=None, tensor_model_parallel_size=tp, expert_model_parallel_size=ep)


def _with_layout(config: JobConfigT, layout: Layout) -> JobConfigT:
    settings = dataclasses.asdict(layout)
    if not isinstance(config, FinetuneConfig):
        for name in ("recompute", "context_parallel_size", "expert_chunks", "recompute_layers"):
            del settings[name]
    elif config.expert_chunks is not None:
        settings["expert_chunks"] = config.expert_chunks
    return dataclasses.replace(config, **settings)


def _report_of(config: LaunchConfig) -> Report:
    if processes.rank() != 0:
        return Report.silent()
    return Report.on_stderr() if getattr(config, "json", False) else Report()


def memory_error(config: FinetuneConfig, base: BaseDescription, world_size: int) -> ConfigError | None:
    """Return the error of a run that cannot fit on its GPUs, which names the best layout that can.

    Return None if the run fits, or runs on a CPU.
    """
    if not config.has_layout or base.architecture.layout_problems(*config.layout_sizes):
        return None
    gpu = available_gpu(config.device, world_size)
    if gpu is None:
        return None
    layout = dataclasses.replace(_layout_of(config), recompute=config.recomputation)
    workload = workload_of(config, base, world_size, gpu.compute_capability)
    if memory(fit_dispatch(workload, layout, gpu.free), layout).total <= gpu.free:
        return _host_refusal(config, workload, layout, gpu)
    anything = dataclasses.replace(
        config,
        tensor_model_parallel_size=None,
        expert_model_parallel_size=None,
        context_parallel_size=None,
        recompute=None,
        recompute_activations=False,
        recompute_layers=None,
        expert_chunks=None,
    )
    found = f"{layout}, --recompute {layout.recompute}"
    return _refusal(config, base, world_size, gpu, found, _candidates(anything, base, world_size, gpu))


def training_memory_error(config: TrainingConfig, base: BaseDescription, world_size: int) -> ConfigError | None:
    """Return the error of a training that cannot fit on its GPUs; None if it fits, or runs on a CPU."""
    if isinstance(config, FinetuneConfig):
        return memory_error(config, base, world_size)
    if not isinstance(config, PretrainConfig) or not config.uses_adamw:
        return None
    gpu = available_gpu(config.device, world_size)
    if gpu is None or (config.has_layout and base.architecture.layout_problems(*config.layout_sizes)):
        return None
    return full_memory_error(config, job_workload(config, base, world_size, gpu.compute_capability), gpu)


def inference_memory_error(config: InferenceConfig, base: BaseDescription, world_size: int) -> ConfigError | None:
    """Return the error of a model whose weights alone do not fit on its GPUs, before they are read.

    Return None if they fit, or are held by a CPU.
    """
    if not config.has_layout or base.architecture.layout_problems(*config.layout_sizes):
        return None
    gpu = available_gpu(config.device, world_size)
    if gpu is None:
        return None
    workload = job_workload(config, base, world_size, gpu.compute_capability)
    layout = Layout(*config.layout_sizes, "none")
    needed = held_bytes(workload, layout)
    if needed <= gpu.free:
        return None
    changes = []
    if isinstance(config, StoredBaseConfig):
        smaller = ((name, dataclasses.replace(workload, expert_bytes=size)) for name, size in EXPERT_BYTES.items())
        changes = [f"--base-precision {name}" for name, each in smaller if held_bytes(each, layout) <= gpu.free][:1]
    return ConfigError(
        "The model does not fit on these GPUs.",
        where=f"{layout}, {world_size} GPU" + ("s" if world_size > 1 else ""),
        expected=f"at most {gpu.free / GIB:.1f} GiB a GPU, free of a total of {gpu.total / GIB:.1f}",
        found=f"{needed / GIB:.1f} GiB of weights and libraries",
        next_command=" or ".join([*changes, "more GPUs, with a larger --expert-model-parallel-size"]),
    )


def peer_access_fits(
    config: FinetuneConfig, base: BaseDescription, world_size: int, usable: float, capability: tuple[int, int]
) -> bool:
    """Return True if the buffers for reading rows from other GPUs fit.

    Args:
        config: the settled settings.
        base: the checkpoint.
        world_size: ranks of the job.
        usable: bytes of a GPU that the process may take, next to the memory that the driver and NCCL hold.
        capability: compute capability of the GPU.
    """
    layout = dataclasses.replace(_layout_of(config), recompute=config.recomputation)
    workload = workload_of(config, base, world_size, capability)
    return fit_dispatch(workload, layout, usable + memory(workload, layout).context).peer_access


def job_workload(config: LaunchConfig, base: BaseDescription, world_size: int, capability: tuple[int, int]) -> Workload:
    """Return the model and the batch of a job without LoRA. capability: compute capability of the GPUs."""
    whole = weight_bytes_each(config, base)
    batch: dict[str, Any] = {}
    if isinstance(config, TrainingConfig):
        batch = {"seq_length": config.seq_length, "micro_batch_size": config.micro_batch_size}
        batch |= {"context_parallel_size": config.context_size, "recompute_layers": config.recompute_layers}
    experts = EXPERT_BYTES.get(config.base_precision, whole) if isinstance(config, StoredBaseConfig) else whole
    return Workload(
        architecture=base.architecture,
        gpus=world_size,
        weight_bytes=whole,
        expert_bytes=experts,
        gpus_per_host=processes.host_process_count(world_size),
        compute_capability=capability,
        kernels=config.kernels,
        **batch,
    )


def weight_bytes_each(config: LaunchConfig, base: BaseDescription) -> int:
    """Return the bytes of a weight in the dtype of the model."""
    return 4 if config.dtype == "fp32" or (config.dtype == "auto" and base.dtype == "float32") else 2


def workload_of(
    config: FinetuneConfig, base: BaseDescription, world_size: int, capability: tuple[int, int]
) -> Workload:
    """Return the run as the memory model sees it. capability: compute capability of the GPUs."""
    whole = weight_bytes_each(config, base)
    return Workload(
        architecture=base.architecture,
        gpus=world_size,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        rows_per_sample=config.rows_per_sample,
        **{name: getattr(config, name) for name in LORA_SHAPE},
        weight_bytes=whole,
        expert_bytes=EXPERT_BYTES.get(config.base_precision, whole),
        attention_precision=config.attention_precision,
        gpus_per_host=processes.host_process_count(world_size),
        compute_capability=capability,
        kernels=config.kernels,
        cuda_graphs=config.cuda_graphs,
        # Passes without gradients of align are those of an evaluation.
        has_validation=config.has_validation or (isinstance(config, AlignConfig) and config.has_reference),
        context_parallel_size=config.planned_context_size,
        expert_chunks=config.expert_chunks,
        recompute_layers=config.recompute_layers,
    )


def _has_recompute(config: LaunchConfig) -> bool:
    if not isinstance(config, TrainingConfig):
        return False

    return config.recompute_activations or config.recompute is not None


def _leaves_memory_open(config: LaunchConfig) -> bool:
    """Return True if the planner chooses the recomputation, or whether the experts compute in chunks."""
    if isinstance(config, FinetuneConfig):
        return not _has_recompute(config) or (config.expert_chunks is None and config.recomputation in RUNS_AGAIN)
    return isinstance(config, PretrainConfig) and config.uses_adamw and not _has_recompute(config)


def _layout_of(config: FinetuneConfig) -> Layout:
    chunks = config.expert_chunks or 1
    return Layout(*config.layout_sizes, config.recomputation, config.context_size, chunks, config.recompute_layers)


def _candidates(config: FinetuneConfig, base: BaseDescription, world_size: int, gpu: AvailableGpu) -> list[Choice]:
    """Return the layouts that this run may use, in the planner's order."""
    given = _has_recompute(config)
    recompute = (config.recomputation,) if given else RECOMPUTE
    # All ranks must decide alike, and their free memory may differ.
    if processes.is_worker():
        available, host = gpu.total, math.inf
    else:
        available, host = min(gpu.total, gpu.free / USABLE), host_memory()
    choices = ranked(workload_of(config, base, world_size, gpu.compute_capability), available, host)
    return [
        each
        for each in choices
        if each.layout.recompute in recompute
        and (not given or each.layout.recompute_layers == config.recompute_layers)
        and config.tensor_model_parallel_size in (None, each.layout.tensor_model_parallel_size)
        and config.expert_model_parallel_size in (None, each.layout.expert_model_parallel_size)
        and allows(config, each.layout, world_size)
    ]


def _host_refusal(config: FinetuneConfig, workload: Workload, layout: Layout, gpu: AvailableGpu) -> ConfigError | None:
    """Return the error of a run whose layers' inputs do not fit into the host's RAM; None if they fit."""
    pinned, free = host_bytes(workload, layout), host_memory()
    usable = USABLE_OF_HOST * free
    if pinned <= usable:
        return None
    return ConfigError(
        "The run does not fit into this host's RAM.",
        where=f"{layout}, --recompute {layout.recompute}, seq {workload.seq_length:,} × {workload.micro_batch_size}",
        expected=f"at most {usable / GIB:.1f} GiB, {USABLE_OF_HOST:.0%} of the {free / GIB:.1f} GiB that are free",
        found=f"{pinned / GIB:.1f} GiB for the layers' inputs on {min(workload.gpus, workload.gpus_per_host)} GPUs",
        next_command=f"mixtral-run plan --gpus {workload.gpus} --gpu-memory {gpu.total / GIB:.0f} "
        f"--host-memory {free / GIB:.0f} "
        f"--seq-length {workload.seq_length} --micro-batch-size {workload.micro_batch_size}"
        f"{_planned_flags(config)} --all",
    )


def _planned_flags(config: FinetuneConfig) -> str:
    """Return the settings of a run that `plan` needs as well, each with a space in front."""
    return " ".join(["", *config.flags(PLANNED_FLAGS)])


def _refusal(
    config: FinetuneConfig, base: BaseDescription, world_size: int, gpu: AvailableGpu, tried: str, choices: list[Choice]
) -> ConfigError:
    """Return the error of a run that does not fit: its largest parts, and what fits instead. tried: the layout."""
    workload = workload_of(config, base, world_size, gpu.compute_capability)
    if config.has_layout:
        layout = _layout_of(config)
    else:
        # The smallest one comes first if none fits.
        layout = choices[0].layout if choices else Layout(1, 1, config.recomputation, config.context_size)
    parts = dataclasses.asdict(memory(fit_dispatch(workload, layout, gpu.free), layout))
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    fitting = [each for each in choices if each.fits]
    plan = (
        f"mixtral-run plan --gpus {world_size} --gpu-memory {gpu.total / GIB:.0f} --seq-length {config.seq_length} "
        f"--micro-batch-size {config.micro_batch_size}{_planned_flags(config)} --all"
    )
    changes = [
        re.sub(r" ?--gpus (\d+)", r" on \1 GPUs", flags).strip()
        for flags in ([] if fitting else remedies(workload, gpu.free / USABLE))
    ]
    return ConfigError(
        "The run does not fit on these GPUs.",
        where=f"{tried}, seq {config.seq_length:,} × {config.micro_batch_size}, {world_size} GPUs",
        expected=f"at most {gpu.free / GIB:.1f} GiB a GPU, free of a total of {gpu.total / GIB:.1f}",
        found=f"{sum(parts.values()) / GIB:.1f} GiB with {layout}: "
        + ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest),
        next_command=f"mixtral-run {config.VERB} … {fitting[0].layout.flags()}"
        if fitting
        else f"{plan}; no layout fits on these GPUs" + (f", but {' or '.join(changes)}" if changes else ""),
    )
