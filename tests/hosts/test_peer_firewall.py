"""The firewall rules of docs/fleet.md admit the hosts of a fleet and nobody else, in real network namespaces."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mixtral_run.fleet.testhosts.engine import install_packages
from tests.support.needs import missing

FLEET = Path(__file__).parents[2] / "docs/fleet.md"
STORE, EPHEMERAL, SSH = 29400, 40000, 22
LISTEN = f"""
import socket, threading
for port in ({STORE}, {EPHEMERAL}, {SSH}):
    listener = socket.create_server(("0.0.0.0", port))
    greet = lambda each=listener: [each.accept()[0].send(b"hi") for _ in range(99)]
    threading.Thread(target=greet, daemon=True).start()
print("ready", flush=True)
input()
"""
CONNECT = """
import socket, sys
for port in sys.argv[2:]:
    try:
        print(port, socket.create_connection((sys.argv[1], int(port)), timeout=10).recv(2) == b"hi")
    except ConnectionRefusedError:
        print(port, False)
"""


@dataclass
class Network:
    """Three machines on one network, each a namespace: a host with a job, its peer, and a stranger."""

    names: dict[str, str]

    def run(self, machine: str, *argv: str, stdin: str = "") -> str:
        argv = ("ip", "netns", "exec", self.names[machine], *argv)
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, check=True).stdout

    def reached(self, machine: str, address: str = "10.0.0.11") -> dict[int, bool]:
        ports = [str(port) for port in (STORE, EPHEMERAL, SSH)]
        lines = self.run(machine, sys.executable, "-c", CONNECT, address, *ports).splitlines()
        return {int(line.split()[0]): line.endswith("True") for line in lines}


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() == 0 and Path("/usr/bin/apt-get").exists():
        install_packages(
            *(name for name, program in (("nftables", "nft"), ("iproute2", "ip")) if not shutil.which(program))
        )
    if os.geteuid() != 0 or not (shutil.which("nft") and shutil.which("ip")):
        missing("network namespaces and nft, which only root can use")
    names = {machine: f"mixtral-{os.getpid()}-{machine}" for machine in ("host", "peer", "stranger")}
    found = Network(names)
    try:
        for name in names.values():
            subprocess.run(["ip", "netns", "add", name], check=True)
        ip = ("ip", "-n", names["host"])
        subprocess.run([*ip, "link", "add", "name", "net0", "type", "bridge"], check=True)
        for machine, address in (("peer", "10.0.0.12/24"), ("stranger", "10.0.0.99/24")):
            other = ("ip", "-n", names[machine])
            pair = ("link", "add", machine[:4], "netns", names["host"], "type", "veth", "peer", "name", "eth0")
            subprocess.run(["ip", *pair, "netns", names[machine]], check=True)
            subprocess.run([*ip, "link", "set", machine[:4], "master", "net0", "up"], check=True)
            subprocess.run([*other, "addr", "add", address, "dev", "eth0"], check=True)
            subprocess.run([*other, "link", "set", "eth0", "up"], check=True)
        subprocess.run([*ip, "addr", "add", "10.0.0.11/24", "dev", "net0"], check=True)
        for link in ("net0", "lo"):
            subprocess.run([*ip, "link", "set", link, "up"], check=True)
        yield found
    finally:
        for name in names.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                subprocess.run(["ip", "netns", "del", name], check=True)


def test_the_documented_rules_admit_the_peers_alone(network: Network) -> None:
    (rules,) = re.findall(r"```nft\n(.*?)```", FLEET.read_text(encoding="utf-8"), re.DOTALL)
    (take_back,) = re.findall(r"`nft (delete table [^`]*)` takes it back", FLEET.read_text(encoding="utf-8"))
    everything = {STORE: True, EPHEMERAL: True, SSH: True}
    argv = ["ip", "netns", "exec", network.names["host"], sys.executable, "-c", LISTEN]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stdout.readline() == "ready\n"
        assert network.reached("stranger") == everything
        for _ in range(2):  # a second load replaces the first
            network.run("host", "nft", "-f", "-", stdin=rules)
        assert network.reached("stranger") == {STORE: False, EPHEMERAL: False, SSH: True}
        assert network.reached("peer") == everything
        assert network.reached("host", "127.0.0.1") == everything
        network.run("host", "nft", *take_back.split())
        assert network.reached("stranger") == everything
        job.communicate("\n")
