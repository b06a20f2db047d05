"""Memory and CPU of the operator's machine for bootstrap and status of many hosts.

    python -m benchmarks.hosts.fleet_size [--hosts 10 50 100] [--forks 50] [--strategies linear host_pinned free]

The hosts are SIMULATED: one throw-away sshd of this machine under 127.1.0.1, 127.1.0.2, …, and a STAND-IN for Python
that answers every module, and the program of `status`, at once with a recorded answer. So a figure holds for the
operator's side alone: the command, Ansible and its workers, and the SSH clients. sshd and what it starts are not
counted. The bootstrap runs a play of six tasks (fleet_size.yml) in place of the roles; a bootstrap that changes
nothing has about ten times as many. CPU seconds and memory (PSS: memory that processes share is counted once) compare
between runs on a machine with other work; seconds of the clock do not. --json FILE: write all figures there.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from mixtral_run.fleet.status.payload import status_payload

ROOT = Path(__file__).parents[2]
PLAYBOOK = Path(__file__).with_name("fleet_size.yml")
TASKS = 6
SSHD = "/usr/sbin/sshd"
BOOTSTRAP = """
import sys
from pathlib import Path
from mixtral_run.fleet.bootstrap import bootstrap as module
module.playbook = lambda name: Path(sys.argv[1])
variables = ("mixtral_strategy=" + sys.argv[4],)
request = module.BootstrapRequest(inventory=Path(sys.argv[2]), forks=int(sys.argv[3]), extra_vars=variables)
end = module.bootstrap(request)
print(end.text)
end.raise_if_bad()
"""


@dataclass(frozen=True)
class Figures:
    """Cost of one run on the operator's machine. clock_seconds: includes waiting for other work of the machine."""

    verb: str
    hosts: int
    forks: int
    strategy: str
    cpu_seconds: float
    cpu_ms_per_host: float
    command_cpu_seconds: float
    """The command itself, without Ansible and ssh."""
    peak_mib: float
    mib_per_host: float
    clock_seconds: float


@contextmanager
def simulated_hosts(count: int) -> Iterator[tuple[Path, dict[str, str]]]:
    """Start the sshd. Yield an inventory with `count` names, and the environment of an operator who reaches them."""
    folder = Path(tempfile.mkdtemp(prefix="mixtral-run-fleet-size-"))
    own = {**os.environ, "HOME": str(folder), "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(ROOT)}
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "bin").mkdir()
    _stand_ins(folder)
    port = _free_port()
    addresses = [f"127.1.{number // 250}.{number % 250 + 1}" for number in range(count)]
    path = f"PATH={folder / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    lines = [
        f"Port {port}\nListenAddress 0.0.0.0\nHostKey {folder / 'host_key'}\nPidFile none\nUsePAM no\nStrictModes no",
        f"PermitRootLogin yes\nPasswordAuthentication no\nAuthorizedKeysFile {folder / 'key.pub'}\nPrintMotd no",
        "MaxStartups 200\nMaxSessions 50",
    ]
    for address in addresses:
        (folder / "locks" / address).mkdir(parents=True)
        lines.append(
            f"Match LocalAddress {address}\n  SetEnv {path} MIXTRAL_RUN_LOCK_FOLDER={folder / 'locks' / address}"
        )
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    more = f"ansible_user={getpass.getuser()} ansible_port={port} ansible_ssh_private_key_file={folder / 'key'}"
    python = f"ansible_python_interpreter={folder / 'bin/python3'}"
    inventory = folder / "hosts.ini"
    inventory.write_text("".join(f"gpu-{n:03} ansible_host={a} {more} {python}\n" for n, a in enumerate(addresses, 1)))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        time.sleep(1)
        yield inventory, own
    finally:
        for each in [*psutil.Process(sshd.pid).children(recursive=True), *_clients(port), psutil.Process(sshd.pid)]:
            each.kill()
        sshd.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _stand_ins(folder: Path) -> None:
    folders = json.dumps({"checkpoints": "/tmp", "hf_home": "/tmp", "image": "x"})
    argv = [sys.executable, "-", folders]
    answer = subprocess.run(argv, input=status_payload(), capture_output=True, check=True).stdout
    (folder / "answer.json").write_bytes(answer)
    programs = {
        "python3": f"""cat >/dev/null
[ "$1" = - ] && exec cat {folder / "answer.json"}
echo '{{"changed": false, "invocation": {{"module_args": {{}}}}}}'""",
        "sudo": 'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"',
    }
    for name, script in programs.items():
        file = folder / "bin" / name
        file.write_text(f"#!/bin/sh\n# STAND-IN\n{script}\n")
        file.chmod(0o755)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _clients(port: int) -> list[psutil.Process]:
    """Return the ssh processes that talk to the simulated hosts; those in the background have no parent."""
    found = []
    for each in psutil.process_iter(["name", "cmdline"]):
        if each.info["name"] == "ssh" and str(port) in " ".join(each.info["cmdline"] or ()):
            found.append(each)
    return found


class Meter:
    """Peak memory and CPU seconds of a process, of all that it starts, and of its ssh clients in the background."""

    def __init__(self, process: psutil.Process, port: int) -> None:
        self.process, self.port = process, port
        self.peak_bytes = 0
        self.cpu: dict[tuple[int, float], float] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over.wait(0.5):
            self.look()

    def look(self) -> None:
        """Add up what lives now."""
        memory = 0
        try:
            below = self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            below = []
        for each in {*below, self.process, *_clients(self.port)}:
            try:
                memory += each.memory_full_info().pss
                times = each.cpu_times()
                self.cpu[each.pid, each.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        self.peak_bytes = max(self.peak_bytes, memory)

    def background_cpu(self) -> float:
        """Return the CPU seconds of the ssh clients that outlive the command, as they are now."""
        self.look()
        found = 0.0
        for each in _clients(self.port):
            times = each.cpu_times()
            found += times.user + times.system
        return found


def measured(
    verb: str, argv: list[str], hosts: int, forks: int, strategy: str, setting: tuple[Path, dict[str, str]]
) -> Figures:
    """Run a command of the operator and return its figures."""
    inventory, environment = setting
    port = int(inventory.read_text().split("ansible_port=")[1].split()[0])
    for each in _clients(port):
        each.kill()
    began = time.monotonic()
    process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    meter = Meter(psutil.Process(process.pid), port)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    meter.over.set()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(output.decode()[-3000:])
    own = max((value for (pid, _), value in meter.cpu.items() if pid == process.pid), default=0.0)
    cpu = usage.ru_utime + usage.ru_stime + meter.background_cpu()
    mib = meter.peak_bytes / 2**20
    return Figures(
        verb, hosts, forks, strategy, round(cpu, 1), round(1000 * cpu / hosts, 0), round(own, 2), round(mib, 0),
        round(mib / hosts, 2), round(seconds, 0),
    )  # fmt: skip


def main() -> None:
    """Measure, print a line a run, and write all figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--forks", type=int, nargs="+", default=[50])
    parser.add_argument("--strategies", nargs="+", default=["linear"])
    parser.add_argument("--verbs", nargs="+", default=["bootstrap", "status"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found: list[Figures] = []
    print("verb       hosts  forks  strategy     CPU s  CPU ms/host  command CPU s  peak MiB  MiB/host  clock s")
    for count in asked.hosts:
        with simulated_hosts(count) as setting:
            runs = [("status", 64, "-")] if "status" in asked.verbs else []
            if "bootstrap" in asked.verbs:
                runs += [("bootstrap", forks, strategy) for strategy in asked.strategies for forks in asked.forks]
            for verb, forks, strategy in runs:
                argv = [sys.executable, "-m", "mixtral_run", "status", "-i", str(setting[0]), "--json"]
                if verb == "bootstrap":
                    argv = [sys.executable, "-c", BOOTSTRAP, str(PLAYBOOK), str(setting[0]), str(forks), strategy]
                one = measured(verb, argv, count, forks, strategy, setting)
                found.append(one)
                print(
                    f"{one.verb:9}  {one.hosts:5}  {one.forks:5}  {one.strategy:11}  {one.cpu_seconds:5}  "
                    f"{one.cpu_ms_per_host:11}  {one.command_cpu_seconds:13}  {one.peak_mib:8}  {one.mib_per_host:8}  "
                    f"{one.clock_seconds:7}",
                    flush=True,
                )
    if asked.json:
        asked.json.write_text(json.dumps([asdict(each) for each in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
