"""What a launcher is: it hands a job over to a scheduler, and asks the scheduler about it afterwards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mixtral_run.config.fields import Config
from mixtral_run.config.launchers.base import LauncherConfig
from mixtral_run.config.launchers.registry import LAUNCHERS
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.launchers.records import JobRecord

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """A job for a scheduler.

    name: of the job, unique. config: of its verb. options: image, folders and environment, as for a job on hosts.
    settings: of the launcher, of its own class.
    """

    name: str
    verb: str
    config: Config
    options: JobOptions
    settings: LauncherConfig


@dataclass(frozen=True, kw_only=True)
class JobState:
    """State of a job, as its scheduler reports it.

    state: a word of the scheduler, in lower case. exit_code: of a job that has ended, if the scheduler still knows it.
    reason: why the job waits or ended, in the scheduler's words; may be empty.
    """

    record: JobRecord
    state: str
    running: bool
    exit_code: int | None = None
    reason: str = ""
    place: str = ""
    """Nodes that the job runs on or ran on."""

    @property
    def described(self) -> str:
        """Return the state with the exit code of a job that has ended, and the scheduler's reason."""
        code = f" ({self.exit_code})" if not self.running and self.exit_code is not None else ""
        return self.state + code + (f": {self.reason}" if self.reason else "")


class Launcher(Protocol):
    """A scheduler. All methods raise MixtralRunError with the scheduler's words if it refuses or does not answer."""

    not_used: frozenset[str]
    """Fields of JobOptions that the launcher has no use for. If one is given, the job is refused."""

    def render(self, request: LaunchRequest) -> str:
        """Return what the scheduler would be given, as text (`--dry-run`). Contact nothing."""

    def submit(self, request: LaunchRequest, say: Say) -> JobRecord:
        """Give the scheduler the job and return its record. `launch_job` writes the record to the state folder."""

    def follow(self, record: JobRecord, say: Say) -> None:
        """Print the job's output until its end. Raise the error that the job ended with, or Left."""

    def states(self, records: Sequence[JobRecord]) -> list[JobState]:
        """Return the state of each job."""

    def print_log(self, record: JobRecord, tail: int | None) -> None:
        """Print the job's output so far, or only its last `tail` lines."""

    def stop(self, record: JobRecord, say: Say) -> None:
        """Ask the job to save and end, wait for its end, and report it. The job must not start again by itself."""

    def fetch(self, record: JobRecord, target: Path, overwrite: bool, say: Say) -> Path:
        """Copy the output of an ended job to `target` and return that path."""


def launcher_of(name: str) -> Launcher:
    """Return the launcher of a name in LAUNCHERS."""
    module, _, attribute = LAUNCHERS[name][1].partition(":")
    launcher: Launcher = getattr(importlib.import_module(module), attribute)()
    return launcher
