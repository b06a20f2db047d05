"""The lowest validation loss of a run, and the end of a run that no longer lowers it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass
class BestLoss:
    """Validation losses of a run, as far as they decide about its end and its best checkpoint.

    Attributes:
        iteration: of the newest evaluation that counts; None before the first one.
        loss: its loss.
        best_iteration: of the evaluation with the lowest loss.
        best_loss: its loss.
        num_without_improvement: evaluations since then.
    """

    iteration: int | None = None
    loss: float = math.inf
    best_iteration: int | None = None
    best_loss: float = math.inf
    num_without_improvement: int = 0

    def record(self, iteration: int, loss: float) -> bool:
        """Count an evaluation, unless it is that of the same iteration again. Return True if its loss is the lowest."""
        if iteration == self.iteration:
            return False
        self.iteration, self.loss = iteration, loss
        if loss < self.best_loss:
            self.best_iteration, self.best_loss, self.num_without_improvement = iteration, loss, 0
            return True
        self.num_without_improvement += 1
        return False

    def is_over(self, patience: int) -> bool:
        """Return True if `patience` evaluations in a row had no new lowest loss. 0: never."""
        return 0 < patience <= self.num_without_improvement

    def evaluations(self) -> str:
        """Return the number of evaluations without a new lowest loss, in words."""
        return f"{self.num_without_improvement} evaluation{'s' if self.num_without_improvement != 1 else ''}"

    def to_mapping(self) -> dict[str, Any]:
        """Return the state for a checkpoint's manifest; empty before the first evaluation."""
        return {} if self.iteration is None else asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> Self:
        """Return the state that a checkpoint holds; a new one if it holds none that can be used."""
        try:
            return cls(
                int((values or {})["iteration"]),
                float((values or {})["loss"]),
                int((values or {})["best_iteration"]),
                float((values or {})["best_loss"]),
                int((values or {})["num_without_improvement"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            return cls()
