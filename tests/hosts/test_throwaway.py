"""rehearse --host: it starts a throw-away host if an engine answers; otherwise it reports that and the next step."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtral_run.fleet.hosts import remembered_hosts
from mixtral_run.fleet.rehearse_host import NAME, throwaway
from mixtral_run.fleet.ssh.connection import known_hosts_file
from mixtral_run.fleet.state import write_private
from mixtral_run.fleet.testhosts import hosts
from mixtral_run.fleet.testhosts.engine import CACHE
from mixtral_run.fleet.testhosts.hosts import container_name
from mixtral_run.fleet.testhosts.repository import CONTAINER
from mixtral_run.fleet.testhosts.shell import call
from mixtral_run.terminal.report import Report

PORTS = range(32768, 61000)
"""Which the engine gives, time and again."""
OLD_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"


REHEARSE = [sys.executable, "-m", "mixtral_run", "rehearse", "--host"]


def rehearse() -> subprocess.CompletedProcess[str]:
    return subprocess.run(REHEARSE, capture_output=True, text=True, check=False)


def left_of(name: str) -> set[str]:
    """Return the objects of a throw-away host that the engine still has: container, disk and package server."""
    servers = call("docker", "ps", "--all", "--format", "{{.Names}}", "--filter", f"name=^{CONTAINER}$").split()
    return hosts.left_of(name) | set(servers)


@pytest.mark.timeout(1800)  # the first time it builds the image
def test_a_host_is_started_set_up_and_does_the_whole_job(
    docker_engine: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXTRAL_RUN_TEST_CACHE", str(CACHE))  # the cache is in the real home folder
    write_private(known_hosts_file(), "".join(f"[127.0.0.1]:{port} {OLD_KEY}\n" for port in PORTS))
    done = rehearse()
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert re.search(rf"^✓ {NAME} +done +[1-9]", done.stdout, re.MULTILINE)
    assert "PEFT over HF gives the same logits" in done.stdout
    assert "A bare host was set up over SSH, and the whole job ran in its container" in done.stdout
    # Nothing of the host remains: no container, no disk, and no entry in the fleet.
    assert not left_of(NAME)
    assert not remembered_hosts()
    # Its key is removed as well. The old keys stay, except the key of the port that the host had.
    assert len(known_hosts_file().read_text().splitlines()) == len(PORTS) - 1


def test_interrupted_it_leaves_nothing(docker_engine: None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RUN_TEST_CACHE", str(CACHE))
    process = subprocess.Popen(REHEARSE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    reported = ""
    while "Connecting to" not in reported:
        reported += (line := process.stdout.readline())
        assert line, reported
    assert left_of(NAME) >= {container_name(NAME), CONTAINER}
    for how in itertools.cycle((signal.SIGTERM, signal.SIGINT)):
        if process.poll() is not None:
            break
        process.send_signal(how)  # repeated signals change nothing
        time.sleep(0.5)
    assert process.returncode == 130, reported + process.stdout.read()
    assert not left_of(NAME)


def test_the_package_server_goes_with_the_last_host_that_uses_it(
    docker_engine: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal ends one of two hosts, and an error the other."""

    def fail() -> None:
        with throwaway("throwaway-1", Report.silent()):
            with pytest.raises(KeyboardInterrupt), throwaway("throwaway-2", Report.silent()):
                assert left_of("throwaway-2") >= {container_name("throwaway-2"), CONTAINER}
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            assert left_of("throwaway-2") == {CONTAINER}
            raise ValueError("it failed")

    with pytest.raises(ValueError, match="it failed"):
        fail()
    assert not left_of("throwaway-1")


@pytest.mark.parametrize("problem", ["no program", "no engine"])
def test_without_an_engine_it_says_so_and_shows_what_bootstrap_would_do(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    if problem == "no program":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nowhere.sock")
    done = rehearse()
    assert done.returncode == 0, done.stderr
    assert "no Docker engine answers here" in done.stdout
    lines = done.stdout.splitlines()
    roles = [line.split(" · ")[0].strip() for line in lines if " · " in line]
    assert list(dict.fromkeys(roles)) == [
        "preflight", "nvidia_driver", "docker", "nvidia_container_toolkit", "swap", "image", "hf_cache", "health",
        "acceptance",
    ]  # fmt: skip
