"""Settings of a run's checkpoints: which ones stay, and which steps get into none. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.config.fields import Config, setting
from mixtral_run.config.sections import OPTIMIZER, OUTPUT


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
