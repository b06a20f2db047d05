"""Settings of `plan`. Standard library only."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.context import ContextConfig, chunk_problems, row_problems
from mixtral_run.config.data import METHODS
from mixtral_run.config.fields import DATA, LAYOUT, MEMORY, OUTPUT, PREFERENCES, flag_of, setting
from mixtral_run.config.gpus import DEFAULT_MEMORY_GIB, GPU_MODELS, GPUS_PER_HOST
from mixtral_run.config.launch import KernelsConfig
from mixtral_run.config.lora import LORA_SHAPE
from mixtral_run.config.precision import BASE_PRECISIONS, AttentionPrecisionConfig
from mixtral_run.config.verbs.align import rows_per_sample

DEFAULT_NETWORK = "400Gb"
_NOT_FULL = ("method", "base_precision", "attention_precision", "expert_chunks", "tokens_per_second", "network")


def network_bytes(text: str) -> float:
    """Return `400Gb` or `50GB` as bytes per second; b is a bit and B a byte. Raises ValueError for another form."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?([GT])(b|bit|bps|b/s|B|B/s)", text)
    if found is None or not float(found[1]):
        raise ValueError(f"expected a rate such as 400Gb (bits a second) or 50GB (bytes); found {text!r}")
    return float(found[1]) * {"G": 1e9, "T": 1e12}[found[2]] / (1 if found[3].startswith("B") else 8)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(KernelsConfig, AttentionPrecisionConfig, ContextConfig):
    """Memory of each layout, computed before anything runs."""

    gpus: int = setting(8, help="GPUs of the job; with --hosts, of each host.", minimum=1, section=LAYOUT)
    hosts: int = setting(
        1,
        help="Hosts of the job. More than one: also print what the exchange of gradients over the network costs.",
        minimum=1,
        maximum=4096,
        section=LAYOUT,
    )
    network: str | None = setting(
        None,
        help="With --hosts: what a host can send over the network, all its ports together, such as 400Gb or 50GB a "
        f"second. Default: {DEFAULT_NETWORK}.",
        section=LAYOUT,
    )
    tokens_per_second: float | None = setting(
        None,
        help="With --hosts: tokens per second and GPU that you measured on one host. Default: from the benchmarks of "
        "H100 and H200.",
        above=0,
        section=LAYOUT,
    )
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
    full: bool = setting(
        False,
        help="Plan for full fine-tuning (pretrain --save), with the state of AdamW on the GPUs or in host memory.",
        section=LAYOUT,
    )
    load: Path | None = setting(
        None, help="Converted checkpoint or HF model to plan for. Default: Mixtral 8x7B.", section=LAYOUT
    )
    seq_length: int = setting(512, help="Tokens per sample.", minimum=2, section=DATA)
    micro_batch_size: int = setting(1, help="Samples per process and forward pass.", minimum=1, section=DATA)
    method: str | None = setting(
        None,
        help="Plan for align with this method: a sample of dpo, orpo and simpo is two rows. Default: for finetune.",
        choices=METHODS,
        section=PREFERENCES,
    )
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

    def problems(self) -> list[str]:
        found = super().problems()
        if self.full:
            defaults = {item.name: item.default for item in dataclasses.fields(self)}
            found += [
                f"{flag_of(name)}: expected without --full, which trains all weights in bf16 or fp32 and no adapters"
                for name in (*LORA_SHAPE, *_NOT_FULL)
                if getattr(self, name) != defaults[name]
            ]
        if self.method is not None and (self.context_parallel_size or 1) > 1:
            found.append(
                "--context-parallel-size: expected 1 with --method, since `align` needs whole rows; found "
                f"{self.context_parallel_size}"
            )
        context = max(self.context_parallel_size or 1, 1)
        # LoRA is planned on one host, and data parallel over hosts; the state of --full is shared over all of them.
        gpus = self.gpus * (self.hosts if self.full else 1)
        if gpus % context:
            of_host = self.hosts > 1 and not self.full
            found.append(
                f"--context-parallel-size: expected a divisor of {gpus}, the GPUs of "
                f"{'one host, on which --hosts plans each row' if of_host else 'the job'}; found {context}"
                + (f"; --gpus {self.gpus * self.hosts} without --hosts splits rows over all of them" if of_host else "")
            )
        found += row_problems(self.seq_length, 1, context)
        tokens = self.micro_batch_size * rows_per_sample(self.method) * self.seq_length // context
        found += chunk_problems(self.expert_chunks, tokens)
        if self.method is not None and self.train_also:
            found.append(
                f"--train-also: expected none with --method, since `align` trains adapters only; found "
                f"{','.join(self.train_also)}"
            )
        if self.hosts == 1:
            found += [
                f"{flag}: expected --hosts 2 or more with it; found --hosts 1"
                for flag, value in (("--network", self.network), ("--tokens-per-second", self.tokens_per_second))
                if value is not None
            ]
        elif self.gpus > GPUS_PER_HOST:
            found.append(f"--gpus: expected at most the {GPUS_PER_HOST} of one host with --hosts; found {self.gpus}")
        if self.network is not None:
            try:
                network_bytes(self.network)
            except ValueError as error:
                found.append(f"--network: {error}")
        return found
