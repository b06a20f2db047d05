"""Which hosts of a running job are lost: they answer neither this machine nor another host of the job.

A host that only this machine cannot reach may be well: the connection to the fleet may be down, and the job goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.jobs import RunningJob
from mixtral_run.fleet.ssh.connection import Ssh

PROBE_SECONDS = 5.0
"""Time between two questions to a host."""
SILENT_SECONDS = 15.0
"""Time without an answer after which the other hosts are asked about a host."""
TIMEOUT_SECONDS = 10.0
NO_ANSWER = (124, 255)
"""Exit codes of a question that timed out, and of a failed connection."""
_REACH = 'exec timeout 5 bash -c \'exec 3<>"/dev/tcp/$0/$1"\' "$1" "$2"'


class HostLost(HostError):
    """A host of a job is lost. `host` is the host."""

    def __init__(self, job: RunningJob, host: Host) -> None:
        others = ",".join(each.name for each in job.hosts if each != host)
        super().__init__(
            f"{host.name} is lost: it answers neither this machine nor the other hosts of {job.name}.",
            where=host.target,
            next_command=f"the same command with --on {others} --resume auto, which continues on the other hosts; "
            "--min-hosts N does so by itself",
        )
        self.host = host


class HostWatch:
    """The hosts of a job, asked again and again whether they are there."""

    def __init__(self, job: RunningJob, ssh: Ssh) -> None:
        self._job, self._ssh = job, ssh
        self._silent: dict[Host, float] = {}

    def look(self, hosts: Sequence[Host]) -> list[Host]:
        """Ask the hosts once, and return those that are lost by now."""
        began = time.monotonic()
        answers = self._ssh.each(list(hosts), self._answers)
        for host, answer in zip(hosts, answers, strict=True):
            if answer:
                self._silent.pop(host, None)
            else:
                self._silent.setdefault(host, began)
        present = [host for host, answer in zip(hosts, answers, strict=True) if answer]
        long = [host for host, since in self._silent.items() if time.monotonic() - since >= SILENT_SECONDS]
        return [host for host in long if host in hosts and self._is_cut_off(host, present)]

    def _answers(self, host: Host) -> bool:
        return self._ssh.run(host, ["true"], timeout_seconds=TIMEOUT_SECONDS).exit_code not in NO_ANSWER

    def _is_cut_off(self, host: Host, present: Sequence[Host]) -> bool:
        """Return True if a host that answers cannot reach this one. Without such a host nothing is known."""
        address = self._job.addresses.get(host.name)
        if not present or not address:
            return False
        words = ["sh", "-c", _REACH, "reach", address, str(host.port or 22)]
        answer = self._ssh.run(present[0], words, timeout_seconds=2 * TIMEOUT_SECONDS)
        # A host that refuses the connection is there. 255: the host that was asked does not answer.
        return answer.exit_code not in (0, 255) and "refused" not in answer.errors.lower()


def watch_hosts(
    job: RunningJob, ssh: Ssh, alive: Callable[[], Sequence[Host]], lost: Callable[[Host], None],
    wait: Callable[[float], bool],
) -> None:  # fmt: skip
    """Call `lost` for each host of a job that is lost, until `wait` returns True.

    alive: returns the hosts whose containers have not ended.
    """
    watch = HostWatch(job, ssh)
    while not wait(PROBE_SECONDS):
        hosts = alive()
        for host in watch.look(hosts) if hosts else ():
            lost(host)
