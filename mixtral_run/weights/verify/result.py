"""Result of `verify`: what a checkpoint is, and how it differs from its source."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mixtral_run.errors import CheckFailed, shortened
from mixtral_run.weights.verify.compare_tensors import Difference

_MOST_DIFFERENCES = 20


@dataclass(frozen=True)
class Comparison:
    """Result of --against."""

    directory: str
    num_tensors: int
    num_bytes: int
    seconds: float
    fingerprint: str
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class VerifyResult:
    """Description of a checkpoint. problems: a line each; empty if there are none."""

    path: str
    kind: str
    iteration: int
    dtype: str
    layout: str
    num_parameters: int
    num_bytes: int
    num_tensors: int
    num_chunks: int
    num_files: int
    record: dict[str, Any]
    comparison: Comparison | None
    problems: tuple[str, ...]
    kept: dict[str, Any] = field(default_factory=dict)
    """The caches of quantized experts next to a base, by precision."""

    def _next_command(self) -> str | None:
        """Return what helps against the problems; None if their lines say it."""
        if all(problem.startswith("quantised-") for problem in self.problems):
            return None
        if self.comparison is not None and not self.comparison.num_tensors:
            return "give --against the model that was converted"
        if self.kind == "adapter":
            if self.comparison is not None:
                return "give --against the model that the adapter was trained on"
            return "copy the adapter again from where it was trained"
        if self.kind == "hf":
            return "give --against another copy of the same model, or --load the one that is right"
        return (
            "mixtral-run convert --hf-model-path … --output-path … --overwrite writes it again; if only --against "
            "differs, verify --proof says whether the checkpoint is what was written"
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return dataclasses.asdict(self) | {"ok": not self.problems}

    def check(self) -> VerifyResult:
        """Return self, or raise CheckFailed with the problems."""
        if self.problems:
            raise CheckFailed(
                "The checkpoint does not hold what it should.",
                where=self.path,
                problems=shortened(list(self.problems)),
                next_command=self._next_command(),
            )
        return self
