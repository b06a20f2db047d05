"""Rehearsal of the provisioning on a throw-away host: a container with systemd, sshd and its own Docker engine.

Works from a checkout and from an installed wheel. The automated host tests use the same hosts.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.verbs.trial import RehearseConfig
from mixtral_run.errors import CheckFailed
from mixtral_run.fleet.bootstrap.bootstrap import BootstrapRequest, bootstrap
from mixtral_run.fleet.hosts import Host, forget_hosts
from mixtral_run.fleet.jobs.job_log import Left
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.run_on_hosts import run_on_hosts
from mixtral_run.fleet.plays.provisioning import playbook
from mixtral_run.fleet.plays.runner import list_tasks
from mixtral_run.fleet.ssh.connection import Ssh, program_answers
from mixtral_run.fleet.state import state_folder, write_private
from mixtral_run.fleet.testhosts import disks, hosts, kit_image, repository
from mixtral_run.fleet.testhosts.__main__ import variables as variables_of
from mixtral_run.terminal.report import Report

NAME = "rehearsal"
CHECKPOINTS = "/srv/checkpoints"


@dataclass(frozen=True)
class Throwaway:
    """A running throw-away host and the Ansible variables for its bootstrap."""

    host: Host
    variables: dict[str, Any]


def rehearse_host(config: RehearseConfig, report: Report | None = None) -> bool:
    """Start a throw-away host, bootstrap it over SSH, run the rehearsal in its container, and remove the host.

    Returns:
        False if no Docker engine answers. The tasks that bootstrap would run are listed then.

    Raises:
        MixtralRunError: the error of the first step that failed.
    """
    report = report or Report()
    reason = why_not()
    if reason:
        report.warn(f"The provisioning is not rehearsed: {reason}.")
        report.say("Tasks that `mixtral-run bootstrap --check` would run on a host:")
        for line in list_tasks(playbook("bootstrap")):
            report.say(f"  {line}")
        return False
    report.step(1, 3, "Start a throw-away host")
    with throwaway(NAME, report) as found:
        report.step(2, 3, f"Bootstrap {found.host.target}")
        variables = state_folder("tmp") / "rehearsal-variables.json"
        write_private(variables, json.dumps(found.variables))
        inventory = state_folder("tmp") / "rehearsal-hosts.json"
        write_private(inventory, json.dumps({"mixtral_hosts": {"hosts": {NAME: found.host.ansible_variables()}}}))
        try:
            # The engine reuses ports: the key of an earlier host may be recorded for this host's port.
            end = bootstrap(
                BootstrapRequest(inventory=inventory, extra_vars=(f"@{variables}",), accept_new_host_key=(NAME,))
            )
            report.say(end.text)
            forget_hosts([found.host])
            end.raise_if_bad()
            report.step(3, 3, "Rehearse in its container")
            options = JobOptions(
                on=(NAME,), inventory=inventory, shm_size="1g", ulimits=("none",), checkpoints_folder=CHECKPOINTS
            )
            run_on_hosts("rehearse", RehearseConfig(device=config.device, seed=config.seed), options)
        except Left:
            report.say("The throw-away host is removed, and the job ends with the host.")
            raise
        finally:
            Ssh().forget_key(found.host)
    report.done("A bare host was set up over SSH, and the whole job ran in its container")
    return True


def why_not() -> str | None:
    """Return the reason why this machine cannot run a throw-away host, or None if it can."""
    return None if program_answers("docker", "info") else "no Docker engine answers here"


@contextmanager
def throwaway(name: str, report: Report) -> Iterator[Throwaway]:
    """Run a throw-away host for the duration of the context. Its disk and its image archive hold the kit.

    The package server is removed with the host unless other throw-away hosts of this installation use it. Inside the
    context, SIGTERM raises KeyboardInterrupt.

    Raises:
        CheckFailed: the host could not be started.
    """
    hosts.remove(name)
    try:
        with _signal_handlers({signal.SIGTERM: signal.default_int_handler}):
            with report.waiting("Building the kit's image: takes minutes the first time"):
                kit_image.image_archive()
                disk = disks.with_images("bookworm")
            with report.waiting("Starting the host and its package server"):
                started = hosts.start(name, disk=disk)
                common = variables_of()
            variables = {
                **common,
                "preflight_num_gpus": 0,
                "image_source": "archive",
                "image_archive": kit_image.LAYERS_ON_HOST,
                "image_archive_on_host": True,
                "image_archive_name": kit_image.ARCHIVE_NAME,
                # /proc/swaps lists the swap files of the whole machine: each host needs another file name.
                "swap_path": f"{hosts.DATA_FOLDER}/swapfile-{name}",
            }
            del variables["image_requirements"]
            host = Host(name, "127.0.0.1", started.user, started.port, str(Path(started.key)))
            yield Throwaway(host, variables)
    except RuntimeError as error:
        raise CheckFailed("The throw-away host could not be started.", found=str(error)[-600:]) from error
    finally:
        # A second Ctrl-C would also reach the Docker client that removes the host.
        with _signal_handlers(dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)):
            hosts.remove(name)
            repository.stop_unless_used()


@contextmanager
def _signal_handlers(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Install signal handlers for the duration of the context."""
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
