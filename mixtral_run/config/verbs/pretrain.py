"""Settings of `pretrain`: full fine-tuning, or a few iterations that prove a layout. Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mixtral_run.config.context import SplitRowsLaunchConfig
from mixtral_run.config.fields import DATA, LAYOUT, MEMORY, OPTIMIZER, OUTPUT, flag_of, setting
from mixtral_run.config.verbs.training import RunConfig

OPTIMIZERS = ("sgd", "adamw")
NEEDS_SAVE = (
    "resume", "keep_last", "keep_best", "valid_data_path", "valid_fraction", "early_stopping_patience", "run_name",
    "log_to", "pack", "max_loss_ratio", "skip_bad_steps",
)  # fmt: skip
"""Settings of a run that saves; without --save they would be ignored. Those that turn off what only such a run does, as
--no-save-in-background, are left out: they get what they ask for."""
HARMLESS = ("save_interval", "eval_interval")
"""Further settings of a run that saves, without which a run without --save is the same."""
_WHY = "expected --save with it, since a run without it leaves nothing"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(SplitRowsLaunchConfig, RunConfig):
    """Training of all weights: full fine-tuning with --save; without it, a few iterations that save nothing."""

    VERB: ClassVar[str] = "pretrain"
    WHAT: ClassVar[str] = "full fine-tuning"

    save: Path | None = setting(
        None,
        help="Folder for the checkpoints: all weights, as a base that every verb takes as --load, and the state of the "
        "optimizer. Must be new or empty unless --resume. A URL, such as s3://bucket/run: they are saved on this "
        "machine, and copied there while the training continues. Without it nothing is saved.",
        aliases=("output_path",),
        section=OUTPUT,
        store="output",
    )
    context_parallel_size: int | None = setting(
        None,
        help="Processes that share each row of tokens (CP), for rows that do not fit on one GPU. Default: 1.",
        minimum=1,
        section=LAYOUT,
    )
    optimizer: str | None = setting(
        None,
        help="sgd keeps no state. adamw keeps three fp32 numbers per weight, shared among the data-parallel processes. "
        "Default: adamw with --save, else sgd.",
        choices=OPTIMIZERS,
        section=OPTIMIZER,
    )
    global_batch_size: int = setting(
        0, help="Samples per iteration over all processes. 0: one micro batch per process.", minimum=0, section=DATA
    )
    clip_grad: float | None = setting(
        None,
        help="Largest norm of the gradient. 0 turns clipping off. Default: 1 with --save, else 0.",
        minimum=0,
        section=OPTIMIZER,
    )
    router_aux_loss: float = setting(
        0.0,
        help="Coefficient of the load balancing loss of the routers, as HF's router_aux_loss_coef (Mixtral: 0.02).",
        minimum=0,
        section=OPTIMIZER,
    )
    offload_optimizer: bool = setting(
        False,
        help="Keep the state of adamw in host memory: 12 bytes per weight. It visits the GPU one weight at a time. "
        "Mixtral 8x7B needs it on 8 GPUs of 80 GB. On a CPU it changes nothing.",
        section=MEMORY,
    )
    metrics_file: Path | None = setting(
        None,
        help="JSONL file to write the metrics of each iteration to. With --save they are in SAVE/metrics.jsonl.",
        section=OUTPUT,
    )

    @property
    def needs_whole_rows(self) -> str | None:
        """The balance of the routers is that of whole rows, and SGD within the backward pass sums no parts of rows."""
        if not self.uses_adamw:
            return "--optimizer sgd"
        return super().needs_whole_rows or ("--router-aux-loss" if self.router_aux_loss else None)

    @property
    def max_norm(self) -> float:
        """Largest norm of the gradient; 0 if it is not clipped."""
        if self.clip_grad is None:
            return 0.0 if self.save is None else 1.0
        return self.clip_grad

    @property
    def uses_adamw(self) -> bool:
        """True if the optimizer is AdamW."""
        return self.save is not None if self.optimizer is None else self.optimizer == OPTIMIZERS[1]

    def unused(self) -> dict[str, str]:
        if self.save is not None:
            return super().unused()
        return dict.fromkeys((*self._given(*HARMLESS), *self.answers_given), _WHY)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.offload_optimizer and not self.uses_adamw:
            found.append("--offload-optimizer: expected --optimizer adamw or --save with it; sgd has no state")
        if self.save is None:
            defaults = {item.name: item.default for item in dataclasses.fields(self)}
            given = [name for name in NEEDS_SAVE if getattr(self, name) != defaults[name]]
            found += [f"{flag_of(name)}: {_WHY}" for name in given]
            return found
        if not self.uses_adamw:
            found.append(f"--optimizer: expected adamw with --save; found {self.optimizer}")
        if self.metrics_file is not None:
            found.append("--metrics-file: the metrics of a run with --save are in SAVE/metrics.jsonl; leave it out")
        return found
