"""Settings that a run had before --resume changed them, as its records name them. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FORMER_SETTINGS = "former_settings"
"""Key of the records: mixtral_run.json of a checkpoint, run.json and summary.json."""
_MOST = 1000
_LONGEST = 65536


@dataclass(frozen=True)
class FormerSettings:
    """Settings that a run had up to and with an iteration, and then no longer."""

    iteration: int
    settings: Mapping[str, Any]


def to_values(former: Iterable[FormerSettings]) -> list[dict[str, Any]]:
    """Return former settings as JSON values."""
    return [asdict(each) for each in former]


def from_values(values: Any, problems: list[str] | None = None) -> tuple[FormerSettings, ...]:
    """Return the former settings of a record; a line is added to `problems` if they have another form."""
    if values is None:
        return ()
    if isinstance(values, list) and len(values) <= _MOST and all(map(_is_valid, values)):
        return tuple(FormerSettings(each["iteration"], each["settings"]) for each in values)
    if problems is not None:
        problems.append(f"{FORMER_SETTINGS}: expected a list of an iteration and settings each")
    return ()


def with_former(name: str, shown: str, former: Sequence[FormerSettings]) -> str:
    """Return the value of a setting with those that it had before: `bf16 (fp8 until iteration 2)`."""
    before = [
        f"{_text(each.settings[name])} until iteration {each.iteration:,}" for each in former if name in each.settings
    ]
    return f"{shown} ({', '.join(before)})" if before else shown


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_valid(each: Any) -> bool:
    return (
        isinstance(each, Mapping)
        and set(each) == {"iteration", "settings"}
        and type(each["iteration"]) is int
        and 0 <= each["iteration"] < 2**62
        and isinstance(each["settings"], Mapping)
        and all(isinstance(value, (str, int, float, list, type(None))) for value in each["settings"].values())
        and len(str(each["settings"])) <= _LONGEST
    )
