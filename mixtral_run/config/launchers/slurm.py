"""Settings of `--launcher slurm`. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixtral_run.config.fields import setting
from mixtral_run.config.launchers.base import LauncherConfig

SLURM = "Slurm"
"""Section of --help."""
CONTAINER_RUNTIMES = ("docker", "enroot", "apptainer", "none")

_WORD = r"[A-Za-z0-9_.,:=+@%/*&|()\[\]!-]+"
"""Values of #SBATCH lines. sbatch gives quotes, backslashes, blanks and # a meaning there, so they are refused."""
_EXPECTED = "without blanks, quotes, backslashes and #"
_TIME = re.compile(
    r"(?:(?P<days>\d{1,4})-(?P<h>\d{1,2})(?::(?P<m>\d\d))?(?::(?P<s>\d\d))?"
    r"|(?P<hours>\d{1,4}):(?P<min>\d\d):(?P<sec>\d\d)|(?P<minutes>\d{1,6})(?::(?P<seconds>\d\d))?)"
)
NAMED = ("partition", "account", "qos", "constraint", "time")
"""Settings that are options of sbatch of the same name."""
OWN_OPTIONS = (
    "array", "bb", "bbf", "chdir", "clusters", "container", "cpus-per-task", "dependency", "error", "exclusive",
    "export", "export-file", "get-user-env", "gpus", "gpus-per-node", "gpus-per-task", "gres", "het-group", "input",
    "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "quiet",
    "requeue", "signal", "test-only", "wait", "wrap",
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
    partition: str | None = setting(None, help="Partition of the job.", section=SLURM)
    account: str | None = setting(None, help="Account that is charged.", section=SLURM)
    qos: str | None = setting(None, help="Quality of service.", section=SLURM)
    constraint: str | None = setting(None, help="Features that the nodes must have.", section=SLURM)
    time: str | None = setting(
        None, help="Time limit of each attempt, such as 120 (minutes), 12:00:00 or 2-00:00:00.", section=SLURM
    )
    save_seconds: int = setting(
        330,
        help="Seconds before the time limit at which the job is asked to save. Then the job is queued again.",
        minimum=10,
        maximum=36000,
        section=SLURM,
    )
    cpus_per_task: int | None = setting(
        None,
        help="CPUs of the job on each node, which it then shares with other jobs. Default: whole nodes.",
        minimum=1,
        section=SLURM,
    )
    jobs_folder: str | None = setting(
        None,
        help="Folder for the script, the settings and the output of jobs, at the same path on all nodes. Default: "
        "~/.local/state/mixtral-run/jobs.",
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
            if value is not None and not re.fullmatch(_WORD, value):
                found.append(f"--{name}: expected a value {_EXPECTED}; found {value!r}")
        for text in self.slurm_option:
            found += _option_problems(text)
        if self.time is not None and self.time_seconds is None:
            found.append(f"--time: expected MINUTES, HH:MM:SS or D-HH:MM:SS; found {self.time!r}")
        elif self.time_seconds is not None and self.time_seconds <= self.save_seconds:
            found.append(
                f"--save-seconds: expected fewer than the {self.time_seconds} of --time; found {self.save_seconds}"
            )
        if self.jobs_folder is not None and not re.fullmatch(r"/[\w./+@-]+", self.jobs_folder):
            found.append(f"--jobs-folder: expected an absolute path {_EXPECTED}; found {self.jobs_folder!r}")
        if self.container_runtime != "none" and self.python != "python":
            found.append(f"--python: expected --container-runtime none; found {self.container_runtime}")
        return found

    @property
    def time_seconds(self) -> int | None:
        """The time limit; None if there is none, or if it is not in a form of Slurm."""
        match = _TIME.fullmatch(self.time or "")
        if match is None:
            return None
        parts = {name: int(value or 0) for name, value in match.groupdict().items()}
        minutes = 60 * (24 * parts["days"] + parts["h"] + parts["hours"]) + parts["m"] + parts["min"] + parts["minutes"]
        return 60 * minutes + parts["s"] + parts["sec"] + parts["seconds"]


def _option_problems(text: str) -> list[str]:
    """Return the problem of a --slurm-option, if it has one."""
    key, equals, value = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or (equals and not re.fullmatch(_WORD, value)):
        return [f"--slurm-option: expected KEY=VALUE {_EXPECTED}; found {text!r}"]
    if key in NAMED:
        return [f"--slurm-option {text}: expected --{key}, which is a flag of the kit"]
    if key in OWN_OPTIONS:
        return [f"--slurm-option {text}: the script sets {key} itself, or cannot work with it"]
    return []
