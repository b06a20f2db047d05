"""Simulated hosts: one unprivileged sshd each, on a loopback port, with its own host key and environment.

STAND-IN for machines: all hosts share this machine's files and users. The programs of a host (nvidia-smi, docker, sudo)
are in a folder that comes first on its PATH.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shlex
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SSHD = "/usr/sbin/sshd"


@dataclass
class LightHost:
    """Simulated host that can be started, killed and reimaged."""

    name: str
    folder: Path
    port: int
    programs: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def target(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the host and wait until it answers."""
        self.launch()
        wait_for([self])

    def launch(self) -> None:
        config = self.folder / "sshd_config"
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "sshd.log").open("ab"),
            start_new_session=True,
        )

    def stop(self) -> None:
        """Stop the host and end its sessions."""
        if self.process is None:
            return
        for each in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait()
        self.process = None

    def reimage(self) -> None:
        """Restart the host with a new host key."""
        self.stop()
        for file in self.folder.glob("host_key*"):
            file.unlink()
        _make_key(self.folder / "host_key")
        self.start()

    def program(self, name: str, script: str) -> None:
        """Put a program on the host's PATH."""
        file = self.programs / name
        file.write_text(script, encoding="utf-8")
        file.chmod(0o755)


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def free_ports(count: int) -> list[int]:
    """Return free ports from below the range that the kernel uses for outgoing connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
    return ports


def make_hosts(folder: Path, count: int, authorized_keys: Path) -> list[LightHost]:
    """Start hosts and wait until each answers."""
    hosts = []
    for number, port in enumerate(free_ports(count), start=1):
        name = f"gpu-{number:02}"
        own = folder / name
        (own / "bin").mkdir(parents=True)
        (own / "home").mkdir()
        if number == 1:
            _make_key(folder / "host_key")
        for suffix in ("", ".pub"):
            shutil.copy(folder / f"host_key{suffix}", own / f"host_key{suffix}")
        host = LightHost(name=name, folder=own, port=port, programs=own / "bin")
        # Root needs no sudo, and not every machine has it.
        host.program("sudo", STANDIN_SUDO)
        path = f"{own / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        (own / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {own / 'host_key'}\nPidFile none\n"
            "UsePAM no\nStrictModes no\n"
            f"PermitRootLogin yes\nPasswordAuthentication no\nAuthorizedKeysFile {authorized_keys}\n"
            "PrintMotd no\nSubsystem sftp internal-sftp\n"
            f"MaxStartups 100\nMaxSessions 50\nSetEnv PATH={path} HOME={own / 'home'} MIXTRAL_RUN_TEST_HOST={name} "
            f"MIXTRAL_RUN_LOCK_FOLDER={own}\n",
            encoding="utf-8",
        )
        hosts.append(host)
    Path("/run/sshd").mkdir(exist_ok=True) if os.geteuid() == 0 else None
    for host in hosts:
        host.launch()
    wait_for(hosts)
    return hosts


STANDIN_SUDO = """#!/bin/sh
# STAND-IN for sudo on a simulated host whose user is root already: drops sudo's own options.
while [ $# -gt 0 ]; do
  case "$1" in
    -u|-p|-g) shift 2 ;;
    --) shift; break ;;
    -*) shift ;;
    *) break ;;
  esac
done
exec "$@"
"""


def wait_for(hosts: list[LightHost], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    for host in hosts:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", host.port), timeout=2) as connection:
                    if connection.recv(4) == b"SSH-":
                        break
            except OSError:
                if time.monotonic() > until:
                    log = (host.folder / "sshd.log").read_text(errors="replace")
                    raise TimeoutError(
                        f"{host.name} has no sshd after {seconds} s: {shlex.quote(log[-500:])}"
                    ) from None
                time.sleep(0.05)
