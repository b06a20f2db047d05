"""Settings of `plan`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.fields import DATA, LAYOUT, MEMORY, OUTPUT, setting
from mixtral_run.config.gpus import DEFAULT_MEMORY_GIB, GPU_MODELS
from mixtral_run.config.lora import LoraShapeConfig
from mixtral_run.config.training import BASE_PRECISIONS


@dataclass(frozen=True, kw_only=True)
class PlanConfig(LoraShapeConfig):
    """Memory of each layout, computed before anything runs."""

    gpus: int = setting(8, help="GPUs of the job.", minimum=1, section=LAYOUT)
    gpu: str | None = setting(
        None,
        help="GPU model to plan for. Default: the GPU of this machine, else Hopper (H100, H200).",
        choices=tuple(GPU_MODELS),
        section=MEMORY,
    )
    gpu_memory: float | None = setting(
        None,
        help="Memory of one GPU in GiB, or with a unit: 80GB are 74.5 GiB. A GPU that is sold with 80 GB has 79.1 GiB: "
        f"--gpu knows. Default: that of --gpu, else {DEFAULT_MEMORY_GIB:g}.",
        above=0,
        section=MEMORY,
        unit="GiB",
    )
    load: Path | None = setting(
        None, help="Converted checkpoint or HF model to plan for. Default: Mixtral 8x7B.", section=LAYOUT
    )
    seq_length: int = setting(512, help="Tokens per sample.", minimum=2, section=DATA)
    micro_batch_size: int = setting(1, help="Samples per process and forward pass.", minimum=1, section=DATA)
    base_precision: str = setting(
        "bf16", help="Storage of the frozen experts.", choices=BASE_PRECISIONS, section=MEMORY
    )
    host_memory: float | None = setting(
        None,
        help="RAM of one host in GiB, or with a unit, as the limit of --recompute offload. Default: no limit.",
        above=0,
        section=MEMORY,
        unit="GiB",
    )
    all: bool = setting(False, help="Also show the layouts that do not fit.", section=OUTPUT)
    json: bool = setting(False, help="Print the plan as JSON.", section=OUTPUT)
