"""Records of the jobs that were handed over to schedulers, one file a job in the operator's state folder."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.state import read_json, state_folder, write_json

FOLDER = "scheduled-jobs"
KEPT_RECORDS = 200


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job that a scheduler has. Everything that the other verbs need to find it again.

    scheduler_id: the scheduler's own name of the job. output: absolute path that the job writes to, or "".
    submitted: UTC, ISO 8601. extra: text values that only the launcher reads, such as the login node.
    """

    name: str
    launcher: str
    verb: str
    scheduler_id: str
    output: str = ""
    submitted: str = ""
    extra: dict[str, str] = field(default_factory=dict)


def write_record(record: JobRecord) -> None:
    """Write a record, and remove the oldest ones beyond KEPT_RECORDS."""
    folder = state_folder(FOLDER)
    write_json(folder / f"{record.name}.json", dataclasses.asdict(record))
    files = sorted(folder.glob("*.json"), key=lambda each: each.stat().st_mtime, reverse=True)
    for file in files[KEPT_RECORDS:]:
        file.unlink(missing_ok=True)


def read_records() -> list[JobRecord]:
    """Return all records, newest first. A file in another form is skipped: a later version may have written it."""
    found = [_record(read_json(file, None)) for file in state_folder(FOLDER).glob("*.json")]
    return sorted((each for each in found if each is not None), key=lambda each: each.submitted, reverse=True)


def _record(values: Any) -> JobRecord | None:
    names = {item.name for item in dataclasses.fields(JobRecord)}
    texts = names - {"extra"}
    if not isinstance(values, dict) or set(values) != names:
        return None
    extra = values["extra"]
    if not all(isinstance(values[name], str) for name in texts) or not isinstance(extra, dict):
        return None
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,127}", values["name"]):
        return None
    return JobRecord(**values)


def find_record(name: str) -> JobRecord | None:
    """Return the record of a job by its name or the start of its name; None if no record matches.

    Raises ConfigError if several match.
    """
    records = read_records()
    matching = [each for each in records if each.name == name] or [
        each for each in records if each.name.startswith(name)
    ]
    if len(matching) > 1:
        raise ConfigError(
            f"Several jobs are called {name!r}.",
            found=", ".join(each.name for each in matching[:5]),
            next_command="mixtral-run jobs",
        )
    return matching[0] if matching else None
