"""`mixtral-run plan`: the table of all layouts with their memory and speed, or the same as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.fields import SETTINGS_ERROR
from mixtral_run.config.gpus import DEFAULT_MEMORY_GIB, GPU_MODELS, GPUS_PER_HOST, HOPPER
from mixtral_run.config.lora import LORA_SHAPE
from mixtral_run.config.verbs.align import WITH_REFERENCE, rows_per_sample
from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.model.kernels.requirements import kernel_problems
from mixtral_run.planner.available import local_gpu
from mixtral_run.planner.full_table import show_full_plan
from mixtral_run.planner.memory_model import EXPERT_BYTES, USABLE, USABLE_OF_HOST, saved_copy_bytes
from mixtral_run.planner.ranking import Choice, eight_bit_problems, faster_micro_batch, ranked, tensor_sizes
from mixtral_run.planner.scaling_table import scaling, show_scaling
from mixtral_run.planner.suggestions import MAX_GPUS, remedies
from mixtral_run.planner.workload import GIB, Workload
from mixtral_run.terminal.report import Report, json_document
from mixtral_run.weights.hf.hub import HubModel, ask, is_on_hub, resolve
from mixtral_run.weights.manifest.describe import BaseDescription, describe_base

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "buffers", "context")
SHORT_PARTS = {
    "weights": ("weights",),
    "LoRA": ("adapters", "gradients", "optimizer"),
    "activations": ("activations",),
    "other": ("buffers", "context"),
}
"""The columns on a terminal of 80 characters."""
RUN_SETTINGS = {
    "load", "seq_length", "micro_batch_size", "base_precision", "attention_precision", "kernels", "method", *LORA_SHAPE,
}  # fmt: skip
"""Settings of a plan that the run must have as well. Their defaults are those of finetune."""


@dataclass(frozen=True)
class PlannedGpu:
    """The GPU that the plan is for. source: "flag", "this machine" or "assumed"."""

    memory_gib: float
    compute_capability: tuple[int, int]
    source: str

    @property
    def capability(self) -> str:
        """The compute capability as NVIDIA writes it, such as 9.0."""
        return ".".join(map(str, self.compute_capability))


def show_plan(config: PlanConfig) -> None:
    """Print the table, or JSON. Raises ConfigError with changes that would help if no layout fits."""
    with json_document(config.json) as document:
        _show_plan(config, document)


def _show_plan(config: PlanConfig, document: dict[str, Any]) -> None:
    """Print the table; with --json fill the document instead."""
    gpu = planned_gpu(config)
    if problems := kernel_problems(gpu.compute_capability, config.kernels):
        raise ConfigError(SETTINGS_ERROR, problems=problems, next_command="the same command without --kernels")
    workload = workload_of(config, gpu)
    if config.attention_precision == "fp8":
        otherwise = tensor_sizes(dataclasses.replace(workload, attention_precision="bf16"))
        if problems := eight_bit_problems(workload, otherwise):
            next_command = "the same command without --attention-precision"
            raise ConfigError(SETTINGS_ERROR, problems=problems, next_command=next_command)
    host = config.host_memory * GIB if config.host_memory is not None else math.inf
    if config.full:
        # Data-parallel processes of all hosts share the state.
        workload = dataclasses.replace(workload, gpus=config.gpus * config.hosts, gpus_per_host=config.gpus)
        show_full_plan(config, workload, gpu.memory_gib, host, document)
        return
    choices = ranked(workload, gpu.memory_gib * GIB, host)
    shown = choices if config.all else _worth_showing(choices)
    if config.json:
        document |= {"ok": True, **_to_mapping(config, workload, gpu, choices)}
    elif shown:
        columns = ("layout", "recompute", "fits", *PARTS, "GiB a GPU", "host RAM", "speed")
        short = ("layout", "recompute", "fits", *SHORT_PARTS, "total", "RAM", "speed")
        Report().table(
            columns,
            [_row(each, {name: (name,) for name in PARTS}) for each in shown],
            _title(config, workload, gpu),
            narrow=(short, [_row(each, SHORT_PARTS) for each in shown]),
        )
        if any(each.layout.expert_chunks > 1 for each in shown):
            Report().say("full/4: recompute full, experts in 4 chunks of the tokens (--expert-chunks 4)")
        if any(each.layout.recompute == "except-attention" for each in shown):
            Report().say("except: recompute except-attention")
        if mixed := [each.layout for each in shown if each.layout.recompute_layers is not None]:
            first, number = mixed[0], mixed[0].recompute_layers
            Report().say(
                f"{first.recompute_cell}: {number} layers so, the others selective (--recompute-layers {number})"
            )
        _report_best(config, workload, gpu, choices[0])
        if config.hosts > 1 and choices[0].fits:
            show_scaling(config, workload, choices[0])
    if not any(each.fits for each in choices):
        where = "the GPU" if config.gpus == 1 else f"each of {config.gpus} GPUs"
        most_gpus = MAX_GPUS if config.hosts == 1 else GPUS_PER_HOST
        changes = remedies(workload, gpu.memory_gib * GIB, host, most_gpus)
        raise ConfigError(
            "No layout fits.",
            expected=f"at most {USABLE:.0%} of {gpu.memory_gib:g} GiB on {where}"
            + (f", {USABLE_OF_HOST:.0%} of {config.host_memory:g} GiB of a host's RAM" if config.host_memory else ""),
            found=_smallest(choices),
            next_command=_next_plan(config, changes) if changes else "GPUs with more memory",
        )


def _next_plan(config: PlanConfig, changes: list[str]) -> str:
    """Return the command with the first change, and the other changes. Each of them makes the run fit."""
    first = changes[0].split()
    changed = {word.removeprefix("--").replace("-", "_") for word in first if word.startswith("--")}
    kept = config.flags({item.name for item in dataclasses.fields(config)} - changed - {"json"})
    others = f"; or, in its place, {' or '.join(changes[1:])}" if len(changes) > 1 else ""
    return f"{' '.join(['mixtral-run plan', *kept, *first])}, which fits{others}"


def planned_gpu(config: PlanConfig) -> PlannedGpu:
    """Return the GPU of --gpu, else this machine's, else a Hopper GPU. --gpu-memory replaces the memory of --gpu."""
    if config.gpu is not None:
        model = GPU_MODELS[config.gpu]
        return PlannedGpu(config.gpu_memory or model.memory_gib, model.compute_capability, "flag")
    memory_gib = config.gpu_memory or DEFAULT_MEMORY_GIB
    local = local_gpu()
    if local is not None:
        return PlannedGpu(memory_gib, local.compute_capability, "this machine")
    return PlannedGpu(memory_gib, HOPPER, "assumed")


def workload_of(config: PlanConfig, gpu: PlannedGpu) -> Workload:
    """Return the run that is planned. Raises WeightsError if --load is no checkpoint."""
    base = _base(config.load) if config.load is not None else None
    whole = 4 if base is not None and base.dtype == "float32" else 2
    return Workload(
        architecture=base.architecture if base is not None else MIXTRAL_8X7B,
        gpus=config.gpus,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        rows_per_sample=rows_per_sample(config.method),
        **{name: getattr(config, name) for name in LORA_SHAPE},
        weight_bytes=whole,
        expert_bytes=EXPERT_BYTES.get(config.base_precision, whole),
        attention_precision=config.attention_precision,
        compute_capability=gpu.compute_capability,
        kernels=config.kernels,
        # Passes without gradients of align are those of an evaluation.
        has_validation=config.method in WITH_REFERENCE,
        context_parallel_size=1 if config.method else config.context_parallel_size,
        expert_chunks=config.expert_chunks,
    )


def _base(load: Path) -> BaseDescription | HubModel:
    """Return the description of the base. Of a model on the hub no weights are downloaded."""
    if is_on_hub(load):
        return ask(str(load)) or describe_base(resolve(str(load), Report.silent()))
    return describe_base(load)


def _title(config: PlanConfig, workload: Workload, gpu: PlannedGpu) -> str:
    size = f"{gpu.memory_gib:g} GiB ({gpu.memory_gib * GIB / 1e9:.1f} GB)"
    return (
        f"LoRA r={config.lora_rank} on {workload.architecture.num_parameters / 1e9:.1f} B parameters, {config.gpus} × "
        f"{size}, seq {config.seq_length:,} × {workload.rows}; GiB a GPU, RAM a host"
    )


def _row(choice: Choice, columns: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the cells of a choice. columns: the parts of memory that each column adds up."""
    parts = [f"{sum(getattr(choice.memory, name) for name in names) / GIB:.1f}" for names in columns.values()]
    total = f"{choice.memory.total / GIB:.1f}"
    fits = "✓" if choice.fits else "✗"
    pinned = f"{choice.host_bytes / GIB:.1f}" if choice.host_bytes else "–"
    return str(choice.layout), choice.layout.recompute_cell, fits, *parts, total, pinned, f"{choice.relative_speed:.0%}"


def _report_best(config: PlanConfig, workload: Workload, gpu: PlannedGpu, best: Choice) -> None:
    report = Report()
    if best.fits:
        report.say("speed: estimated, relative to one GPU that holds everything and recomputes nothing")
        copy = saved_copy_bytes(workload, best.layout)
        report.say(f"a host's RAM: {copy / GIB:.1f} GiB more for saves in the background (--no-save-in-background)")
    if gpu.source == "assumed":
        report.say("GPU: Hopper (H100, H200) is assumed; plan with --gpu for another model")
    elif gpu.source == "this machine":
        report.say(f"GPU: compute capability {gpu.capability}, as in this machine")
    _report_unit(config, report)
    if not best.fits:
        return
    settings = " ".join(["", *config.flags(RUN_SETTINGS)])
    report.say(
        f"  next: mixtral-run {'finetune' if config.method is None else 'align'} … {best.layout.flags()}{settings}"
    )
    faster = faster_micro_batch(workload, best, gpu.memory_gib * GIB)
    if faster is not None:
        size, choice, rate = faster
        others = " ".join(["", *config.flags(RUN_SETTINGS - {"micro_batch_size"})])
        report.say(
            f"  or, estimated {rate - 1:.0%} faster: --micro-batch-size {size} {choice.layout.flags()}{others}, "
            f"{choice.memory.total / GIB:.1f} GiB a GPU"
        )


def _report_unit(config: PlanConfig, report: Report) -> None:
    """Report that GB of a data sheet are not GiB, if --gpu-memory is the number by which a GPU is sold."""
    sold = [name for name, model in GPU_MODELS.items() if model.sold_as == config.gpu_memory]
    if config.gpu is None and sold:
        has = " or ".join(f"{GPU_MODELS[name].memory_gib:g} GiB (--gpu {name})" for name in sold)
        report.warn(f"--gpu-memory is in GiB; a GPU that is sold with {config.gpu_memory:g} GB has {has}")


def _worth_showing(choices: list[Choice]) -> list[Choice]:
    """Return the choices that fit; with offload, or with experts in chunks, only if the same layout does not fit
    without, and with all layers running again only if no layer can be stored.
    """
    fitting = [each for each in choices if each.fits]
    without = {str(each.layout) for each in fitting if each.layout.recompute != "offload"}
    whole = {(str(each.layout), each.layout.recompute) for each in fitting if each.layout.expert_chunks == 1}
    mixed = {(str(each.layout), each.layout.recompute) for each in fitting if each.layout.recompute_layers is not None}
    return [
        each
        for each in fitting
        if not (each.layout.recompute == "offload" and str(each.layout) in without)
        and not (each.layout.expert_chunks > 1 and (str(each.layout), each.layout.recompute) in whole)
        and not (each.layout.recompute_layers is None and (str(each.layout), each.layout.recompute) in mixed)
    ]


def _smallest(choices: list[Choice]) -> str:
    if not choices:
        return "no layout that splits the model and the sequence over these GPUs"
    smallest = min(choices, key=lambda each: each.memory.total)
    return (
        f"{smallest.memory.total / GIB:.1f} GiB with {smallest.layout}, --recompute {smallest.layout.recompute}, "
        "the smallest" + (f", and {smallest.host_bytes / GIB:.1f} GiB of a host's RAM" if smallest.host_bytes else "")
    )


def _to_mapping(config: PlanConfig, workload: Workload, gpu: PlannedGpu, choices: list[Choice]) -> dict[str, Any]:
    fits = bool(choices) and choices[0].fits
    scaled = scaling(config, workload, choices[0]) if fits and config.hosts > 1 else None
    faster = faster_micro_batch(workload, choices[0], gpu.memory_gib * GIB) if fits else None
    return {
        "gpus": config.gpus,
        "gpu_memory_gib": gpu.memory_gib,
        "compute_capability": gpu.capability,
        "compute_capability_source": gpu.source,
        "faster_micro_batch": {
            "micro_batch_size": faster[0],
            **dataclasses.asdict(faster[1].layout),
            "rate": round(faster[2], 3),
            "total_gib": round(faster[1].memory.total / GIB, 2),
        }
        if faster is not None
        else None,
        "scaling": dataclasses.asdict(scaled) if scaled is not None else None,
        "layouts": [
            {
                **dataclasses.asdict(each.layout),
                "fits": each.fits,
                "relative_speed": round(each.relative_speed, 3),
                "total_gib": round(each.memory.total / GIB, 2),
                "host_gib": round(each.host_bytes / GIB, 2),
                "saved_copy_gib": round(saved_copy_bytes(workload, each.layout) / GIB, 2),
                "parts_gib": {name: round(getattr(each.memory, name) / GIB, 2) for name in PARTS},
            }
            for each in choices
        ],
    }
