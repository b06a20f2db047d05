"""A verb with --on: start it on its hosts, show its output, say what to do next."""

from __future__ import annotations

import sys

from mixtral_run.config.fields import Config
from mixtral_run.fleet.jobs.job_log import JobFollower
from mixtral_run.fleet.jobs.job_spec import JobOptions, host_path
from mixtral_run.fleet.jobs.jobs import RunningJob, start


def run_on_hosts(verb: str, config: Config, options: JobOptions) -> RunningJob:
    """Run a verb on hosts and show its output until it ends; with `detach`, only start it.

    Raises the job's failure as the class of its exit code, Left where the person left.
    """

    def say(text: str) -> None:
        # Standard output belongs to the job: `generate --json --on HOST | jq` works.
        print(text, file=sys.stderr, flush=True)

    job = start(verb, config, options)
    names = ", ".join(host.name for host in job.hosts)
    say(f"{job.name} runs on {names}. It goes on when you leave (Ctrl-C twice); to end it: mixtral-run stop {job.name}")
    if options.detach:
        say(f"output: mixtral-run logs -f {job.name}")
        return job
    JobFollower(job, say=say).follow()
    say(f"✓ {job.name} is done")
    output = next(
        (str(path) for name in ("save", "output_path", "work_path") if (path := getattr(config, name, None))), None
    )
    if output:
        place = output if output.startswith("/") else host_path(f"/checkpoints/{output}", options)
        say(f"  it wrote {place}; to bring it here: mixtral-run fetch {job.name}")
    return job
