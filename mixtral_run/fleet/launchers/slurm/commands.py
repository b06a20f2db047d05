"""Run Slurm's commands, and handle the files of jobs, on this machine or on a login node over SSH."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host, find_hosts, remembered_hosts
from mixtral_run.fleet.jobs.fetch import fetch
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from mixtral_run.fleet.ssh.problems import connection_error, last_line
from mixtral_run.fleet.untrusted import printable

TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class SlurmSite:
    """The machine that has Slurm's commands. login: a login node; None is this machine."""

    login: Host | None = None

    @classmethod
    def of(cls, login: str | None) -> SlurmSite:
        """Return the site of --login."""
        return cls(find_hosts([login], remembered_hosts())[0] if login else None)

    @property
    def name(self) -> str:
        return self.login.name if self.login else "this machine"

    def run(self, argv: Sequence[str], stdin: bytes | None = None) -> Answer:
        """Run a command and return its answer. Raises HostError if the login node or the command cannot be reached."""
        if self.login is not None:
            answer = Ssh().run(self.login, argv, stdin=stdin, timeout_seconds=TIMEOUT_SECONDS)
            if answer.exit_code == 255:
                raise connection_error(self.login, answer.errors)
        else:
            answer = _local(argv, stdin)
        if answer.exit_code == 127:
            raise HostError(
                f"Slurm's commands are not on {self.name}.",
                expected="sbatch, scontrol and scancel in PATH",
                found=last_line(answer.errors),
                next_command="--login NODE, a node of the cluster that has them",
            )
        return answer

    def check(self, argv: Sequence[str], what: str, stdin: bytes | None = None) -> str:
        """Run a command and return its output. Raises HostError with the command's last line if it fails."""
        answer = self.run(argv, stdin)
        if answer.exit_code:
            found = last_line(answer.errors) or last_line(answer.output) or f"exit code {answer.exit_code}"
            raise HostError(f"{what} on {self.name}.", found=found)
        return answer.output

    def send(self, file: Path, target: str) -> None:
        """Copy a file of this machine to an absolute path of the site."""
        if self.login is None:
            shutil.copyfile(file, target)
        else:
            Ssh().send(self.login, ["sh", "-c", 'cat > "$1.partial" && mv "$1.partial" "$1"', "write", target], file)

    def stream(self, argv: Sequence[str], on_line: Callable[[str], None], stop: threading.Event) -> None:
        """Pass the lines of a command's output on until it ends or `stop` is set."""
        if self.login is not None:
            Ssh().stream(self.login, argv, on_line, stop, lambda _: None)
        else:
            _stream_local(argv, on_line, stop)

    def fetch(self, path: str, target: Path, overwrite: bool, say: Callable[[str], None]) -> Path:
        """Copy a file or folder of the site to `target`, completely or not at all."""
        if self.login is not None:
            return fetch(self.login, path, target, overwrite=overwrite, say=say)
        return _copy(Path(path), target)


def _local(argv: Sequence[str], stdin: bytes | None) -> Answer:
    try:
        done = subprocess.run(
            argv, input=stdin if stdin is not None else b"", capture_output=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except FileNotFoundError:
        return Answer(127, "", f"{argv[0]}: command not found")
    except subprocess.TimeoutExpired as error:
        raise HostError(
            "Slurm does not answer.", expected=f"an answer within {TIMEOUT_SECONDS:.0f} s", next_command="scontrol ping"
        ) from error
    texts = [printable(each.decode("utf-8", errors="replace")) for each in (done.stdout, done.stderr)]
    return Answer(done.returncode, *texts)


def _stream_local(argv: Sequence[str], on_line: Callable[[str], None], stop: threading.Event) -> None:
    # Ctrl-C in a terminal signals the whole process group; this process decides whether it leaves.
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        threading.Thread(target=_kill_when, args=(process, stop), daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            on_line(printable(line.decode("utf-8", errors="replace").rstrip("\n")))


def _kill_when(process: subprocess.Popen[bytes], stop: threading.Event) -> None:
    while process.poll() is None:
        if stop.wait(0.2):
            process.kill()
            return


def _copy(source: Path, target: Path) -> Path:
    if not source.exists():
        raise HostError("There is no output.", where=str(source), expected="a file or folder", found="nothing")
    if target.exists() and target.resolve() == source.resolve():
        raise ConfigError("The output is already there.", where=str(target))
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".mixtral-run-fetch-", dir=target.absolute().parent))
    try:
        if source.is_dir():
            shutil.copytree(source, work / "new", symlinks=True)
        else:
            shutil.copyfile(source, work / "new")
        if target.exists():
            target.rename(work / "old")
        (work / "new").rename(target)
    finally:
        if (work / "old").exists() and not target.exists():
            (work / "old").rename(target)
        shutil.rmtree(work, ignore_errors=True)
    return target


@dataclass(frozen=True)
class JobLine:
    """What `scontrol show job` says about a job. state: JobState in lower case, `unknown` if Slurm has forgotten it."""

    state: str = "unknown"
    reason: str = ""
    exit_code: int | None = None
    nodes: str = ""
    restarts: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED


ENDED = (
    "boot_fail", "cancelled", "completed", "deadline", "failed", "node_fail", "out_of_memory", "preempted", "timeout",
    "unknown",
)  # fmt: skip
"""States that a job does not leave again. Slurm forgets a job some minutes after its end (MinJobAge)."""


def parse_job(text: str, name: str, outcome: str) -> JobLine:
    """Parse a line of `scontrol show job --oneliner`.

    Args:
        text: the line; empty if Slurm does not know the job.
        name: of the job. A line of another job, which got the same number later, is not used.
        outcome: exit code of the last attempt that ended, as the script wrote it, or empty.
    """
    values = dict(re.findall(r"(\w+)=(\S*)", text))
    if values.get("JobName") != name:
        code = int(outcome) if re.fullmatch(r"\d{1,3}", outcome) else None
        state = "unknown" if code is None else "completed" if code == 0 else "failed"
        return JobLine(state, exit_code=code)
    own, _, by_signal = values.get("ExitCode", "").partition(":")
    state = values.get("JobState", "unknown").lower()
    code = None
    if own.isdecimal() and state in ENDED:
        code = 128 + int(by_signal) if by_signal not in ("", "0") and by_signal.isdecimal() else int(own)
    reason = values.get("Reason", "None")
    return JobLine(
        state,
        "" if reason == "None" else reason,
        code,
        "" if values.get("NodeList") in (None, "(null)") else values["NodeList"],
        int(values.get("Restarts", "0")) if values.get("Restarts", "0").isdecimal() else 0,
    )


_STATES_SCRIPT = """
command -v scontrol >/dev/null || { echo "scontrol: command not found" >&2; exit 127; }
while [ "$#" -gt 1 ]; do
  line=$(scontrol show job --oneliner "$1" 2>&1) || case $line in
    *"Invalid job id"*) line= ;;
    *) echo "$line" >&2; exit 1 ;;
  esac
  printf 'job=%s\\n' "$(echo "$line" | grep '^JobId=' | head -n 1)"
  printf 'outcome=%s\\n' "$(head -c 9 "$2/outcome" 2>/dev/null)"
  shift 2
done
"""
"""Arguments: number and folder of each job. Prints what Slurm says of it, if it still knows it, and its outcome."""


def job_lines(site: SlurmSite, jobs: Sequence[tuple[str, str, str]]) -> list[JobLine]:
    """Return the state of jobs, each given as (number, name, folder)."""
    words = [word for number, _, folder in jobs for word in (number, folder)]
    output = site.check(["sh", "-c", _STATES_SCRIPT, "states", *words], "Slurm does not report its jobs")
    lines = [line.partition("=")[2] for line in output.splitlines() if line.startswith(("job=", "outcome="))]
    if len(lines) != 2 * len(jobs):
        raise HostError("Slurm's answer is not in the expected form.", where=site.name, found=output[:200])
    return [parse_job(lines[2 * place], name, lines[2 * place + 1].strip()) for place, (_, name, _) in enumerate(jobs)]
