"""Settings of `--launcher slurm`. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixtral_run.config.fields import setting
from mixtral_run.config.launchers.base import LauncherConfig

SLURM = "Slurm"
"""Section of --help."""
CONTAINER_RUNTIMES = ("docker", "enroot", "apptainer", "none")

WORD = r"[A-Za-z0-9_.,:=+@%/*&|()\[\]!-]+"
"""Values of #SBATCH lines. sbatch gives quotes, backslashes, blanks and # a meaning there, so they are refused."""
_TIME = r"\d+(:\d\d){0,2}|\d+-\d{1,2}(:\d\d){0,2}"
OWN_OPTIONS = (
    "array", "bb", "bbf", "begin", "chdir", "clusters", "container", "dependency", "error", "export", "export-file",
    "get-user-env", "gpus", "gpus-per-node", "gpus-per-task", "gres", "het-group", "input", "job-name", "no-requeue",
    "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "wait",
    "wrap",
)  # fmt: skip
"""Options of sbatch that the script sets itself, or that would break what it relies on."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(LauncherConfig):
    """A job as Slurm gets it."""

    container_runtime: str = setting(
        "docker",
        help="Container of the job on each node. enroot: the site's Slurm needs the plugin Pyxis. none: the job runs "
        "in the environment of --python.",
        choices=CONTAINER_RUNTIMES,
        section=SLURM,
    )
    login: str | None = setting(
        None,
        help="Login node that has sbatch, reached over SSH: [user@]name[:port]. Default: this machine has it.",
        section=SLURM,
    )
    partition: str | None = setting(None, help="Partition.", section=SLURM)
    account: str | None = setting(None, help="Account that is charged.", section=SLURM)
    qos: str | None = setting(None, help="Quality of service.", section=SLURM)
    constraint: str | None = setting(None, help="Features that the nodes must have.", section=SLURM)
    time: str | None = setting(
        None, help="Time limit of one attempt, such as 120 (minutes), 12:00:00 or 2-00:00:00.", section=SLURM
    )
    save_seconds: int = setting(
        330,
        help="Seconds before the time limit at which the job is asked to save. The job is then queued again.",
        minimum=30,
        maximum=36000,
        section=SLURM,
    )
    slurm_option: tuple[str, ...] = setting(
        (), help="Another option of sbatch, KEY=VALUE or KEY, without dashes. May be repeated.", section=SLURM
    )
    python: str = setting(
        "python", help="With --container-runtime none: Python that has the kit, on all nodes.", section=SLURM
    )

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("partition", "account", "qos", "constraint"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(WORD, value):
                found.append(f"--{name}: expected a value without blanks, quotes, # or backslashes; found {value!r}")
        if self.time is not None and not re.fullmatch(_TIME, self.time):
            found.append(f"--time: expected MINUTES, HH:MM:SS or D-HH:MM:SS; found {self.time!r}")
        named = ("partition", "account", "qos", "constraint", "time")
        for text in self.slurm_option:
            key, equals, value = text.partition("=")
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or (equals and not re.fullmatch(WORD, value)):
                found.append(
                    f"--slurm-option: expected KEY=VALUE without blanks, quotes, # or backslashes; found {text!r}"
                )
            elif key in named:
                found.append(f"--slurm-option {key}: expected --{key}, the flag of the kit; found {text!r}")
            elif key in OWN_OPTIONS:
                found.append(f"--slurm-option {key}: the script sets it itself, or cannot work with it")
        if self.container_runtime != "none" and self.python != "python":
            found.append("--python: expected --container-runtime none with it; found " + self.container_runtime)
        return found
