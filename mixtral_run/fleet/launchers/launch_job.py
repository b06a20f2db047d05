"""Hand a job over to a scheduler (`--launcher`): check it, submit it, follow it."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Collection, Sequence

from mixtral_run.config.fields import SETTINGS_ERROR, Config, flag_of
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.launchers.base import LauncherConfig
from mixtral_run.config.names.store_names import store_url
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.launchers.launcher import LaunchRequest, launcher_of
from mixtral_run.fleet.launchers.records import write_record

ONLY_ON_HOSTS = frozenset({"on", "inventory", "min_hosts", "wait", "share"})
"""Fields of JobOptions that belong to --on and not to a scheduler."""
FLAGS = {"environment": "--env", "ulimits": "--ulimit", "on": "--on", "inventory": "--inventory"}


def launch_job(
    name: str, verb: str, config: Config, options: JobOptions, settings: LauncherConfig, given: Collection[str],
    dry_run: bool, problems: Sequence[str] = (),
) -> None:  # fmt: skip
    """Submit a job and follow it to its end; with `dry_run` print what would be submitted.

    Args:
        options, settings: as the user gave them; they are checked here.
        given: names of the fields of `options` that the user gave.
        problems: what is wrong already.

    Raises ConfigError with these, with all that is wrong in the settings, and with what the launcher does not use.
    """
    launcher = launcher_of(name)
    problems = list(problems)
    problems += [
        f"{FLAGS.get(each) or flag_of(each)}: --launcher {name} does not use it"
        for each in given
        if each in launcher.not_used | ONLY_ON_HOSTS
    ]
    if settings.nodes > 1 and not isinstance(config, LaunchConfig):
        problems.append(f"--nodes: {verb} runs on one node; found {settings.nodes}")
    for checked in (settings, options):
        try:
            checked.check()
        except ConfigError as error:
            problems += error.problems or [error.what]
    if problems:
        raise ConfigError(SETTINGS_ERROR, problems=problems)
    job = f"{verb}-{time.strftime('%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:4]}"
    request = LaunchRequest(name=job, verb=verb, config=config, options=options, settings=settings)
    if dry_run:
        print(launcher.render(request), end="")
        return
    record = launcher.submit(request, _say)
    write_record(record)
    _say(f"{job} is job {record.scheduler_id} of {name}. It continues if you leave (Ctrl-C twice)")
    _say(f"  to stop it: mixtral-run stop {job}; its output: mixtral-run logs -f {job}")
    if options.detach:
        return
    launcher.follow(record, _say)
    _say(f"✓ {job} is done")
    if store_url(record.output):
        _say(f"  output: {record.output}")
    elif record.output:
        _say(f"  output: {record.output}; to copy it here: mixtral-run fetch {job}")


def _say(text: str) -> None:
    # Standard output is the job's output only.
    print(text, file=sys.stderr, flush=True)
