"""Run of a verb on hosts (`--on`): start, live output, next command."""

from __future__ import annotations

import sys

from mixtral_run.config.fields import Config
from mixtral_run.fleet.jobs.job_log import JobFollower
from mixtral_run.fleet.jobs.job_spec import OUTPUTS, JobOptions, host_path
from mixtral_run.fleet.jobs.jobs import RunningJob, start


def run_on_hosts(verb: str, config: Config, options: JobOptions) -> RunningJob:
    """Run a verb on hosts and print its output until it ends; with `detach`, only start it.

    Raises the error class that belongs to the job's exit code, or Left if the user left the running job.
    """

    def say(text: str) -> None:
        # Standard output is the job's output only: `generate --json --on HOST | jq` works.
        print(text, file=sys.stderr, flush=True)

    job = start(verb, config, options)
    names = ", ".join(host.name for host in job.hosts)
    say(
        f"{job.name} runs on {names}. It continues if you leave (Ctrl-C twice); to stop it: mixtral-run stop {job.name}"
    )
    if options.detach:
        say(f"output: mixtral-run logs -f {job.name}")
        return job
    JobFollower(job, say=say).follow()
    say(f"✓ {job.name} is done")
    output = next((str(path) for name in OUTPUTS if (path := getattr(config, name, None))), None)
    if output:
        place = output if output.startswith("/") else host_path(f"/checkpoints/{output}", options)
        say(f"  output: {place}; to copy it here: mixtral-run fetch {job.name}")
    return job
