"""Stand-in for the Docker engine of a simulated host. Its containers are files in a folder of the host."""

from __future__ import annotations

from pathlib import Path

from tests.hosts.light_hosts import LightHost

STANDIN_DOCKER = """#!/bin/sh
# STAND-IN for docker: containers/NAME holds what `inspect` tells of it, NAME.exit how it ends when it is stopped,
# NAME.out and NAME.err what it has printed. `logs --follow` ends with the container.
# "fault" is what the engine answers to everything, "fault-ps" to `ps` alone.
cd '{folder}' || exit 1
echo "$*" >> calls
if [ -e fault ]; then cat fault >&2; exit 1; fi
case "$1" in
  ps) if [ -e fault-ps ]; then cat fault-ps >&2; exit 1; fi; ls containers ;;
  inspect) shift 3; for each; do cat "containers/$each" || exit 1; done ;;
  logs) for last; do :; done; cat "$last.err" >&2; cat "$last.out"
    case "$*" in *--follow*) while grep -q running "containers/$last"; do sleep 0.1; done ;; esac ;;
  stop) sed -i "s/\\trunning\\t0\\t/\\texited\\t$(cat "$4.exit")\\t/" "containers/$4" ;;
esac
"""


class StandInEngine:
    """Stand-in engine of a simulated host: its containers and its answers."""

    def __init__(self, host: LightHost) -> None:
        self.folder = host.folder / "engine"
        (self.folder / "containers").mkdir(parents=True)
        host.program("docker", STANDIN_DOCKER.format(folder=self.folder))

    def add(self, job: str, num_hosts: int = 1, ends_with: int = 0) -> None:
        """Add a running container."""
        cells = (job, "finetune", "running", "0", "false", "2026-01-01T00:00:00.0Z", "/out", str(num_hosts))
        (self.folder / "containers" / job).write_text("\t".join(cells) + "\n")
        (self.folder / f"{job}.exit").write_text(str(ends_with))
        self.print(job, "")

    def print(self, job: str, output: str, errors: str = "") -> None:
        """Set the output of a container; all lines have the same time."""
        for suffix, text in (("out", output), ("err", errors)):
            lines = [f"2026-01-01T00:00:00.000000001Z {line}\n" for line in text.splitlines()]
            (self.folder / f"{job}.{suffix}").write_text("".join(lines))

    def end(self, job: str, exit_code: int = 0) -> None:
        file = self.folder / "containers" / job
        file.write_text(file.read_text().replace("\trunning\t0\t", f"\texited\t{exit_code}\t"))

    def fail(self, message: str, only: str = "") -> None:
        (self.folder / f"fault{only and '-' + only}").write_text(message + "\n")

    @property
    def calls(self) -> Path:
        return self.folder / "calls"
