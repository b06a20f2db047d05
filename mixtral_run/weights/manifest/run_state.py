"""State of a training run that its checkpoint carries next to the tensors, so that --resume continues exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_CRC = re.compile("[0-9a-f]{8}")
_MOST_LOSSES = 1000
_LARGEST = 2**62


@dataclass(frozen=True)
class FilePrefix:
    """The part of a growing file that was written when the checkpoint was: its size, and its CRC-32 as hex digits."""

    num_bytes: int
    crc32: str


@dataclass(frozen=True)
class RunState:
    """State of a run after an iteration.

    optimizer_steps: steps that the optimizer took; skipped ones do not count. None for checkpoints of earlier versions,
    in which it is the number of iterations.
    num_skipped: steps skipped by --skip-bad-steps.
    recent_losses: the last losses, for --max-loss-ratio.
    validation_loss: of an evaluation at this iteration, if there was one.
    run_files: metrics and evaluations so far, by the file's name.
    """

    optimizer_steps: int | None = None
    num_skipped: int = 0
    recent_losses: tuple[float, ...] = ()
    validation_loss: float | None = None
    run_files: Mapping[str, FilePrefix] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self) | {"recent_losses": list(self.recent_losses)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], problems: list[str]) -> RunState:
        """Return the state; a line for each value of another form is added to `problems`."""

        def take(name: str, is_valid: Callable[[Any], bool], expected: str, default: Any) -> Any:
            found = values.get(name)
            if found is None or is_valid(found):
                return default if found is None else found
            problems.append(f"state.{name}: expected {expected}")
            return default

        files = take("run_files", _are_prefixes, "sizes and checksums by the names of files", {})
        return cls(
            take("optimizer_steps", _is_count, "a whole number", None),
            take("num_skipped", _is_count, "a whole number", 0),
            tuple(map(float, take("recent_losses", _are_losses, "a list of numbers", []))),
            take("validation_loss", _is_number, "a number", None),
            {name: FilePrefix(**each) for name, each in files.items()},
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _are_losses(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_LOSSES and all(map(_is_number, value))


def _are_prefixes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        re.fullmatch("[a-z]+[.]jsonl", name) is not None
        and isinstance(each, Mapping)
        and set(each) == {"num_bytes", "crc32"}
        and _is_count(each["num_bytes"])
        and isinstance(each["crc32"], str)
        and _CRC.fullmatch(each["crc32"]) is not None
        for name, each in value.items()
    )
