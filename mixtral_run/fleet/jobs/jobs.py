"""Jobs in containers on hosts: starting, listing, stopping, and fetching what they made.

A job belongs to its hosts, not to this machine: its container carries labels, so `jobs` finds it from anywhere.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mixtral_run.config.fields import Config
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.explain.explain import recognize
from mixtral_run.fleet.hosts import Host, names_of, remember_hosts, remembered_hosts, told_by_inventory
from mixtral_run.fleet.jobs.job_spec import (
    FACTS_SCRIPT,
    FIND_ENGINE,
    LABEL_JOB,
    LABEL_NUM_HOSTS,
    LABEL_OUTPUT,
    LABEL_VERB,
    STOP_SECONDS,
    HostFacts,
    JobOptions,
    JobSpec,
    check_same_gpus,
    container_argv,
    make_spec,
    parse_facts,
)
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from mixtral_run.fleet.ssh.problems import connection_error, last_line

ENGINE_SCRIPT = FIND_ENGINE + 'exec $docker "$@"'
KEPT_CONTAINERS = 10


@dataclass(frozen=True)
class RunningJob:
    """A job on its hosts."""

    name: str
    verb: str
    hosts: tuple[Host, ...]


KILLED = 137
"""The exit code of a container that SIGKILL ended."""
SIGNALLED = (130, 143)
"""What a program ends with after SIGINT or SIGTERM, when it had the time to end by itself."""


@dataclass(frozen=True)
class JobRow:
    """A container of a job, as its host tells of it."""

    job: str
    verb: str
    host: Host
    state: str
    """running, exited or created, in the engine's words."""
    exit_code: int
    out_of_memory: bool
    since: str
    output: str
    """What the job writes, on the host."""
    num_hosts: int = 1
    """On how many hosts the job was started."""

    @property
    def running(self) -> bool:
        return self.state in ("running", "created", "restarting", "paused")


def engine(ssh: Ssh, host: Host, *words: str, timeout_seconds: float | None = 60) -> Answer:
    """Run `docker WORDS` on a host."""
    return ssh.run(host, ["sh", "-c", ENGINE_SCRIPT, "docker", *words], timeout_seconds=timeout_seconds)


def start(verb: str, config: Config, options: JobOptions, ssh: Ssh | None = None) -> RunningJob:
    """Start a verb on hosts and return at once. Raises ConfigError or HostError before anything runs anywhere."""
    ssh = ssh or Ssh()
    options.check()
    hosts = hosts_of(options.on, options.inventory, None)
    name = f"{verb}-{time.strftime('%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:4]}"
    make_spec(name, verb, config, options, len(hosts))
    found = ssh.each(hosts, lambda host: _facts_or_problem(ssh, host, options))
    refused = [item for item in found if isinstance(item, HostError)]
    _raise_all(refused, "Several hosts cannot run the job; nothing was started.")
    facts = [item for item in found if isinstance(item, HostFacts)]
    if len(hosts) > 1 and not getattr(config, "nproc_per_node", None):
        check_same_gpus(facts, [host.name for host in hosts])
    rendezvous = f"{options.rendezvous_address or facts[0].address or hosts[0].address}:{options.rendezvous_port}"
    spec = make_spec(name, verb, config, options, len(hosts), rendezvous)
    known = remembered_hosts()
    # What an inventory says of a host stays, also when a job goes there as another user.
    remember_hosts(host for host in hosts if options.inventory is None and not told_by_inventory(host, known))
    job = RunningJob(name, verb, hosts)
    try:
        ssh.each(list(hosts), lambda host: _start_on(ssh, host, facts[hosts.index(host)], spec))
    except BaseException:
        # One host that cannot start the job would leave the others waiting for it.
        ssh.each(list(hosts), lambda host: engine(ssh, host, "rm", "--force", name))
        raise
    return job


def _facts_or_problem(ssh: Ssh, host: Host, options: JobOptions) -> HostFacts | HostError:
    arguments = ["sh", "-c", FACTS_SCRIPT, "facts", options.checkpoints_folder, options.image]
    answer = ssh.run(host, arguments)
    if answer.exit_code == 255:
        return connection_error(host, answer.errors)
    try:
        facts, lines = parse_facts(answer.output)
    except (KeyError, ValueError):
        return _engine_problem(host, answer, "cannot run jobs")
    if lines["image"] != "1":
        return HostError(
            f"There is no image of the kit on {host.name}.",
            where=host.target,
            expected=options.image,
            next_command=f"mixtral-run bootstrap {host.bootstrap_words} --tags image",
        )
    if lines["checkpoints"] != "1":
        return HostError(
            f"The folder of checkpoints is not on {host.name}.",
            where=host.target,
            expected=options.checkpoints_folder,
            next_command=f"mixtral-run bootstrap {host.bootstrap_words} --tags hf_cache; "
            "or --checkpoints-folder FOLDER",
        )
    return facts


def _engine_problem(host: Host, answer: Answer, what: str) -> HostError:
    """A host's engine does not answer, or not to this user, whom setting the host up again would not help."""
    found = last_line(answer.errors) or f"exit code {answer.exit_code}"
    known = recognize(answer.errors)
    command = f"mixtral-run bootstrap {host.bootstrap_words}"
    if known and known.name == "docker-permission":
        # FIND_ENGINE says whom the engine refused: the user may stand in ~/.ssh/config alone.
        command = known.commands_for(host.bootstrap_words)[0].replace('"USER"', f'"{found.partition(": ")[0]}"')
    return HostError(
        f"{host.name} {what}: {known.title if known else 'its Docker engine does not answer'}.",
        where=host.target,
        found=found,
        next_command=command,
    )


def _raise_all(errors: Sequence[HostError], what: str) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise HostError(what, problems=[str(error) for error in errors])


def _start_on(ssh: Ssh, host: Host, facts: HostFacts, spec: JobSpec) -> None:
    folder = f"{facts.folder}/{spec.name}"
    # The container's user reads it: with --user that is the caller, who owns it.
    ssh.check(host, ["mkdir", "-p", folder])
    ssh.check(host, _write_argv(f"{folder}/config.json"), stdin=spec.config_json().encode())
    for file, name in spec.files:
        ssh.send(host, _write_argv(f"{folder}/{name}"), file)
    _forget_old(ssh, host, facts)
    answer = ssh.run(host, container_argv(spec, facts), timeout_seconds=300)
    if answer.exit_code:
        raise HostError(
            f"The container of {spec.name} could not be started on {host.name}.",
            where=host.target,
            found=last_line(answer.errors) or f"exit code {answer.exit_code}",
            next_command=f"mixtral-run explain {json.dumps(last_line(answer.errors)[:120])}",
        )


def _write_argv(path: str) -> list[str]:
    return ["sh", "-c", 'cat > "$1.partial" && mv "$1.partial" "$1"', "write", path]


def _forget_old(ssh: Ssh, host: Host, facts: HostFacts) -> None:
    """Remove containers and files of all but the newest finished jobs."""
    script = (
        'docker="$1"; $docker ps --all --quiet --filter status=exited --filter "label=$2" | tail -n "+$3" '
        '| xargs -r $docker rm >/dev/null; cd "$4" && ls -1t | tail -n +50 | xargs -r rm -rf --'
    )
    words = [" ".join(facts.docker), LABEL_JOB, str(KEPT_CONTAINERS + 1), facts.folder]
    ssh.run(host, ["sh", "-c", script, "prune", *words])


_ROW = "\t".join(
    (
        f'{{{{index .Config.Labels "{LABEL_JOB}"}}}}',
        f'{{{{index .Config.Labels "{LABEL_VERB}"}}}}',
        "{{.State.Status}}",
        "{{.State.ExitCode}}",
        "{{.State.OOMKilled}}",
        "{{.State.StartedAt}}",
        f'{{{{index .Config.Labels "{LABEL_OUTPUT}"}}}}',
        f'{{{{index .Config.Labels "{LABEL_NUM_HOSTS}"}}}}',
    )
)
_LIST_SCRIPT = (
    FIND_ENGINE
    + 'ids=$($docker ps --all --quiet --filter "label=$1") || exit; [ -z "$ids" ] || $docker inspect --format "$2" $ids'
)


def list_jobs(hosts: Sequence[Host], ssh: Ssh | None = None) -> tuple[list[JobRow], list[HostError]]:
    """Jobs on hosts, newest first, and what keeps a host from telling."""
    ssh = ssh or Ssh()
    rows: list[JobRow] = []
    errors: list[HostError] = []
    for found in ssh.each(hosts, lambda host: _rows_of(ssh, host)):
        if isinstance(found, HostError):
            errors.append(found)
        else:
            rows += found
    return sorted(rows, key=lambda row: row.since, reverse=True), errors


def _rows_of(ssh: Ssh, host: Host) -> list[JobRow] | HostError:
    answer = ssh.run(host, ["sh", "-c", _LIST_SCRIPT, "list", LABEL_JOB, _ROW])
    if answer.exit_code == 255:
        return connection_error(host, answer.errors)
    # A container that was removed between the two questions is none.
    if answer.exit_code and "no such object" not in answer.errors.lower():
        return _engine_problem(host, answer, "does not tell of its jobs")
    rows = [line.split("\t") for line in answer.output.splitlines()]
    return [_row(host, cells) for cells in rows if len(cells) == 8]


def _row(host: Host, cells: Sequence[str]) -> JobRow:
    job, verb, state, code, killed, since, output, num_hosts = ("" if cell == "<no value>" else cell for cell in cells)
    return JobRow(job, verb, host, state, int(code), killed == "true", since[:19], output, int(num_hosts or 1))


def find_job(name: str, hosts: Sequence[Host] = (), ssh: Ssh | None = None) -> list[JobRow]:
    """The containers of a job by its name, or the start of it. Raises ConfigError where there is none, or several."""
    return find_whole_job(name, hosts, ssh)[0]


def find_whole_job(
    name: str, hosts: Sequence[Host] = (), ssh: Ssh | None = None, *, prefer_running: bool = False
) -> tuple[list[JobRow], list[HostError]]:
    """As find_job; and where hosts of the job are missing, what keeps hosts from telling.

    With `prefer_running` the start of a name means the only job that runs, where others of that start have ended.
    """
    hosts = hosts or remembered_hosts()
    rows, errors = list_jobs(hosts, ssh)
    matching = [row for row in rows if row.job == name] or [row for row in rows if row.job.startswith(name)]
    running = {row.job for row in matching if row.running}
    if prefer_running and len(running) == 1:
        matching = [row for row in matching if row.job in running]
    found = {row.job for row in matching}
    if len(found) == 1:
        whole = len(matching) >= max(row.num_hosts for row in matching)
        return sorted(matching, key=lambda row: hosts.index(row.host)), [] if whole else errors
    if errors and not found:
        _raise_all(errors, f"No job is called {name!r} on the hosts that answer.")
    raise ConfigError(
        f"No job is called {name!r}." if not found else f"Several jobs are called {name!r}.",
        where=f"on {names_of(hosts)}",
        found=", ".join(sorted(found)) or ", ".join(row.job for row in rows[:5]) or "no jobs",
        next_command="mixtral-run jobs",
    )


def stop(rows: Sequence[JobRow], ssh: Ssh | None = None) -> list[JobRow]:
    """Ask a job to save and end (SIGTERM), and wait; what does not end in time is killed. Returns how it ended."""
    ssh = ssh or Ssh()
    job, hosts = rows[0].job, [row.host for row in rows]
    words = ("stop", "--time", str(STOP_SECONDS), job)
    answers = ssh.each(hosts, lambda host: engine(ssh, host, *words, timeout_seconds=STOP_SECONDS + 60))
    problems = [
        f"{host.name}: {last_line(answer.errors)}"
        for host, answer in zip(hosts, answers, strict=True)
        if answer.exit_code
    ]
    if problems:
        raise HostError(f"{job} could not be stopped everywhere.", problems=problems)
    ended, errors = list_jobs(hosts, ssh)
    _raise_all(errors, f"{job} was asked to end; how it ended cannot be told.")
    return [row for row in ended if row.job == job]


def fetch(host: Host, path: str, target: Path, ssh: Ssh | None = None, overwrite: bool = False) -> Path:
    """Bring a file or folder of a host here as `target`, whole or not at all. Raises ConfigError where that exists.

    With `overwrite` what is there stays until all has come.
    """
    ssh = ssh or Ssh()
    source = PurePosixPath(path)
    if target.exists() and not overwrite:
        raise ConfigError(
            "There is something of that name already.",
            where=str(target),
            next_command="another folder, or --overwrite",
        )
    target.resolve().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.resolve().parent))
    script = 'cd "$1" && exec tar -cf - -- "$2"'
    new, old = work / "new", work / "old"
    try:
        with ssh.receive(host, ["sh", "-c", script, "fetch", str(source.parent), source.name]) as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r|") as archive:
                    archive.extractall(new, filter="data")
            except tarfile.TarError as error:
                # An empty stream: tar's own words say why.
                raise HostError(f"{path} could not be fetched from {host.name}.", found=str(error)) from error
        if target.exists():
            target.rename(old)
        (new / source.name).rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(work, ignore_errors=True)
    return target
