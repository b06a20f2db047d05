"""The launcher for Slurm: submit a job with sbatch, and see to it with scontrol and scancel."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from mixtral_run.config.launchers.slurm import SlurmConfig
from mixtral_run.errors import HostError
from mixtral_run.fleet.jobs.job_spec import host_path
from mixtral_run.fleet.launchers.launcher import JobState, LaunchRequest, Say
from mixtral_run.fleet.launchers.records import JobRecord
from mixtral_run.fleet.launchers.slurm.commands import JobLine, SlurmSite, job_lines
from mixtral_run.fleet.launchers.slurm.follow import SlurmFollower
from mixtral_run.fleet.launchers.slurm.script import LOG, SCRIPT, STOPPED, batch_script, sbatch_words, spec_of
from mixtral_run.fleet.ssh.problems import last_line

POLL_SECONDS = 2.0
STOP_SECONDS = 600.0
"""Time that a job has to save and end after `stop`, before Slurm kills it."""
_FOLDER_SCRIPT = """
umask 077
folder=${2:-$HOME/.local/state/mixtral-run/jobs}/$1
mkdir -p "${folder%/*}" && mkdir "$folder" && : >"$folder/log.txt" && echo "folder=$folder"
"""
_SUBMIT_SCRIPT = 'command -v sbatch >/dev/null || exit 127; cd "$1" && shift && exec "$@"'


class SlurmLauncher:
    """Slurm, through sbatch, scontrol and scancel on this machine or on a login node."""

    not_used = frozenset({"rendezvous_address", "rendezvous_port"})

    def render(self, request: LaunchRequest) -> str:
        """Return the batch script. Contact nothing."""
        settings = cast(SlurmConfig, request.settings)
        return batch_script(spec_of(request, settings), request.config, settings)

    def submit(self, request: LaunchRequest, say: Say) -> JobRecord:
        """Send the job's files, let Slurm check the script, and submit it.

        Raises HostError with Slurm's words if it refuses the job; then nothing of it remains.
        """
        settings = cast(SlurmConfig, request.settings)
        spec = spec_of(request, settings)
        site = SlurmSite.of(settings.login)
        answer = site.check(
            ["sh", "-c", _FOLDER_SCRIPT, "folder", spec.name, settings.jobs_folder or ""],
            "The folder of the job cannot be made",
        )
        folder = answer.strip().partition("folder=")[2]
        if not re.fullmatch(r"/[^\n]+", folder):
            raise HostError("The folder of the job cannot be made.", where=site.name, found=answer[:200])
        number = ""
        try:
            for name, text in (
                ("config.json", spec.config_json()),
                (SCRIPT, batch_script(spec, request.config, settings)),
            ):
                write = ["sh", "-c", 'cat > "$1"', "write", f"{folder}/{name}"]
                site.check(write, "A file of the job cannot be written", text.encode())
            for file, name in spec.files:
                site.send(file, f"{folder}/{name}")
            say(f"Slurm's check: {self._sbatch(site, folder, '--test-only')}")
            number = self._sbatch(site, folder, "--parsable").partition(";")[0].strip()
        finally:
            if not number:
                site.run(["rm", "-rf", "--", folder])
        if not re.fullmatch(r"\d+", number):
            raise HostError("Slurm does not report the number of the job.", where=site.name, found=number[:200])
        return JobRecord(
            name=spec.name,
            launcher="slurm",
            verb=spec.verb,
            scheduler_id=number,
            output=host_path(spec.output, spec.options.folders()) if spec.output else "",
            submitted=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
            extra={"login": settings.login or "", "folder": folder},
        )

    def _sbatch(self, site: SlurmSite, folder: str, option: str) -> str:
        """Call sbatch in the job's folder and return what it says. `--test-only` answers on standard error."""
        answer = site.run(["sh", "-c", _SUBMIT_SCRIPT, "submit", folder, *sbatch_words([option, SCRIPT])])
        if answer.exit_code:
            raise HostError(
                "Slurm refuses the job.",
                where=site.name,
                found=last_line(answer.errors) or f"exit code {answer.exit_code}",
                next_command="sinfo, which lists partitions and nodes; --dry-run prints the script",
            )
        return last_line(answer.errors) if option == "--test-only" else answer.output

    def follow(self, record: JobRecord, say: Say) -> None:
        """Print the job's output until its end, over requeues too."""
        SlurmFollower(record, _site(record), say).follow()

    def states(self, records: Sequence[JobRecord]) -> list[JobState]:
        """Return the state of each job; jobs of one login node are asked for together."""
        found: dict[str, JobLine] = {}
        for login in dict.fromkeys(each.extra["login"] for each in records):
            own = [each for each in records if each.extra["login"] == login]
            jobs = [(each.scheduler_id, each.name, each.extra["folder"]) for each in own]
            lines = job_lines(SlurmSite.of(login or None), jobs)
            found |= {record.name: line for record, line in zip(own, lines, strict=True)}
        return [_state(each, found[each.name]) for each in records]

    def print_log(self, record: JobRecord, tail: int | None) -> None:
        """Print the job's output so far."""
        site, file = _site(record), f"{record.extra['folder']}/{LOG}"
        site.check(["head", "-c", "1", file], f"The output of {record.name} cannot be read")
        # Streamed: the log of a long run does not fit into one answer.
        site.stream(["tail", "-n", "+1" if tail is None else str(tail), file], print, threading.Event())

    def stop(self, record: JobRecord, say: Say) -> None:
        """Ask the job to save and end, and wait. A job that waits for nodes is canceled.

        Raises HostError if the job did not end in time, and was killed, or did not end well.
        """
        site, number = _site(record), record.scheduler_id
        (state,) = self.states([record])
        if not state.running:
            say(f"{record.name} has already ended: {state.described}")
            return
        # The script looks for this file before it queues the job again.
        site.check(["touch", f"{record.extra['folder']}/{STOPPED}"], f"{record.name} cannot be stopped")
        if state.state == "running":
            say(f"Asking {record.name} to save and end …")
            site.check(["scancel", "--signal=TERM", number], f"{record.name} cannot be stopped")
        else:
            site.check(["scancel", number], f"{record.name} cannot be stopped")
        until = time.monotonic() + STOP_SECONDS
        while state.running and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            (state,) = self.states([record])
        if state.running:
            site.check(["scancel", number], f"{record.name} cannot be stopped")
            raise HostError(
                f"{record.name} did not end in {STOP_SECONDS:.0f} s and was killed; unsaved work is lost.",
                where=site.name,
                next_command=f"mixtral-run logs {record.name}",
            )
        if state.exit_code in (0, 130, 143, None) or state.state == "cancelled":
            say(f"✓ {record.name} has ended: {state.described}")
            return
        raise HostError(
            f"{record.name} has ended, but not cleanly.",
            where=site.name,
            found=state.described,
            next_command=f"mixtral-run logs {record.name}",
        )

    def fetch(self, record: JobRecord, target: Path, overwrite: bool, say: Say) -> Path:
        """Copy the output of the job to `target`."""
        return _site(record).fetch(record.output, target, overwrite, say)


def _site(record: JobRecord) -> SlurmSite:
    return SlurmSite.of(record.extra["login"] or None)


def _state(record: JobRecord, line: JobLine) -> JobState:
    return JobState(
        record=record,
        state=line.state,
        running=not line.ended,
        exit_code=line.exit_code,
        reason=line.reason if line.state not in ("completed", "failed") else "",
        place=line.nodes,
    )
