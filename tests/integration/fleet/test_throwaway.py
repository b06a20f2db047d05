"""rehearse --host: a throw-away host where an engine answers; where none does, it says so and shows the way."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_run.fleet.hosts import remembered_hosts
from mixtral_run.fleet.ssh import known_hosts_file
from mixtral_run.fleet.state import write_private
from mixtral_run.fleet.throwaway import NAME
from tests.targets.engine import CACHE
from tests.targets.hosts import container_name
from tests.targets.shell import call

PORTS = range(32768, 61000)
"""Which the engine gives, time and again."""
OLD_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"


def rehearse() -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "mixtral_run", "rehearse", "--host"]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1800)  # the first time it builds the image
def test_a_host_is_started_set_up_and_does_the_whole_job(
    docker_engine: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXTRAL_RUN_TEST_CACHE", str(CACHE))  # it lies in the real home
    write_private(known_hosts_file(), "".join(f"[127.0.0.1]:{port} {OLD_KEY}\n" for port in PORTS))
    done = rehearse()
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert re.search(rf"^✓ {NAME} +done +[1-9]", done.stdout, re.MULTILINE)
    assert "PEFT over HF gives the same logits" in done.stdout
    assert "A bare host was set up over SSH, and the whole job ran in its container" in done.stdout
    # Nothing of it stays: no container, no disk, and no host in the fleet.
    left = call("docker", "ps", "--all", "--format", "{{.Names}}") + call("docker", "volume", "ls", "--quiet")
    assert container_name(NAME) not in left
    assert not remembered_hosts()
    # Nor its key: the old ones stay, but for that of the port that it had.
    assert len(known_hosts_file().read_text().splitlines()) == len(PORTS) - 1


@pytest.mark.parametrize("fault", ["no program", "no engine"])
def test_without_an_engine_it_says_so_and_shows_what_bootstrap_would_do(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "no program":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nowhere.sock")
    done = rehearse()
    assert done.returncode == 0, done.stderr
    assert "no Docker engine answers here" in done.stdout
    lines = done.stdout.splitlines()
    roles = [line.split(" · ")[0].strip() for line in lines if " · " in line]
    assert list(dict.fromkeys(roles)) == [
        "preflight", "docker", "nvidia_container_toolkit", "swap", "hf_cache", "image", "acceptance",
    ]  # fmt: skip
