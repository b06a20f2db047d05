"""`mixtral-run plan --full`: the layouts of full fine-tuning with their memory, as a table or as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from mixtral_run.config.gpus import GPUS_PER_HOST
from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.errors import ConfigError
from mixtral_run.planner.full_memory import FullChoice, full_choices, full_copy_bytes
from mixtral_run.planner.memory_model import USABLE, USABLE_OF_HOST
from mixtral_run.planner.workload import GIB, Workload
from mixtral_run.terminal.report import Report

PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "context")
SHORT_PARTS = {
    "weights": ("weights",),
    "training": ("gradients", "optimizer"),
    "other": ("activations", "buffers", "context"),
}

MAX_FULL_GPUS = 256
"""Most GPUs that are suggested for full fine-tuning."""


def show_full_plan(
    config: PlanConfig, workload: Workload, gpu_memory_gib: float, host: float, document: dict[str, Any]
) -> None:
    """Print the table; with --json fill the document instead. Raises ConfigError if no layout fits.

    host: bytes of RAM of one host. Several micro batches an iteration are assumed, whose gradients add up in fp32.
    """
    choices = full_choices(workload, gpu_memory_gib * GIB, host, accumulates=True)
    shown = choices if config.all else [each for each in choices if each.fits][:12]
    if config.json:
        document |= {"ok": True, **_to_mapping(config, workload, gpu_memory_gib, choices)}
    elif shown:
        report = Report()
        title = (
            f"Full fine-tuning of {workload.architecture.num_parameters / 1e9:.1f} B parameters, {workload.gpus} × "
            f"{gpu_memory_gib:g} GiB, seq {config.seq_length:,} × {workload.rows}; GiB a GPU, RAM a host"
        )
        report.table(
            ("layout", "recompute", "state", "fits", *PARTS, "GiB a GPU", "host RAM"),
            [_row(each, {name: (name,) for name in PARTS}) for each in shown],
            title,
            narrow=(
                ("layout", "recompute", "state", "fits", *SHORT_PARTS, "total", "RAM"),
                [_row(each, SHORT_PARTS) for each in shown],
            ),
        )
        if any(each.layout.recompute == "except-attention" for each in shown):
            report.say("except: recompute except-attention")
        best = choices[0]
        if best.fits:
            report.say("counted, not measured; several micro batches an iteration are assumed")
            report.say(_copy_line(full_copy_bytes(workload, best.layout), best, host))
            settings = " ".join(["", *config.flags({"load", "seq_length", "micro_batch_size", "kernels"})])
            offload = " --offload-optimizer" if best.offload else ""
            report.say(f"  next: mixtral-run pretrain … --save … {best.layout.flags()}{offload}{settings}")
    if not any(each.fits for each in choices):
        raise no_fit(config, choices, workload, gpu_memory_gib, host)


def _copy_line(num_bytes: float, best: FullChoice, host: float) -> str:
    """Return the line about the copy for saves in the background. num_bytes: of it; host: bytes of RAM of a host."""
    copy = f"{num_bytes / GIB:.0f} GiB"
    if best.host_bytes + num_bytes <= USABLE_OF_HOST * host:
        return f"a host's RAM: {copy} more for saves in the background (--no-save-in-background)"
    return f"the training waits for each save: a host's RAM lacks the {copy} more that saves in the background take"


def no_fit(
    config: PlanConfig, choices: list[FullChoice], workload: Workload, gpu_memory_gib: float, host: float
) -> ConfigError:
    """Return the error of a plan in which nothing fits. Its next step is the same plan with the GPUs that it takes."""
    found = "no layout that splits the model and the sequence over these GPUs"
    if choices:
        smallest = min(choices, key=lambda each: each.memory.total)
        found = (
            f"{smallest.memory.total / GIB:.1f} GiB with {smallest.layout}, --recompute {smallest.layout.recompute}, "
            f"the smallest, and {smallest.host_bytes / GIB:.1f} GiB of a host's RAM"
        )
    lora = "the same command without --full, for LoRA"
    more = _plan_with_more_gpus(config, workload, gpu_memory_gib, host)
    limit = f", {USABLE_OF_HOST:.0%} of {host / GIB:.0f} GiB of a host's RAM" if host != float("inf") else ""
    return ConfigError(
        "No layout of full fine-tuning fits.",
        expected=f"at most {USABLE:.0%} of {gpu_memory_gib:.4g} GiB on each of {workload.gpus} GPUs{limit}",
        found=found,
        next_command=f"{more}, which fits; or {lora}" if more else lora,
    )


def _plan_with_more_gpus(config: PlanConfig, workload: Workload, gpu_memory_gib: float, host: float) -> str | None:
    """Return the command of this plan with more GPUs of a host, or with more hosts; None if these do not help."""
    larger = config
    while 2 * larger.gpus * larger.hosts <= MAX_FULL_GPUS:
        if larger.hosts > 1 or larger.gpus <= GPUS_PER_HOST < 2 * larger.gpus:
            larger = dataclasses.replace(larger, hosts=2 * larger.hosts)
        else:
            larger = dataclasses.replace(larger, gpus=2 * larger.gpus)
        given = dataclasses.replace(workload, gpus=larger.gpus * larger.hosts, gpus_per_host=larger.gpus)
        choices = full_choices(given, gpu_memory_gib * GIB, host, accumulates=True)
        if choices and choices[0].fits:
            kept = {item.name for item in dataclasses.fields(config)} - {"json"}
            return " ".join(["mixtral-run plan", *larger.flags(kept)])
    return None


def _row(choice: FullChoice, columns: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    parts = [f"{sum(getattr(choice.memory, name) for name in names) / GIB:.1f}" for names in columns.values()]
    place = "host" if choice.offload else "GPU"
    pinned = f"{choice.host_bytes / GIB:.1f}" if choice.host_bytes else "–"
    total = f"{choice.memory.total / GIB:.1f}"
    return str(choice.layout), choice.layout.recompute_cell, place, "✓" if choice.fits else "✗", *parts, total, pinned


def _to_mapping(
    config: PlanConfig, workload: Workload, gpu_memory_gib: float, choices: list[FullChoice]
) -> dict[str, Any]:
    return {
        "gpus": config.gpus * config.hosts,
        "gpu_memory_gib": gpu_memory_gib,
        "layouts": [
            {
                **dataclasses.asdict(each.layout),
                "offload_optimizer": each.offload,
                "fits": each.fits,
                "total_gib": round(each.memory.total / GIB, 2),
                "host_gib": round(each.host_bytes / GIB, 2),
                "saved_copy_gib": round(full_copy_bytes(workload, each.layout) / GIB, 2),
                "parts_gib": {name: round(getattr(each.memory, name) / GIB, 2) for name in PARTS},
            }
            for each in choices
        ],
    }
