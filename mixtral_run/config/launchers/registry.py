"""The values of `--launcher`. A new launcher adds its settings class in a module of its own, and a line here.

Standard library only.
"""

from __future__ import annotations

from mixtral_run.config.launchers.base import LauncherConfig
from mixtral_run.config.launchers.kubernetes import KubernetesConfig
from mixtral_run.config.launchers.slurm import SlurmConfig

LAUNCHERS: dict[str, tuple[type[LauncherConfig], str]] = {
    "kubernetes": (KubernetesConfig, "mixtral_run.fleet.launchers.kubernetes.launcher:KubernetesLauncher"),
    "slurm": (SlurmConfig, "mixtral_run.fleet.launchers.slurm.launcher:SlurmLauncher"),
}
"""For each launcher: its settings, whose fields become flags, and `module:class` of its `Launcher`, imported on use."""
