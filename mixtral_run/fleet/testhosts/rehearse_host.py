"""A throw-away host for rehearsing the provisioning: a container with systemd, SSH and an engine of its own.

The hosts are those of the tests (mixtral_run/fleet/testhosts), which a checkout has and a wheel has not.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.trial import RehearseConfig
from mixtral_run.errors import CheckFailed
from mixtral_run.fleet.bootstrap.bootstrap import BootstrapRequest, bootstrap
from mixtral_run.fleet.hosts import Host, forget_hosts
from mixtral_run.fleet.jobs.job_log import Left
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.run_on_hosts import run_on_hosts
from mixtral_run.fleet.plays.provisioning import playbook, provisioning_folder
from mixtral_run.fleet.plays.runner import list_tasks
from mixtral_run.fleet.ssh.connection import Ssh, program_answers
from mixtral_run.fleet.state import state_folder, write_private
from mixtral_run.report import Report

NAME = "rehearsal"
CHECKPOINTS = "/srv/checkpoints"


@dataclass(frozen=True)
class Throwaway:
    """A host that runs, and the variables that set it up."""

    host: Host
    variables: dict[str, Any]


def rehearse_host(config: RehearseConfig, report: Report | None = None) -> bool:
    """Start a throw-away host, bootstrap it over SSH, run the rehearsal in its container, and remove it again.

    Returns False, and tells what bootstrap would do, where no Docker engine answers. Raises the first step's error.
    """
    report = report or Report()
    reason = why_not()
    if reason:
        report.warn(f"The provisioning is not rehearsed: {reason}.")
        report.say("What `mixtral-run bootstrap --check` would go through on a host:")
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
            # The engine gives ports again: an earlier host's key may be recorded for this one's.
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
            report.say("The throw-away host is removed, and the job ends with it.")
            raise
        finally:
            Ssh().forget_key(found.host)
    report.done("A bare host was set up over SSH, and the whole job ran in its container")
    return True


def why_not() -> str | None:
    """Why no throw-away host can be had here; None when one can."""
    if not program_answers("docker", "info"):
        return "no Docker engine answers here"
    if not (provisioning_folder() / "tests").is_dir():
        return "throw-away hosts come with a checkout of the kit, not with the wheel"
    return None


@contextmanager
def throwaway(name: str, report: Report) -> Iterator[Throwaway]:
    """A host that is gone afterwards, with an image of the whole kit laid beside its engine.

    So is the package server, unless other hosts of this checkout use it. SIGTERM is KeyboardInterrupt meanwhile.
    """
    from mixtral_run.fleet.testhosts import hosts as targets
    from mixtral_run.fleet.testhosts import kit_image, repository
    from mixtral_run.fleet.testhosts.__main__ import variables as variables_of

    targets.remove(name)
    try:
        with _on({signal.SIGTERM: signal.default_int_handler}):
            with report.waiting("Building the kit's image: minutes the first time"):
                kit_image.image_archive()
            with report.waiting("Starting the host, and the package server beside it"):
                started = targets.start(name)
                common = variables_of()
            variables = {
                **common,
                "preflight_num_gpus": 0,
                "image_source": "archive",
                "image_archive": kit_image.ARCHIVE_ON_HOST,
                "image_archive_on_host": True,
                "image_archive_name": kit_image.ARCHIVE_NAME,
                # The list of swap files is the machine's, not the container's: names must not meet.
                "swap_path": f"{targets.DATA_FOLDER}/swapfile-{name}",
            }
            del variables["image_requirements"]
            host = Host(name, "127.0.0.1", started.user, started.port, str(Path(started.key)))
            yield Throwaway(host, variables)
    except RuntimeError as error:
        raise CheckFailed("The throw-away host could not be had.", found=str(error)[-600:]) from error
    finally:
        # Who is tired of waiting presses Ctrl-C again, which the engine's client would hear as well.
        with _on(dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)):
            targets.remove(name)
            repository.stop_unless_used()


@contextmanager
def _on(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Handle signals so meanwhile."""
    kept = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
