"""Settings of `finetune` and `up`, and what they share with `pretrain` (next to this file). Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mixtral_run.config.context import ContextLaunchConfig, chunk_problems, row_problems
from mixtral_run.config.data import DataConfig
from mixtral_run.config.fields import DATA, LAYOUT, LORA, MEMORY, OPTIMIZER, OUTPUT, Config, flag_of, setting
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.lora import LoraConfig
from mixtral_run.config.precision import (
    BASE_PRECISION_HELP,
    BASE_PRECISIONS,
    QUANTIZED_CACHE_MODES,
    AttentionPrecisionConfig,
)
from mixtral_run.config.recompute import RUNS_AGAIN, RecomputeConfig
from mixtral_run.config.schedule import ScheduleConfig

LOGGERS = ("wandb", "mlflow")
"""Services that --log-to names."""

RESUME_MODES = ("yes", "auto")
"""Values of --resume; without a value it is yes."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RecomputeConfig, ScheduleConfig, DataConfig, LaunchConfig):
    """Base model, data and optimizer of a training run."""

    load: Path = setting(
        help="Base model: a converted checkpoint of any TP/EP layout, or an HF model (its directory, or its name on "
        "the hub), or the URL of either, such as s3://bucket/mixtral.",
        section=LAYOUT,
        store="input",
    )
    micro_batch_size: int = setting(1, help="Samples per process and forward pass.", minimum=1, section=DATA)
    global_batch_size: int = setting(8, help="Samples per iteration over all processes.", minimum=1, section=DATA)
    data_cache: Path | None = setting(
        None,
        help="Folder for the token ids of the data files, so that another run with the same data, tokenizer and chat "
        "template starts at once. Default: .mixtral-run-tokens next to --save, or in the HF cache.",
        section=DATA,
    )
    data_cache_gib: float = setting(
        100.0,
        help="Largest size of --data-cache. Caches that were not used for the longest time are removed first.",
        above=0,
        section=DATA,
    )
    log_interval: int = setting(1, help="Iterations between log lines.", minimum=1, section=OUTPUT)
    weight_decay: float = setting(0.01, help="Decoupled weight decay.", minimum=0, section=OPTIMIZER)
    clip_grad: float | None = setting(
        1.0, help="Largest norm of the gradient. 0 turns clipping off.", minimum=0, section=OPTIMIZER
    )
    cuda_graphs: bool = setting(
        True,
        help="On GPUs: capture the forward and backward pass of a micro batch as a CUDA graph if that is faster.",
        section=MEMORY,
    )

    @property
    def rows_per_sample(self) -> int:
        """Rows that a sample of the batch sizes is."""
        return 1

    @property
    def loss_name(self) -> str:
        """Name of the loss in lines and messages."""
        return "lm loss"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.epochs is not None and self.mock_data:
            found.append("--epochs: expected --data-path; found --mock-data, which has no end")
        tp, cp = self.tensor_model_parallel_size, self.context_size
        if tp is not None and tp >= 1 and self.seq_length % tp:
            found.append(
                f"--seq-length: expected a multiple of --tensor-model-parallel-size ({tp}), over which the sequence "
                f"is split; found {self.seq_length}"
            )
        else:
            found += row_problems(self.seq_length, max(tp or 1, 1), cp)
        return found


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """Checkpoints that stay, and steps that are not taken."""

    keep_last: int | None = setting(
        None,
        help="Number of newest checkpoints that stay in --save. Older ones are removed after each save. Default: all.",
        minimum=1,
        section=OUTPUT,
    )
    keep_best: bool = setting(
        False,
        help="With --keep-last: also keep the checkpoint with the lowest validation loss. Only checkpoints at an "
        "iteration with an evaluation count.",
        section=OUTPUT,
    )
    max_loss_ratio: float | None = setting(
        None,
        help="Largest loss of an iteration, as a multiple of the median of the last 50. A larger one is not learned "
        "from: the run stops, or skips the step under --skip-bad-steps. Default: no limit.",
        above=1,
        section=OPTIMIZER,
    )
    skip_bad_steps: int = setting(
        0,
        help="Number of steps that a run may skip because their loss exceeds --max-loss-ratio or is not a number. "
        "Each batch is written to SAVE/bad_batches. One more stops the run.",
        minimum=0,
        section=OPTIMIZER,
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.keep_best and self.keep_last is None:
            found.append("--keep-best: expected --keep-last N with it; found none, so that all checkpoints stay")
        return found


@dataclass(frozen=True, kw_only=True)
class RunConfig(CheckpointConfig, TrainingConfig):
    """A run that evaluates, saves, resumes and reports: LoRA and full fine-tuning."""

    VERB: ClassVar[str]
    WHAT: ClassVar[str]

    valid_data_path: tuple[str, ...] = setting(
        (),
        help="Validation set, in any form of --data-path. Its loss is reported every --eval-interval iterations.",
        section=DATA,
    )
    valid_fraction: float = setting(
        0.0,
        help="Share of the examples of --data-path that is the validation set, and is not trained on, instead of "
        "--valid-data-path. A hash of its content decides for each example: duplicates are on one side.",
        minimum=0,
        section=DATA,
    )
    eval_interval: int = setting(
        100,
        help="Iterations between evaluations of the validation set. One runs before the first iteration and one after "
        "the last.",
        minimum=1,
        section=DATA,
    )
    early_stopping_patience: int = setting(
        0,
        help="Stop after so many evaluations in a row without a new lowest validation loss. Each new lowest loss is "
        "saved, so that the best checkpoint is there. 0: never.",
        minimum=0,
        section=OPTIMIZER,
    )
    save: Path | None = setting(
        None, help="Folder for the checkpoints; must be new or empty unless --resume.", section=OUTPUT
    )
    resume: str | None = setting(
        None,
        help="Continue from the newest checkpoint in --save. auto: from the newest one that is not damaged, or from "
        "the start if there is none. A complete run ends at once, so that the same command may be repeated.",
        choices=RESUME_MODES,
        bare="yes",
        section=OUTPUT,
    )
    pack: bool = setting(
        False,
        help="Pack several samples into one row of --seq-length tokens, without attention between them. Batch sizes "
        "then count rows.",
        section=DATA,
    )
    save_interval: int = setting(
        500, help="Iterations between checkpoints. One is always written at the end.", minimum=1, section=OUTPUT
    )
    run_name: str | None = setting(
        None, help="Name of the run in its plots and lists. Default: the name of the folder --save.", section=OUTPUT
    )
    router_stats: bool = setting(
        True, help="Count the tokens of each expert in each layer, in SAVE/router.jsonl.", section=OUTPUT
    )
    report: bool = setting(
        True, help="Write SAVE/report.html and SAVE/loss.png at the end of the run, and after a stop.", section=OUTPUT
    )
    report_prompts: int = setting(
        2,
        help="Prompts of the validation set that are answered before the first iteration and after the last one, for "
        "the report. 0: none. Without a report there are none.",
        minimum=0,
        maximum=16,
        section=OUTPUT,
    )
    report_tokens: int = setting(
        32, help="Most tokens of each of these answers.", minimum=1, maximum=512, section=OUTPUT
    )
    log_to: tuple[str, ...] = setting(
        (),
        help="Log loss, learning rate, speed and settings to these services as well. Each needs its own package.",
        choices=LOGGERS,
        section=OUTPUT,
    )
    save_in_background: bool = setting(
        True,
        help="Write checkpoints while the training continues, from a copy in host memory, if that has enough free. The "
        "last one of a run is written at once.",
        section=OUTPUT,
    )
    tensorboard: bool = setting(True, help="Write loss, learning rate and speed to SAVE/tensorboard.", section=OUTPUT)

    @classmethod
    def with_current_names(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values by current names. In files, --resume is also true or false."""
        found = super().with_current_names(values)
        if isinstance(found.get("resume"), bool):
            found["resume"] = "yes" if found["resume"] else None
        return found

    @property
    def continues(self) -> bool:
        return self.resume is not None

    def unused(self) -> dict[str, str]:
        if self.save is None:
            return {}
        if not self.has_validation:
            why = "expected --valid-data-path or --valid-fraction with it; found neither, so that it would be ignored"
            return dict.fromkeys((*self._given("eval_interval"), *self.answers_given), why)
        why = "expected without --no-report, as the answers are for the report; found both"
        return {} if self.report else dict.fromkeys(self.answers_given, why)

    @property
    def has_validation(self) -> bool:
        """True if the run has a validation set."""
        return bool(self.valid_data_path) or self.valid_fraction > 0

    @property
    def folder(self) -> Path:
        """Folder of the run, which is --save. Only for runs that save."""
        if self.save is None:
            raise ValueError("the run has no --save")
        return self.save

    @property
    def max_norm(self) -> float:
        """Largest norm of the gradient; 0 if it is not clipped."""
        return self.clip_grad or 0.0

    @property
    def answers_given(self) -> list[str]:
        """The given settings of answers for the report; none if --report-prompts 0 turns the answers off."""
        return self._given("report_prompts", "report_tokens") if self.report_prompts else []

    def _given(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name) != getattr(RunConfig, name)]

    def problems(self) -> list[str]:
        found = super().problems()
        if self.pack and self.mock_data:
            found.append("--pack: expected --data-path; found --mock-data, whose samples already fill their rows")
        if self.keep_best and not self.has_validation:
            found.append(
                "--keep-best: expected --valid-data-path or --valid-fraction, whose loss decides; found neither"
            )
        if self.valid_fraction >= 1:
            found.append(f"--valid-fraction: expected less than 1; found {self.valid_fraction:g}")
        if self.valid_fraction and self.valid_data_path:
            found.append("--valid-fraction and --valid-data-path: expected one of them; found both")
        if self.valid_fraction and self.mock_data:
            found.append("--valid-fraction: expected --data-path; found --mock-data")
        found += [f"{flag_of(name)}: {why}" for name, why in self.unused().items()]
        if self.early_stopping_patience and not self.has_validation:
            found.append(
                "--early-stopping-patience: expected --valid-data-path or --valid-fraction, whose loss decides; found "
                "neither"
            )
        return found


def can_resume(settings: Mapping[str, Any]) -> bool:
    """Return True if a job with these settings, as JSON values, continues from its checkpoints under --resume."""
    return "resume" in settings and settings.get("save") is not None


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoraConfig, AttentionPrecisionConfig, ContextLaunchConfig, RunConfig):
    """LoRA fine-tuning of a base model."""

    VERB: ClassVar[str] = "finetune"
    WHAT: ClassVar[str] = "fine-tuning"

    save: Path = setting(
        help="Folder for the checkpoints of the adapter; must be new or empty unless --resume. A URL, such as "
        "s3://bucket/run: they are saved on this machine, and copied there while the training continues.",
        aliases=("output_path",),
        section=OUTPUT,
        store="output",
    )
    init_adapter: Path | None = setting(
        None,
        help="Adapter to start from: a directory that PEFT saved, or an adapter that finetune saved. Its rank, alpha "
        "and target modules are taken.",
        section=LORA,
        store="input",
    )
    base_precision: str = setting("bf16", help=BASE_PRECISION_HELP, choices=BASE_PRECISIONS, section=MEMORY)
    quantized_cache: str = setting(
        "yes",
        help="Cache of the fp8 or nf4 experts, in LOAD/quantised-fp8 (45 GB) or LOAD/quantised-nf4 (24 GB). yes: read "
        "it, or create it if it is missing. use: only read it. no: ignore it.",
        choices=QUANTIZED_CACHE_MODES,
        aliases=("keep_quantised",),
        section=MEMORY,
    )
    layout: str | None = setting(
        None,
        help="Former setting. auto: the planner chooses TP and EP, whatever was given. given: TP2/EP4 unless given.",
        choices=("given", "auto"),
        section=LAYOUT,
        hidden=True,
    )

    @property
    def needs_whole_rows(self) -> str | None:
        """The balance of the routers is that of whole rows."""
        return super().needs_whole_rows or ("--router-aux-loss" if self.router_aux_loss else None)

    @property
    def recomputation(self) -> str:
        """One of RECOMPUTE. Without a setting none, or full with --expert-chunks, which needs it."""
        given = super().recomputation
        chunked = (self.expert_chunks or 1) > 1 and self.recompute is None
        return RUNS_AGAIN[0] if chunked else given

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.expert_chunks or 1) > 1 and self.recomputation not in RUNS_AGAIN:
            found.append(
                f"--expert-chunks: expected --recompute full, except-attention or offload with it, as the backward "
                f"pass computes each chunk again; found --recompute {self.recomputation}"
            )
        if (self.expert_chunks or 1) > 1 and self.recompute_layers is not None:
            found.append(
                f"--recompute-layers: expected without --expert-chunks, which is for rows whose experts do not fit "
                f"in memory even one layer at a time; found --expert-chunks {self.expert_chunks}"
            )
        ranks_of_a_row = max(self.tensor_model_parallel_size or 1, 1) * max(self.context_size, 1)
        tokens = self.micro_batch_size * self.rows_per_sample * self.seq_length // ranks_of_a_row
        return found + chunk_problems(self.expert_chunks, tokens)


@dataclass(frozen=True, kw_only=True)
class UpConfig(FinetuneConfig):
    """All steps from a bare host to an adapter on this machine.

    Relative paths are paths on the host, except those of data and `output_path`.
    """

    hf_model_path: str = setting(
        "mistralai/Mixtral-8x7B-v0.1",
        help="HF model to convert: its name on the hub, or its folder on the host.",
        section=LAYOUT,
    )
    load: Path = setting(
        Path("mixtral"), help="Converted checkpoint on the host; created if it is missing.", section=LAYOUT
    )
    save: Path = setting(Path("adapter"), help="Folder on the host for the checkpoints of the adapter.", section=OUTPUT)
    output_path: Path = setting(
        Path("adapter"), help="Folder on this machine for the exported adapter.", section=OUTPUT
    )

    @property
    def continues(self) -> bool:
        """A second call continues what the first one began; only the host knows whether this is one."""
        return True
