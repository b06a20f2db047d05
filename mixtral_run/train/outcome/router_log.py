"""Lines of router.jsonl: tokens by layer and expert, and how far their shares moved from the base's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mixtral_run.model.routing.router_counts import RouterCounts
from mixtral_run.results.read_run import RunData, read_run
from mixtral_run.results.report_router import shares_of
from mixtral_run.results.run_files import ROUTER
from mixtral_run.train.metrics import append

MOST_LINES = 1000
"""Lines about the training of a whole run: a line of Mixtral 8x7B has 1.5 KB."""
TRAINING, VALIDATION = "training", "validation"


class RouterLog:
    """Counts of a run's routers. All ranks must construct one and make the same calls.

    Args:
        counts: of the model; None: nothing is counted.
        save: folder of the run; its router.jsonl is continued.
        log_interval: iterations between log lines.
        iterations: of the whole run.
        is_first: this rank writes.
    """

    def __init__(
        self, counts: RouterCounts | None, save: Path, log_interval: int, iterations: int, *, is_first: bool
    ) -> None:
        self._counts, self._file, self._is_first = counts, save / ROUTER, is_first
        self._last = iterations
        self._window = log_interval * math.ceil(iterations / (MOST_LINES * log_interval))
        self._num_pending = 0
        self._references: dict[str, list[list[float]]] = {}

    def open(self) -> None:
        """Read what the base chose, if this run continues another. Call it before the first iteration."""
        if self._is_first:
            for line in read_run(self._file.parent).router:
                shares = shares_of(line.get("tokens"))
                if shares:
                    self._references.setdefault(str(line.get("of")), shares)

    def begin_validation(self) -> None:
        """Count the validation set from here. Call it before an evaluation."""
        if self._counts is not None:
            self._counts.begin_step()

    def end_validation(self, iteration: int) -> None:
        """Write the counts of the validation set. Call it after an evaluation that was not stopped."""
        if self._counts is not None:
            self._write(VALIDATION, iteration, self._counts.take_step().tolist(), {})

    def note_training(self, iteration: int) -> float | None:
        """Write the counts of the iterations since the last line, if a line is due. Call it after each iteration.

        Returns the mean drift in the first rank, if a line was written.
        """
        self._num_pending += 1
        is_due = iteration % self._window == 0 or iteration == self._last
        return self.end_training(iteration) if is_due else None

    def end_training(self, iteration: int) -> float | None:
        """Write the counts of the iterations since the last line, if there are any."""
        if self._counts is None or not self._num_pending:
            return None
        more = {"iterations": self._num_pending}
        self._num_pending = 0
        return self._write(TRAINING, iteration, self._counts.take().tolist(), more)

    def _write(self, of: str, iteration: int, tokens: list[list[int]], more: dict[str, Any]) -> float | None:
        if not self._is_first:
            return None
        shares = shares_of(tokens)
        if not shares:
            return None
        moved = drift(self._references.setdefault(of, shares), shares)
        line = {"iteration": iteration, "of": of, **more, "tokens": tokens, "drift": [round(each, 6) for each in moved]}
        append(self._file, json.dumps(line) + "\n")
        return sum(moved) / len(moved)


def drift(before: list[list[float]], after: list[list[float]]) -> list[float]:
    """Return for each layer the part of the tokens that goes to other experts: half the sum of the differences."""
    return [
        sum(abs(old - new) for old, new in zip(olds, news, strict=True)) / 2
        for olds, news in zip(before, after, strict=True)
    ]


def router_summary(data: RunData, num_retaken: int) -> dict[str, Any] | None:
    """Return the counts of the whole run for summary.json; None if nothing was counted.

    No dispatch drops tokens: a step in which tokens exceed the capacity of a process is taken again without a limit.
    num_retaken: number of these steps.
    """
    lines = [line for line in data.router if shares_of(line.get("tokens"))]
    training = [line["tokens"] for line in lines if line.get("of") == TRAINING]
    if not training:
        return None
    newest = next((line for line in reversed(lines) if line.get("of") == VALIDATION), lines[-1])
    return {
        "tokens": [[sum(each) for each in zip(*rows, strict=True)] for rows in zip(*training, strict=True)],
        "drift_of": newest["of"],
        "drift": newest.get("drift"),
        "dropped_tokens": 0,
        "retaken_steps": num_retaken,
    }
