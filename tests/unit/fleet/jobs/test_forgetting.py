"""Files of ended jobs are removed from a host; those of running jobs stay. The script runs here, without an engine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.jobs.host_facts import HostFacts
from mixtral_run.fleet.jobs.jobs import _forget_old
from mixtral_run.fleet.ssh.connection import Answer, Ssh

DOCKER = """#!/bin/sh
# STAND-IN for docker: `jobs` holds the job of each container. A question with a format lists them.
case "$*" in *--format*) cat '{jobs}' ;; esac
"""


class ThisMachine:
    """STAND-IN for SSH: the host is this machine."""

    def run(self, host: Host, command: Sequence[str]) -> Answer:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """The folder of the files of 60 jobs; job-00 is the oldest."""
    docker = tmp_path / "docker"
    docker.write_text(DOCKER.format(jobs=tmp_path / "containers"))
    docker.chmod(0o755)
    folder = tmp_path / "jobs"
    for number in range(60):
        job = folder / f"job-{number:02}"
        job.mkdir(parents=True)
        os.utime(job, (1000 + number, 1000 + number))
    return folder


def forget(folder: Path) -> set[str]:
    facts = HostFacts(docker=(str(folder.parent / "docker"),), folder=str(folder))
    _forget_old(cast(Ssh, ThisMachine()), parse_host("gpu-01"), facts)
    return {path.name for path in folder.iterdir()}


def test_the_folder_of_a_running_job_stays_however_old_it_is(jobs: Path) -> None:
    newest = {f"job-{number:02}" for number in range(11, 60)}
    (jobs.parent / "containers").write_text("job-03\njob-05\njob-59\n")
    assert forget(jobs) == newest | {"job-03", "job-05"}
    (jobs.parent / "containers").write_text("")
    assert forget(jobs) == newest


def test_an_engine_that_does_not_answer_removes_nothing(jobs: Path) -> None:
    assert len(forget(jobs)) == 60
