"""Record that the health watch of a host writes (`roles/health/files/health_watch.py`), as `status` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mixtral_run.fleet.untrusted import one_line

MAX_SHOWN = 8
LATE = 3
"""Number of intervals without a look after which the watch counts as dead."""


@dataclass(frozen=True)
class Health:
    """What the last look of the health watch found: (level, text), where the level is bad, warn or unknown."""

    findings: tuple[tuple[str, str], ...]
    silent_minutes: int = 0
    """Minutes since the last look, if the watch should have looked again since; else 0."""

    def __str__(self) -> str:
        if self.silent_minutes:
            return f"not watched for {self.silent_minutes} min"
        levels = [level for level, _ in self.findings]
        counts = [f"{levels.count(level)} {level}" for level in ("bad", "warn", "unknown") if level in levels]
        return ", ".join(counts) or "fine"

    @property
    def warnings(self) -> list[str]:
        """Return what `status` warns of, the worst first."""
        late = [f"health watch: no look for {self.silent_minutes} min; see journalctl -u mixtral-run-health"]
        ordered = sorted(self.findings, key=lambda finding: ("bad", "warn", "unknown").index(finding[0]))
        shown = [f"health: {text}" for _, text in ordered[:MAX_SHOWN]]
        more = [f"health: {len(ordered) - MAX_SHOWN} more findings"] if len(ordered) > MAX_SHOWN else []
        return (late if self.silent_minutes else []) + shown + more


def health_of(record: Any, now: Any) -> Health:
    """Return the health in the JSON values of a record. now: the host's clock in seconds since 1970, if it is known.

    A record in another form gives a finding that says so: the host is not trusted, and its other readings are shown.
    """
    try:
        findings = tuple((_level(each["level"]), one_line(str(each["text"]))) for each in record["findings"])
        age, interval = float(now) - float(record["epoch"]), float(record["interval_seconds"])
        return Health(findings, int(min(age, 1e9) / 60) if age > LATE * max(interval, 60.0) else 0)
    except (TypeError, ValueError, KeyError, OverflowError):
        return Health((("unknown", "the record of the health watch cannot be read"),))


def _level(value: Any) -> str:
    if value not in ("bad", "warn", "unknown"):
        raise ValueError(value)
    return str(value)
