"""The jobs that schedulers have, for `jobs`, `logs`, `stop` and `fetch`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixtral_run.config.launchers.registry import LAUNCHERS
from mixtral_run.errors import ConfigError, HostError, MixtralRunError
from mixtral_run.fleet.jobs.fetch import refuse_store
from mixtral_run.fleet.launchers.launcher import JobState, Launcher, Say, launcher_of
from mixtral_run.fleet.launchers.records import JobRecord, find_record, read_records


def scheduled_jobs() -> tuple[list[JobState], list[MixtralRunError]]:
    """Return the state of each recorded job, newest first, and an error for each scheduler that does not answer."""
    states: list[JobState] = []
    errors: list[MixtralRunError] = []
    records = [each for each in read_records() if each.launcher in LAUNCHERS]
    for name in dict.fromkeys(each.launcher for each in records):
        own = [each for each in records if each.launcher == name]
        try:
            states += launcher_of(name).states(own)
        except MixtralRunError as error:
            errors.append(error)
    return sorted(states, key=lambda each: each.record.submitted, reverse=True), errors


def scheduled_job(name: str, on: Sequence[str]) -> tuple[Launcher, JobRecord] | None:
    """Return the launcher and the record of a job; None if no scheduler has a job of this name, or with --on."""
    record = find_record(name) if name and not on else None
    if record is None:
        return None
    if record.launcher not in LAUNCHERS:
        raise ConfigError(
            f"{record.name} belongs to a scheduler that this version of the kit does not know.",
            expected=", ".join(LAUNCHERS),
            found=record.launcher,
        )
    return launcher_of(record.launcher), record


def fetch_scheduled(
    launcher: Launcher, record: JobRecord, destination: Path, overwrite: bool, say: Say
) -> Path:  # fmt: skip
    """Copy the output of an ended job into the folder `destination`, or to that name, and return the path."""
    if not record.output:
        raise ConfigError(f"{record.name} writes no files ({record.verb}).")
    refuse_store(record.name, record.output)
    (state,) = launcher.states([record])
    if state.running:
        raise ConfigError(f"{record.name} is still running.", next_command=f"mixtral-run logs -f {record.name}")
    target = destination / Path(record.output).name if destination.is_dir() else destination
    if target.exists() and not overwrite:
        raise ConfigError(
            "Something of this name already exists.", where=str(target), next_command="another folder, or --overwrite"
        )
    return launcher.fetch(record, target, overwrite, say)


def raise_errors(errors: Sequence[MixtralRunError]) -> None:
    """Raise one error for schedulers and hosts whose jobs are unknown, if there are any."""
    if errors:
        raise HostError("The jobs of some hosts or schedulers are unknown.", problems=[str(each) for each in errors])
