"""The plan of a run: its table, and what it decides for a run on the GPUs at hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_run.config.plan import PlanConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.planner.memory_model import (
    EXPERT_BYTES,
    GIB,
    USABLE,
    USABLE_OF_HOST,
    Choice,
    Workload,
    faster_micro_batch,
    ranked,
)
from mixtral_run.planner.suggestions import remedies
from mixtral_run.report import Report
from mixtral_run.weights.hf.hub import HubModel, ask, is_on_hub, resolve
from mixtral_run.weights.manifest.describe import BaseDescription, describe_base

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "buffers", "context")
SHORT_PARTS = {
    "weights": ("weights",),
    "LoRA": ("adapters", "gradients", "optimizer"),
    "activations": ("activations",),
    "other": ("buffers", "context"),
}
"""The columns of a terminal of 80."""


def show_plan(config: PlanConfig) -> None:
    """Print the table, or JSON. Raises ConfigError when no layout fits, with what would help."""
    workload = workload_of(config)
    host = config.host_memory * GIB if config.host_memory is not None else math.inf
    choices = ranked(workload, config.gpu_memory * GIB, host)
    shown = choices if config.all else _worth_showing(choices)
    if config.json:
        print(json.dumps(_to_mapping(config, workload, choices), indent=2))
    elif shown:
        columns = ("layout", "recompute", "fits", *PARTS, "GiB a GPU", "host RAM", "speed")
        short = ("layout", "recompute", "fits", *SHORT_PARTS, "total", "RAM", "speed")
        Report().table(
            columns,
            [_row(each, {name: (name,) for name in PARTS}) for each in shown],
            _title(config, workload),
            narrow=(short, [_row(each, SHORT_PARTS) for each in shown]),
        )
        _tell_best(config, workload, choices[0])
    if not any(each.fits for each in choices):
        where = "the GPU" if config.gpus == 1 else f"each of {config.gpus} GPUs"
        ways = remedies(workload, config.gpu_memory * GIB, host)
        raise ConfigError(
            "No layout fits.",
            expected=f"at most {USABLE:.0%} of {config.gpu_memory:g} GiB on {where}"
            + (f", {USABLE_OF_HOST:.0%} of {config.host_memory:g} GiB of a host's RAM" if config.host_memory else ""),
            found=_smallest(choices),
            next_command=f"the same with {' or '.join(ways)}, which fits" if ways else "GPUs with more memory",
        )


def workload_of(config: PlanConfig) -> Workload:
    """What the plan is asked about. Raises WeightsError when --load is no checkpoint."""
    base = _base(config.load) if config.load is not None else None
    whole = 4 if base is not None and base.dtype == "float32" else 2
    return Workload(
        architecture=base.architecture if base is not None else MIXTRAL_8X7B,
        gpus=config.gpus,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        lora_rank=config.lora_rank,
        lora_dropout=config.lora_dropout,
        lora_target_modules=config.lora_target_modules,
        weight_bytes=whole,
        expert_bytes=EXPERT_BYTES.get(config.base_precision, whole),
    )


def _base(load: Path) -> BaseDescription | HubModel:
    """What a plan needs of the base: of a model on the hub no weights."""
    if is_on_hub(load):
        return ask(str(load)) or describe_base(resolve(str(load), Report.silent()))
    return describe_base(load)


def _title(config: PlanConfig, workload: Workload) -> str:
    return (
        f"LoRA r={config.lora_rank} on {workload.architecture.num_parameters / 1e9:.1f} B parameters, "
        f"{config.gpus} × {config.gpu_memory:g} GiB, seq {config.seq_length:,} × {config.micro_batch_size}; GiB a GPU, "
        "RAM a host"
    )


def _row(choice: Choice, columns: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The parts of memory in columns, each the sum of those that it names."""
    parts = [f"{sum(getattr(choice.memory, name) for name in names) / GIB:.1f}" for names in columns.values()]
    total = f"{choice.memory.total / GIB:.1f}"
    fits = "✓" if choice.fits else "✗"
    pinned = f"{choice.host_bytes / GIB:.1f}" if choice.host_bytes else "–"
    return str(choice.layout), choice.layout.recompute, fits, *parts, total, pinned, f"{choice.relative_speed:.0%}"


def _tell_best(config: PlanConfig, workload: Workload, best: Choice) -> None:
    if best.fits:
        precision = "" if config.base_precision == "bf16" else f" --base-precision {config.base_precision}"
        report = Report()
        report.say("speed: estimated, against one GPU that holds everything and recomputes nothing")
        report.say(f"  next: mixtral-run finetune … {best.layout.flags()}{precision}")
        faster = faster_micro_batch(workload, best, config.gpu_memory * GIB)
        if faster is not None:
            size, choice, rate = faster
            report.say(
                f"  or, estimated {rate - 1:.0%} faster: --micro-batch-size {size} {choice.layout.flags()}{precision}, "
                f"{choice.memory.total / GIB:.1f} GiB a GPU"
            )


def _worth_showing(choices: list[Choice]) -> list[Choice]:
    """Those that fit, and with offload only where the same layout does not fit without."""
    without = {str(each.layout) for each in choices if each.fits and each.layout.recompute != "offload"}
    return [
        each
        for each in choices
        if each.fits and not (each.layout.recompute == "offload" and str(each.layout) in without)
    ]


def _smallest(choices: list[Choice]) -> str:
    if not choices:
        return "no layout that divides the model and the sequence over these GPUs"
    smallest = min(choices, key=lambda each: each.memory.total)
    return (
        f"{smallest.memory.total / GIB:.1f} GiB with {smallest.layout}, --recompute {smallest.layout.recompute}, "
        "the smallest" + (f", and {smallest.host_bytes / GIB:.1f} GiB of a host's RAM" if smallest.host_bytes else "")
    )


def _to_mapping(config: PlanConfig, workload: Workload, choices: list[Choice]) -> dict[str, Any]:
    fits = bool(choices) and choices[0].fits
    faster = faster_micro_batch(workload, choices[0], config.gpu_memory * GIB) if fits else None
    return {
        "gpus": config.gpus,
        "gpu_memory_gib": config.gpu_memory,
        "faster_micro_batch": {
            "micro_batch_size": faster[0],
            **dataclasses.asdict(faster[1].layout),
            "rate": round(faster[2], 3),
            "total_gib": round(faster[1].memory.total / GIB, 2),
        }
        if faster is not None
        else None,
        "layouts": [
            {
                **dataclasses.asdict(each.layout),
                "fits": each.fits,
                "relative_speed": round(each.relative_speed, 3),
                "total_gib": round(each.memory.total / GIB, 2),
                "host_gib": round(each.host_bytes / GIB, 2),
                "parts_gib": {name: round(getattr(each.memory, name) / GIB, 2) for name in PARTS},
            }
            for each in choices
        ],
    }
