"""Read what a run left. Standard library of Python 3.8 only: `runs --on` sends this file to hosts.

Files may be missing, cut off, damaged or not written by a run at all: what cannot be used is left out.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_BYTES = 512 * 2**20
"""No file of a run is larger; a larger one is not read."""
_FILES = {"run": "run.json", "summary": "summary.json"}
_LINES = {
    "metrics": "metrics.jsonl",
    "validation": "validation.jsonl",
    "router": "router.jsonl",
    "generations": "generations.jsonl",
}


@dataclass
class RunData:
    """The files of a run as JSON values.

    Attributes:
        folder: of the run.
        run: run.json; summary: summary.json; both empty if there is none.
        metrics, validation, router, generations: the lines that have an iteration, in its order; the last of each
            iteration, or in router.jsonl of each iteration and kind of data.
        problems: files that are there and cannot be used, with the reason.
    """

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    router: list[dict[str, Any]] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_run(self) -> bool:
        """True if any of the files is there."""
        return bool(self.run or self.summary or self.metrics or self.validation or self.problems)


def read_run(folder: Path) -> RunData:
    """Return the files of a run. Never raises."""
    data = RunData(folder)
    for name, file in _FILES.items():
        setattr(data, name, _object(folder / file, data.problems))
    for name, file in _LINES.items():
        setattr(data, name, _lines(folder / file, data.problems))
    return data


def number(value: Any) -> float | None:
    """Return a finite number of JSON as a float; None for anything else."""
    if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
        return None
    return float(value)


def numbers(values: Any) -> list[float]:
    """Return the finite numbers of a JSON list; an empty list for anything else."""
    found = map(number, values) if isinstance(values, list) else ()
    return [each for each in found if each is not None]


def mapping(value: Any) -> dict[str, Any]:
    """Return a JSON object as it is; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def curve(lines: list[dict[str, Any]], name: str) -> list[Any]:
    """Return pairs of an iteration and a value, of the lines in which it is a number."""
    values = ((line["iteration"], number(line.get(name))) for line in lines)
    return [(iteration, value) for iteration, value in values if value is not None]


def loss_summary(data: RunData) -> dict[str, Any] | None:
    """Return first, last and lowest loss of the iterations; None if there is none."""
    losses = curve(data.metrics, "loss")
    if not losses:
        return None
    lowest = min(losses, key=lambda point: point[1])
    return {
        "first_loss": losses[0][1],
        "last_loss": losses[-1][1],
        "lowest_loss": lowest[1],
        "lowest_iteration": lowest[0],
    }


def preference_summary(data: RunData) -> dict[str, Any]:
    """Return rewards and other figures of preferences, of the last iteration and of the last evaluation.

    Empty for other runs.
    """
    found = {}
    for kind, lines in (("training", data.metrics), ("validation", data.validation)):
        last = lines[-1] if lines else {}
        figures = {name: number(value) for name, value in last.items() if "/" in name or name in ("kl", "nll_loss")}
        if figures:
            found[kind] = figures
    return found


def _content(path: Path, problems: list[str]) -> bytes | None:
    """Return the bytes of a regular file; None if it is missing or cannot be used, which is noted."""
    try:
        # A pipe would block the opening.
        descriptor = os.open(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: {getattr(error, 'strerror', None) or error}")
        return None
    try:
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
                problems.append(f"{path.name}: not a file of a run")
                return None
            return file.read(MAX_BYTES)
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return None


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    content = _content(path, problems)
    if content is None:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    problems.append(f"{path.name}: no JSON object")
    return {}


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    content = _content(path, problems)
    by_iteration = {}
    num_bad = 0
    for text in (content or b"").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("iteration")) is int and 0 <= line["iteration"] < 2**53:
            by_iteration[line["iteration"], str(line.get("of"))] = line
        else:
            num_bad += 1
    if num_bad:
        problems.append(f"{path.name}: {num_bad} of its lines cannot be read")
    return [by_iteration[key] for key in sorted(by_iteration)]
