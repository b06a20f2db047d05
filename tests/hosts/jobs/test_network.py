"""`status --network` among three hosts, of which one has a slow link: SSH, all-reduce, network and tc are real.

STAND-IN for machines and containers: the hosts are sshds of this machine; each has a network namespace of its own, in
which a stand-in for docker runs the program of the container. They have no GPUs, so gloo carries the all-reduce.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.errors import CheckFailed
from mixtral_run.fleet.hosts import Host, remember_hosts
from mixtral_run.fleet.testhosts.engine import install_packages
from tests.hosts.conftest import HostMaker
from tests.support.needs import missing

ROOT = Path(__file__).parents[3]
NUM_HOSTS = 3
SLOW_MBIT = 50

DOCKER = """#!/bin/sh
# STAND-IN for docker: `run` runs the words after the image in the namespace of the host, with the variables of --env.
running='{folder}/running'
case "$*" in *label=org.mixtral-run.job=*) cat "$running" 2>/dev/null; exit 0 ;; esac
case "$1" in version|info|image|ps|rm) exit 0 ;; esac
shift
while [ "$1" != mixtral-run:local ]; do
  if [ "$1" = --env ]; then export "$2"; fi
  if [ "$1" = --mount ]; then
    folder=${{2#*source=}}; folder=${{folder%%,*}}
    [ -d "$folder" ] || {{ echo "no folder $folder" >&2; exit 125; }}
  fi
  shift
done
shift 2
export PYTHONPATH={root}
echo 1 >"$running"
PATH=/usr/sbin:/sbin:/usr/bin:/bin ip netns exec {namespace} {python} "$@"
code=$?
rm "$running"
exit $code
"""
IP = """#!/bin/sh
# STAND-IN for a host with a network of its own.
exec /usr/bin/env PATH=/usr/sbin:/sbin:/usr/bin:/bin ip netns exec {namespace} ip "$@"
"""


def call(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        missing(f"{' '.join(argv)}: {done.stderr.strip()}")


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Namespaces of hosts 10.77.0.1 and up, on one switch; the link of the last one is slow."""
    if os.geteuid() == 0 and Path("/usr/bin/apt-get").exists() and not shutil.which("tc"):
        install_packages("iproute2")
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        missing("network namespaces and tc, which only root can use")
    switch, names = f"mr{os.getpid()}s", [f"mr{os.getpid()}h{number}" for number in range(1, NUM_HOSTS + 1)]
    try:
        call("ip", "netns", "add", switch)
        call("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        call("ip", "-n", switch, "link", "set", "switch", "up")
        for number, name in enumerate(names, 1):
            call("ip", "netns", "add", name)
            call(
                "ip",
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"port{number}",
                "netns",
                switch,
            )
            call("ip", "-n", switch, "link", "set", f"port{number}", "master", "switch", "up")
            call("ip", "-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                call("ip", "-n", name, "link", "set", device, "up")
            call("ip", "-n", name, "route", "add", "default", "via", "10.77.0.254")
        shape = ("tbf", "rate", f"{SLOW_MBIT}mbit", "burst", "64kb", "latency", "50ms")
        call("ip", "netns", "exec", names[-1], "tc", "qdisc", "add", "dev", "eth0", "root", *shape)
        yield names
    finally:
        for name in (switch, *names):
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_the_slow_link_is_named(light_hosts: HostMaker, namespaces: list[str], tmp_path: Path) -> None:
    hosts = light_hosts(NUM_HOSTS)
    for host, namespace in zip(hosts, namespaces, strict=True):
        host.program("docker", DOCKER.format(root=ROOT, namespace=namespace, python=sys.executable, folder=host.folder))
        host.program("ip", IP.format(namespace=namespace))
    remember_hosts(Host(host.name, "127.0.0.1", user=getpass.getuser(), port=host.port) for host in hosts)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--checkpoints-folder", folder, "--hf-home", folder, "--json"]
        done = CliRunner().invoke(root, ["status", "--network", *(host.name for host in hosts), *words])
    assert isinstance(done.exception, CheckFailed), (done.output, done.exception)
    figures = {tuple(each["hosts"]): each for each in json.loads(done.stdout)}
    assert set(figures) == {("gpu-01", "gpu-02"), ("gpu-01", "gpu-03"), ("gpu-02", "gpu-03")}
    assert {each["error"] for each in figures.values()} == {""} and {each["backend"] for each in figures.values()} == {
        "gloo"
    }
    # Of the bytes of an all-reduce between two, as many leave each host: tc gives the rate. The burst passes at once.
    slow = [each["gb_per_second"] for pair, each in figures.items() if "gpu-03" in pair]
    assert all(0.5 < rate / (SLOW_MBIT / 8e3) < 1.3 for rate in slow), slow
    assert figures["gpu-01", "gpu-02"]["gb_per_second"] > 4 * max(slow)
    (problem,) = done.exception.problems
    assert problem.startswith("gpu-03: slow or failing with every other host")
