"""Tasks and seconds of bootstrap, role by role: first run, run without changes, and 8 hosts against one.

A run without changes stands beside a play of the shape of a common role for Docker alone
(support/docker_role_shape.yml).

    python -m benchmarks.provision [--hosts 8]

Starts throw-away hosts on this machine's Docker engine, so numbers of different machines do not compare; the second
run of one host is made of SSH round trips and module starts on them. CPU seconds, which other work on the machine
changes less than the clock's, are those of Ansible here and of all that ran in the hosts. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from mixtral_run.fleet.testhosts import hosts, kit_image, repository
from mixtral_run.fleet.testhosts.__main__ import inventory
from mixtral_run.fleet.testhosts.engine import why_no_engine
from mixtral_run.fleet.testhosts.shell import call

ROOT = Path(__file__).parents[1]
SHAPE = "benchmarks/support/docker_role_shape.yml"
TASK = re.compile(r"^(?:TASK|RUNNING HANDLER) \[(?:(?P<role>\w+) : )?.*\] \*+$")
RAN = re.compile(r"^(ok|changed): \[")
ROLE_SECONDS = re.compile(r"^(\S+) -+ ([\d.]+)s$")


@dataclass
class Run:
    """One run of the playbook."""

    seconds: float
    here_cpu_seconds: float = 0.0
    """CPU seconds of ansible-playbook and its workers."""
    hosts_cpu_seconds: float | None = None
    """CPU seconds of all hosts together. None if the engine keeps its control groups elsewhere."""
    tasks: int = 0
    skipped: int = 0
    """Tasks that a host skipped. Ansible starts a process for each."""
    changed: int = 0
    by_role: dict[str, tuple[int, float]] = field(default_factory=dict)


def run_playbook(inventory_file: Path, names: list[str], playbook: str = "playbooks/bootstrap.yml") -> Run:
    """Run a playbook on hosts; a task counts when it ran on one. Raises RuntimeError with the output where it fails."""
    variables = {
        "image_source": "archive",
        "image_archive": kit_image.ARCHIVE_ON_HOST,
        "image_archive_on_host": True,
        "image_archive_name": kit_image.ARCHIVE_NAME,
        "preflight_num_gpus": 0,
    }
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.profile_roles",
        "ANSIBLE_NOCOLOR": "1",
    }
    argv = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(inventory_file)]
    argv += ["--limit", ",".join(names), "--extra-vars", json.dumps(variables), playbook]
    files = [_cpu_file(name) for name in names]
    before, mesh, began = _cpu_seconds(files), _cpu_here(), time.perf_counter()
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    run = Run(seconds=time.perf_counter() - began, here_cpu_seconds=_cpu_here() - mesh)
    after = _cpu_seconds(files)
    run.hosts_cpu_seconds = None if before is None or after is None else after - before
    if done.returncode:
        raise RuntimeError(done.stdout[-5000:] + done.stderr[-2000:])
    recap = re.findall(r"^\S+ +: ok=(\d+) +changed=(\d+) .*skipped=(\d+)", done.stdout, re.MULTILINE)
    run.tasks = max(int(ok) for ok, _, _ in recap)
    run.skipped = max(int(skipped) for _, _, skipped in recap)
    run.changed = sum(int(changed) for _, changed, _ in recap)
    run.by_role = _by_role(done.stdout)
    return run


def _cpu_here() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cpu_file(name: str) -> Path | None:
    """Return the file in which the kernel counts the CPU time of a host, for cgroup v2 with either driver, or v1."""
    container = call("docker", "inspect", "--format", "{{.Id}}", hosts.container_name(name)).strip()
    places = (f"system.slice/docker-{container}.scope/cpu.stat", f"docker/{container}/cpu.stat",
              f"cpuacct/docker/{container}/cpuacct.usage")  # fmt: skip
    return next((file for place in places if (file := Path("/sys/fs/cgroup") / place).exists()), None)


def _cpu_seconds(files: list[Path | None]) -> float | None:
    total = 0.0
    for file in files:
        if file is None:
            return None
        words = file.read_text().split()
        total += int(words[1]) / 1e6 if file.name == "cpu.stat" else int(words[0]) / 1e9
    return total


def _by_role(output: str) -> dict[str, tuple[int, float]]:
    """Tasks that ran on a host, and seconds, by role; the seconds are those that profile_roles prints at the end."""
    ran: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = {}
    role, counted = "playbook", True
    for line in output.splitlines():
        if heading := TASK.match(line):
            role, counted = heading.group("role") or "playbook", False
        elif RAN.match(line) and not counted:
            ran[role] += 1
            counted = True
        elif reported := ROLE_SECONDS.match(line):
            seconds[reported.group(1)] = float(reported.group(2))
    return {role: (count, seconds.get(role, 0.0)) for role, count in ran.items()}


def _print(title: str, run: Run) -> None:
    in_hosts = "unknown" if run.hosts_cpu_seconds is None else f"{run.hosts_cpu_seconds:.1f} s"
    print(f"\n{title}: {run.seconds:.1f} s, {run.tasks} tasks, {run.skipped} skipped, {run.changed} changed")
    print(f"  CPU time: {run.here_cpu_seconds:.1f} s here, {in_hosts} in hosts")
    for role, (tasks, seconds) in run.by_role.items():
        print(f"  {role:26} {tasks:3} tasks {seconds:7.1f} s")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.provision", description=__doc__)
    parser.add_argument("--hosts", type=int, default=8, help="how many hosts are compared with one [default: 8]")
    parser.add_argument("--repeats", type=int, default=3, help="runs without changes; the median counts [default: 3]")
    words = parser.parse_args(argv)
    reason = why_no_engine()
    if reason:
        print(f"✗ {reason}", file=sys.stderr)
        return 3
    names = [f"bench-{number}" for number in range(1, words.hosts + 1)]
    try:
        with tempfile.TemporaryDirectory(prefix="mixtral-run-bench-") as folder:
            result = _measure(names, words.repeats, Path(folder) / "hosts.json")
    finally:
        for name in names:
            hosts.remove(name)
        repository.stop_unless_used()
    print(json.dumps(result))
    return 0


def _measure(names: list[str], repeats: int, inventory_file: Path) -> dict[str, float | None]:
    kit_image.image_archive()
    for name in names:
        hosts.start(name)
    inventory_file.write_text(json.dumps(inventory(names)))
    first = run_playbook(inventory_file, names[:1])
    _print("First run, one host", first)
    second = _median([run_playbook(inventory_file, names[:1]) for _ in range(repeats)])
    _print(f"Run without changes, one host (median of {repeats})", second)
    run_playbook(inventory_file, names[:1], SHAPE)  # it sets modes of its own; from then on it changes nothing
    shape = _median([run_playbook(inventory_file, names[:1], SHAPE) for _ in range(repeats)])
    _print(f"One role for Docker alone, by its shape, one host (median of {repeats})", shape)
    if len(names) == 1:
        return _result(first, second, shape, None)
    all_first = run_playbook(inventory_file, names)
    _print(f"First run of the other {len(names) - 1} hosts beside it", all_first)
    together = _median([run_playbook(inventory_file, names) for _ in range(repeats)])
    _print(f"Run without changes, {len(names)} hosts (median of {repeats})", together)
    return _result(first, second, shape, together)


def _result(first: Run, second: Run, shape: Run, together: Run | None) -> dict[str, float | None]:
    return {
        "first_seconds": round(first.seconds, 1),
        "second_seconds": round(second.seconds, 1),
        "second_tasks": second.tasks,
        "second_skipped": second.skipped,
        "second_changed": second.changed,
        "docker_role_shape_seconds": round(shape.seconds, 1),
        "docker_role_shape_changed": shape.changed,
        "all_hosts_seconds": round(together.seconds, 1) if together else None,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _median(runs: list[Run]) -> Run:
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
