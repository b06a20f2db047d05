"""The operator's laptop, and the two throw-away hosts that all tests of this folder share."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pexpect

from mixtral_run.fleet.testhosts import hosts as targets
from mixtral_run.fleet.testhosts.disks import with_images
from mixtral_run.fleet.testhosts.shell import call
from tests.hosts.snapshot import snapshot
from tests.support.processes.killed import killed_at

Terminal = Any  # pexpect has no types
NAMES = ("fleet-one", "fleet-two")
IMAGE = "mixtral-run:local"
CHECKPOINTS, MODELS = "/srv/checkpoints", "/srv/models"
TOKEN = "hf_endToEndTokenThatMustNotLeak"
POINTS = ("docker · Install Docker Engine", "nvidia_container_toolkit · Install the NVIDIA container toolkit")
"""Lines of a bootstrap after which it is killed: one role is half done, then another. The long form has random points:
benchmarks/killed_bootstrap.py."""
SETTINGS = ("-e", "@variables.json", "--hf-token-file", "token")
JOB = ("--shm-size", "1g", "--ulimit", "none")
LAYOUT = (
    "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "2", "--micro-batch-size", "1",
    "--global-batch-size", "8", "--seq-length", "48", "--train-iters", "4",
)  # fmt: skip


@dataclass
class Operator:
    """Laptop of an operator: its state folder and agent, and the command line that runs there."""

    folder: Path
    environment: dict[str, str]

    def call(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run mixtral-run and check its exit code."""
        argv = [sys.executable, "-m", "mixtral_run", *words]
        done = subprocess.run(
            argv, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, (done.stdout + done.stderr)[-6000:]
        return done

    def run(self, *words: str, code: int = 0) -> str:
        """Run mixtral-run, check its exit code, and return all its output."""
        done = self.call(*words, code=code)
        return done.stdout + done.stderr

    @contextmanager
    def terminal(self, *words: str) -> Iterator[Terminal]:
        """Run mixtral-run in a terminal of 40 lines and 120 columns, which is closed at the end of the block.

        A check that fails must not leave the session open: its job would keep later tests off the host.
        """
        terminal = pexpect.spawn(
            sys.executable, ["-m", "mixtral_run", *words],
            cwd=str(self.folder), env=self.environment, encoding="utf-8", timeout=120, dimensions=(40, 120),
        )  # fmt: skip
        try:
            yield terminal
        finally:
            terminal.close()

    def kill(self, text: str, *words: str) -> None:
        """Run mixtral-run and kill it, with all that it started on this machine, once it prints `text`."""
        argv = [sys.executable, "-m", "mixtral_run", *words]
        assert killed_at(text, argv, self.folder, self.environment)


@dataclass
class Fleet:
    """Current throw-away hosts by name."""

    hosts: dict[str, targets.Host] = field(default_factory=dict)
    bare: dict[str, set[str]] = field(default_factory=dict)
    """Packages and files of the second host before anything was done to it."""

    def install(self, name: str, *, with_layers: bool = True) -> None:
        """Install a host anew. Its data disk stays as it is.

        with_layers: its disk holds the base image of builds, so that no registry is needed, and the layers below the
        kit's. Otherwise it is empty.
        """
        disk = with_images("bookworm") if with_layers else None
        self.hosts[name] = targets.reimage(name, disk=disk, data_disk=self.data_disk(name))
        if name == NAMES[1]:
            self.bare[name] = snapshot(self.hosts[name])

    @staticmethod
    def data_disk(name: str) -> str:
        """Return the volume that is a host's second disk, which outlives a reimage."""
        return f"{targets.volume_name(name)}-disk"

    def boot(self, name: str) -> None:
        """Start a host whose power was cut. The engine gives it another port."""
        call("docker", "start", targets.container_name(name))
        self.hosts[name] = targets.wait_for_boot(name)

    def target(self, name: str) -> str:
        return f"{targets.USER}@127.0.0.1:{self.hosts[name].port}"


def ended(terminal: Terminal) -> int | None:
    """Wait for the end of what runs in a terminal, and return its exit code."""
    terminal.expect(pexpect.EOF)
    terminal.close()
    code: int | None = terminal.exitstatus
    return code


def changed_hosts(output: str) -> dict[str, int]:
    """Return the number of changes per host, from the table at the end of a bootstrap."""
    rows = re.findall(r"^✓ (\S+)\s+done\s+(\d+)\s+\d+", output, re.MULTILINE)
    return {name: int(changed) for name, changed in rows}


def answer_prompt(operator: Operator, words: tuple[str, ...], prompt: str, password: str) -> None:
    """Run mixtral-run in a terminal, answer its prompt, and check that it succeeds without showing the answer."""
    terminal = pexpect.spawn(
        sys.executable, ["-m", "mixtral_run", *words],
        cwd=str(operator.folder), env=operator.environment, encoding="utf-8", timeout=240, dimensions=(40, 120),
    )  # fmt: skip
    terminal.expect(prompt)
    terminal.sendline(password)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0, terminal.before
    assert password not in (terminal.before or "")
