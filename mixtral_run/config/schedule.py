"""Settings of how long a run trains, and of its learning rate. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

from mixtral_run.config.fields import OPTIMIZER, Config, setting

DEFAULT_ITERATIONS = 10
LR_SCHEDULERS = ("cosine", "linear", "constant")
"""Form of the learning rate after the warmup."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """Length of a run, and its learning rate."""

    train_iters: int | None = setting(
        None,
        help=f"Iterations to train. Default: {DEFAULT_ITERATIONS}, unless --epochs is given.",
        minimum=1,
        section=OPTIMIZER,
    )
    epochs: float | None = setting(
        None,
        help="Passes over the training data, instead of --train-iters. A part of an epoch is possible. The last "
        "iteration is filled from the next epoch.",
        above=0,
        maximum=1e6,
        section=OPTIMIZER,
    )
    lr: float = setting(1e-4, help="Peak learning rate, reached after the warmup.", above=0, section=OPTIMIZER)
    min_lr: float = setting(
        1e-5,
        help="Learning rate of the last iteration under --lr-scheduler cosine and linear.",
        minimum=0,
        section=OPTIMIZER,
    )
    lr_scheduler: str = setting(
        "cosine",
        help="Learning rate after the warmup. cosine and linear: falls from --lr to --min-lr. constant: stays at --lr.",
        choices=LR_SCHEDULERS,
        section=OPTIMIZER,
    )
    lr_warmup_iters: int = setting(0, help="Iterations of linear warmup.", minimum=0, section=OPTIMIZER)
    warmup_ratio: float = setting(
        0.0,
        help="Share of all iterations for the linear warmup, rounded up, instead of --lr-warmup-iters.",
        minimum=0,
        maximum=1,
        section=OPTIMIZER,
    )

    @property
    def iterations(self) -> int:
        """Iterations to train. With --epochs they are known once the data are read: see `with_iterations`."""
        if self.train_iters is None and self.epochs is not None:
            raise ValueError("the iterations of --epochs are not known before the data are read")
        return self.train_iters or DEFAULT_ITERATIONS

    @property
    def knows_iterations(self) -> bool:
        """True unless the number of iterations depends on data that have not been read."""
        return self.train_iters is not None or self.epochs is None

    @property
    def warmup_iters(self) -> int:
        """Iterations of warmup, from either setting."""
        return self.lr_warmup_iters or math.ceil(round(self.warmup_ratio * self.iterations, 6))

    def with_iterations(self, num_samples: int | None, global_batch_size: int) -> Self:
        """Return the config with the iterations that --epochs of `num_samples` samples are; itself without --epochs."""
        if self.epochs is None or num_samples is None:
            return self
        # Rounded first, so that 0.1 epochs of 100 samples are not 11 iterations of one.
        count = math.ceil(round(self.epochs * num_samples / global_batch_size, 6))
        return dataclasses.replace(self, train_iters=max(1, count))

    def problems(self) -> list[str]:
        found = super().problems()
        if self.epochs is not None and self.train_iters is not None:
            found.append("--epochs and --train-iters: expected one of them; found both")
        if self.lr_warmup_iters and self.warmup_ratio:
            found.append("--lr-warmup-iters and --warmup-ratio: expected one of them; found both")
        if self.lr_scheduler == "constant":
            if self.min_lr != type(self).min_lr:
                found.append(f"--min-lr: --lr-scheduler constant does not use it; found {self.min_lr}")
        elif self.min_lr > self.lr:
            found.append(f"--min-lr: expected at most --lr ({self.lr}); found {self.min_lr}")
        if self.knows_iterations:
            found += self.warmup_problems()
        return found

    def warmup_problems(self) -> list[str]:
        """Return the problem of a warmup that takes the whole run. The number of iterations is known."""
        if math.isnan(self.warmup_ratio) or self.warmup_iters < self.iterations:
            return []
        if self.lr_warmup_iters:
            return [f"--lr-warmup-iters: expected fewer than {self._length()}; found {self.lr_warmup_iters}"]
        return [
            f"--warmup-ratio: expected a share that leaves an iteration after the warmup, of {self._length()}; found "
            f"{self.warmup_ratio:g}, which is {self.warmup_iters} iteration{'s' * (self.warmup_iters != 1)}"
        ]

    def _length(self) -> str:
        if self.epochs is None:
            return f"--train-iters ({self.iterations})"
        return f"the {self.iterations} iterations that --epochs {self.epochs:g} are"
