"""A real Slurm of two nodes on this machine, for tests: Debian's packages, unpacked into the cache and run from there.

Nothing is installed, and nothing outside the cluster's own folder and the cache is written.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.needs import missing
from tests.support.servers.unpacked import unpacked

PACKAGES = (
    "munge", "libmunge2", "slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins", "libhwloc15",
    "liblua5.1-0",
)  # fmt: skip
START_SECONDS = 60
NODES = ("n1", "n2")
GPUS = 2


@dataclass(frozen=True)
class SlurmPrograms:
    """Where Slurm's programs and libraries are."""

    root: Path

    @property
    def libraries(self) -> Path:
        return next((self.root / "usr/lib").glob("*/slurm-wlm"))

    @property
    def environment(self) -> dict[str, str]:
        paths = f"{self.root}/usr/bin:{self.root}/usr/sbin:{os.environ['PATH']}"
        return {"PATH": paths, "LD_LIBRARY_PATH": f"{self.libraries.parent}:{self.libraries}"}

    def daemon(self, name: str) -> str:
        return str(self.root / "usr/sbin" / name)


def slurm_programs() -> SlurmPrograms:
    """Return Slurm's programs, unpacked once into the cache. A machine that has no way to get them fails in CI."""
    root = unpacked("slurm", PACKAGES)
    for name in ("slurmctld", "slurmd", "slurmstepd"):
        # Debian makes these links when it installs. A daemon under another name does not know what it is.
        link = root / "usr/sbin" / name
        if not link.is_symlink():
            link.symlink_to(f"{name}-wlm")
    return SlurmPrograms(root)


class SlurmCluster:
    """munged, slurmctld and two slurmd, all in one folder."""

    def __init__(self, folder: Path, programs: SlurmPrograms) -> None:
        self.folder, self.programs = folder, programs
        self.environment = {**os.environ, **programs.environment, "SLURM_CONF": str(folder / "slurm.conf")}
        self._munged: subprocess.Popen[bytes] | None = None

    def run(self, *argv: str) -> str:
        """Run one of Slurm's commands and return its output."""
        done = subprocess.run(argv, capture_output=True, text=True, env=self.environment, check=False, timeout=60)
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        self._write_files()
        munge = self.folder / "munge"
        words = [
            self.programs.daemon("munged"), "--foreground", "--force", f"--key-file={munge}/key",
            f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        ]  # fmt: skip
        with (self.folder / "munged.out").open("wb") as out:
            self._munged = subprocess.Popen(words, env=self.environment, stdout=out, stderr=out)
        self._wait(lambda: (munge / "socket").exists(), "munged")
        self.run(self.programs.daemon("slurmctld"), "-c")
        stepd = self.programs.daemon("slurmstepd")
        for node in NODES:
            self.run(self.programs.daemon("slurmd"), "-N", node, "-d", stepd)
        self._wait(self._idle, "both nodes idle")

    def _idle(self) -> bool:
        words = ["sinfo", "--noheader", "--Node", "--format=%T"]
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, check=False)
        states = done.stdout.split()
        if any(state.startswith(("drain", "down", "unk")) for state in states):
            resume = ["scontrol", "update", f"nodename={','.join(NODES)}", "state=resume"]
            subprocess.run(resume, env=self.environment, check=False, capture_output=True)
        return states == ["idle"] * len(NODES)

    def _wait(self, ready: object, what: str) -> None:
        until = time.monotonic() + START_SECONDS
        while not ready():  # type: ignore[operator]
            assert time.monotonic() < until, f"{what}: not after {START_SECONDS} s\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        files = [*(self.folder / "log").glob("*"), self.folder / "munged.out"]
        return "\n".join(f"== {each}\n{each.read_text(errors='replace')[-3000:]}" for each in files if each.exists())

    def stop(self) -> None:
        """End all daemons and what they started."""
        if self._munged is None:
            return
        subprocess.run(["scancel", "--quiet", "--user", str(os.getuid())], env=self.environment, check=False)
        files = [each for each in (*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid") if each.exists()]
        for file in files:
            os.kill(int(file.read_text()), signal.SIGTERM)
        self._wait(lambda: not any(file.exists() for file in files), "all daemons ended")
        self._munged.terminate()
        self._munged.wait(20)

    def _write_files(self) -> None:
        for name in ("munge", "state", "log", "dev"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o711)
        (self.folder / "munge/key").write_bytes(os.urandom(128))
        (self.folder / "munge/key").chmod(0o400)
        ports = [str(each) for each in _free_ports(3)]
        self._make_fake_gpus()
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        nodes = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=2 "
            f"RealMemory=1000 Gres=gpu:h100:{GPUS} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        text = _CONFIG.format(folder=self.folder, host=socket.gethostname(), user=user, port=ports[0],
                              plugins=self.programs.libraries)  # fmt: skip
        partition = f"PartitionName=gpu Nodes={','.join(NODES)} Default=YES MaxTime=1-00:00:00 State=UP"
        (self.folder / "slurm.conf").write_text("\n".join([text, *nodes, partition, ""]))
        names, files = f"{NODES[0][:-1]}[1-{len(NODES)}]", f"{self.folder}/dev/gpu[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName={names} Name=gpu Type=h100 File={files}\n")

    def _make_fake_gpus(self) -> None:
        """Make character devices that Slurm counts as GPUs. Only root can."""
        for number in range(GPUS):
            words = ["mknod", f"{self.folder}/dev/gpu{number}", "c", "1", "3"]
            if subprocess.run(words, capture_output=True, check=False).returncode:
                missing("only root can make the device files that stand in for GPUs")


_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
PluginDir={plugins}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
GresTypes=gpu
KillWait=30
"""


def _free_ports(count: int) -> list[int]:
    """Return ports below those that the system gives to outgoing connections, and above the rendezvous of the jobs."""
    found: list[int] = []
    for port in random.sample(range(30100, 32000), 200):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("There are no free ports.")


@contextmanager
def running_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Run a cluster for the duration of the context."""
    cluster = SlurmCluster(folder, slurm_programs())
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
