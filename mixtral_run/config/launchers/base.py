"""Settings that all launchers share. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.config.fields import Config, setting

SCHEDULERS = "Schedulers"
"""Section of --help."""


@dataclass(frozen=True, kw_only=True)
class LauncherConfig(Config):
    """Size of a job that a scheduler starts."""

    nodes: int = setting(1, help="With --launcher: nodes of the job.", minimum=1, maximum=4096, section=SCHEDULERS)
    gpus_per_node: int = setting(
        8,
        help="With --launcher: GPUs of each node, one process for each. 0: CPU, with --nproc-per-node processes.",
        minimum=0,
        maximum=64,
        section=SCHEDULERS,
    )
