"""Output of `jobs` and `stop` if an engine or a host does not answer, over a real sshd with a stand-in engine."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mixtral_run.cli.commands import fleet_jobs
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import parse_host
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import list_jobs, start
from mixtral_run.fleet.status.read_fleet import read_fleet
from tests.hosts.conftest import HostMaker
from tests.hosts.engine import StandInEngine


def stop(job: str, *targets: str) -> Result:
    return CliRunner().invoke(fleet_jobs.stop, [job, "--on", ",".join(targets)])


@pytest.mark.parametrize("only", ["", "ps"])
@pytest.mark.parametrize(
    "words",
    [
        "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "failed to connect to the docker API at unix:///var/run/docker.sock; check if the path is correct and if the "
        "daemon is running: dial unix /var/run/docker.sock: connect: no such file or directory",
    ],
)
def test_an_engine_that_does_not_answer_is_not_one_without_jobs(light_hosts: HostMaker, only: str, words: str) -> None:
    (host,) = light_hosts(1)
    engine = StandInEngine(host)
    engine.add("finetune-1")
    (row,), errors = list_jobs([parse_host(host.target)])
    assert (row.job, row.running, row.num_hosts, errors) == ("finetune-1", True, 1, [])
    engine.fail(words, only)
    rows, errors = list_jobs([parse_host(host.target)])
    assert rows == []
    assert words in str(errors[0])
    reported = CliRunner().invoke(fleet_jobs.jobs, [host.target])
    assert "No jobs" not in reported.output
    assert isinstance(reported.exception, HostError)


def test_a_host_without_jobs_has_none(light_hosts: HostMaker) -> None:
    (host,) = light_hosts(1)
    StandInEngine(host)
    assert list_jobs([parse_host(host.target)]) == ([], [])
    assert "No jobs." in CliRunner().invoke(fleet_jobs.jobs, [host.target]).output


@pytest.mark.parametrize(
    ("exit_code", "word"), [(0, "✓"), (130, "✓"), (143, "✓"), (137, "was killed"), (6, "exit code 6")]
)
def test_stop_says_whether_the_job_had_the_time_to_save(light_hosts: HostMaker, exit_code: int, word: str) -> None:
    (host,) = light_hosts(1)
    StandInEngine(host).add("finetune-1", ends_with=exit_code)
    done = stop("finetune-1", host.target)
    assert word in done.output + str(done.exception)
    assert isinstance(done.exception, HostError) == (exit_code in (137, 6))
    assert ("✓" in done.output) != isinstance(done.exception, HostError)


def test_stop_fails_where_a_host_of_the_job_cannot_be_asked(light_hosts: HostMaker) -> None:
    first, second = light_hosts(2)
    for host in (first, second):
        StandInEngine(host).add("finetune-1", num_hosts=2)
    second.stop()
    done = stop("finetune-1", first.target, second.target)
    assert "✓ finetune-1 has ended on 127.0.0.1" in done.output
    assert isinstance(done.exception, HostError)
    assert "may still run" in str(done.exception)
    assert "refuses the connection" in str(done.exception)
    second.start()


def test_the_start_of_a_name_stops_the_only_job_that_runs(light_hosts: HostMaker) -> None:
    (host,) = light_hosts(1)
    engine = StandInEngine(host)
    for job in ("finetune-1", "finetune-2", "finetune-3"):
        engine.add(job)
    for job in ("finetune-1", "finetune-3"):
        engine.end(job)
    assert "✓ finetune-2 has ended" in stop("finetune-", host.target).output
    assert [line for line in engine.calls.read_text().splitlines() if line.startswith("stop")] == [
        "stop --time 330 finetune-2"
    ]
    # If all jobs have ended, or if several run, the prefix of a name is ambiguous.
    assert "Several jobs" in str(stop("finetune-", host.target).exception)
    for job in ("finetune-4", "finetune-5"):
        engine.add(job)
    assert "Several jobs" in str(stop("finetune-", host.target).exception)


def test_stop_does_not_mind_a_host_that_the_job_is_not_on(light_hosts: HostMaker) -> None:
    first, second = light_hosts(2)
    StandInEngine(first).add("finetune-1")
    second.stop()
    done = stop("finetune-1", first.target, second.target)
    assert done.exception is None
    assert "✓ finetune-1 has ended" in done.output


def test_a_reader_that_leaves_ends_the_following_quietly(light_hosts: HostMaker) -> None:
    (host,) = light_hosts(1)
    engine = StandInEngine(host)
    engine.add("finetune-1")
    engine.print("finetune-1", "".join(f"iteration {number}\n" for number in range(50_000)))
    words = [sys.executable, "-m", "mixtral_run", "logs", "-f", "finetune-1", "--on", host.target]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"iteration 0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
    (row,), _ = list_jobs([parse_host(host.target)])
    assert row.running


@pytest.mark.parametrize("follow", [[], ["-f"]])
def test_the_two_outputs_of_a_job_stay_apart(light_hosts: HostMaker, follow: list[str]) -> None:
    (host,) = light_hosts(1)
    engine = StandInEngine(host)
    engine.add("generate-1")
    document = json.dumps([{"completion": f"words {number}"} for number in range(100)], indent=2)
    engine.print("generate-1", document, "loading\ngenerating\n")
    engine.end("generate-1")
    words = [sys.executable, "-m", "mixtral_run", "logs", *follow, "generate-1", "--on", host.target]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = [line.split(" ", 1)[-1] if line.startswith("2026-") else line for line in done.stdout.splitlines()]
    assert json.loads("\n".join(lines)) == json.loads(document)
    assert [line.rsplit(" ", 1)[-1] for line in done.stderr.splitlines()] == ["loading", "generating"]
    merged = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    # sshd reads the program's two pipes in any order, so the order between them is not checked.
    assert sorted(merged.stdout.splitlines()) == sorted(done.stdout.splitlines() + done.stderr.splitlines())


def test_a_user_whose_sudo_asks_for_a_password_is_reported_how_to_reach_the_engine(light_hosts: HostMaker) -> None:
    (host,) = light_hosts(1)
    StandInEngine(host).fail("permission denied while trying to connect to the docker API at unix:///run/docker.sock")
    host.program("sudo", "#!/bin/sh\necho 'sudo: a password is required' >&2; exit 1\n")
    remedy = (
        f"mixtral-run bootstrap {host.target} --tags docker --ask-become-pass "
        f'--extra-vars \'{{"docker_add_users": ["{getpass.getuser()}"]}}\''
    )
    with pytest.raises(HostError) as caught:
        start(
            "finetune", FinetuneConfig(load=Path("base"), save=Path("a"), mock_data=True), JobOptions(on=(host.target,))
        )
    assert caught.value.next_command == remedy
    _, (error,) = list_jobs([parse_host(host.target)])
    assert error.next_command == remedy


@pytest.mark.parametrize(
    ("dmesg", "expected"),
    [
        ("echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1", None),
        ("echo '[    7.1] all is well'", ()),
        ("echo '[    7.1] NVRM: Xid (PCI:0000:3b:00): 79'", ("NVRM: Xid (PCI:0000:3b:00): 79",)),
    ],
)
def test_kernel_messages_that_cannot_be_read_are_not_none(
    light_hosts: HostMaker, dmesg: str, expected: tuple[str, ...] | None
) -> None:
    (host,) = light_hosts(1)
    host.program("dmesg", f"#!/bin/sh\n{dmesg}\n")
    (status,) = read_fleet([parse_host(host.target)])
    assert status.error is None
    assert status.xid_errors == expected
