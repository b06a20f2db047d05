# ruff: noqa: ARG002
"""The launcher for Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.launchers.launcher import JobState, LaunchRequest, Say
from mixtral_run.fleet.launchers.records import JobRecord


class SlurmLauncher:
    """Slurm, through sbatch, scontrol and scancel."""

    not_used: frozenset[str] = frozenset()

    def render(self, request: LaunchRequest) -> str:
        raise _unavailable()

    def submit(self, request: LaunchRequest, say: Say) -> JobRecord:
        raise _unavailable()

    def follow(self, record: JobRecord, say: Say) -> None:
        raise _unavailable()

    def states(self, records: Sequence[JobRecord]) -> list[JobState]:
        raise _unavailable()

    def print_log(self, record: JobRecord, tail: int | None) -> None:
        raise _unavailable()

    def stop(self, record: JobRecord, say: Say) -> None:
        raise _unavailable()

    def fetch(self, record: JobRecord, target: Path, overwrite: bool, say: Say) -> Path:
        raise _unavailable()


def _unavailable() -> ConfigError:
    return ConfigError("This version of the kit submits nothing to Slurm.", next_command="--on HOST")
