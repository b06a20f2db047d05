"""Start, list and stop jobs in containers on hosts.

A job belongs to its hosts, not to this machine: its container carries labels, so `jobs` finds the job from any machine.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mixtral_run.config.fields import Config
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.cordon import CORDON_FILE, cordon_error
from mixtral_run.fleet.explain.explain import recognize
from mixtral_run.fleet.hosts import Host, inventory_entry_of, names_of, remember_hosts, remembered_hosts
from mixtral_run.fleet.jobs import host_facts
from mixtral_run.fleet.jobs.host_facts import FACTS_SCRIPT, FIND_ENGINE, HostFacts, check_same_gpus, parse_facts
from mixtral_run.fleet.jobs.job_spec import (
    DETACHED,
    LABEL_JOB,
    LABEL_NUM_HOSTS,
    LABEL_OUTPUT,
    LABEL_VERB,
    STATE_FOLDER,
    STOP_SECONDS,
    Container,
    JobOptions,
    JobSpec,
    container_argv,
    host_path,
    make_spec,
)
from mixtral_run.fleet.jobs.taking import (
    BUSY,
    CORDONED,
    GPU_VERBS,
    OutputTakenError,
    busy_error,
    job_in,
    needs_free_host,
    start_argv,
)
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from mixtral_run.fleet.ssh.problems import connection_error, last_line, odd_answer, reason_of

ENGINE_SCRIPT = FIND_ENGINE + 'exec $docker "$@"'
KEPT_CONTAINERS = 10


@dataclass(frozen=True)
class RunningJob:
    """A job and the hosts that run it."""

    name: str
    verb: str
    hosts: tuple[Host, ...]
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Addresses by which the hosts reach each other, by the hosts' names; empty if they are not known."""


KILLED = 137
"""Exit code of a container that SIGKILL ended."""
SIGNALLED = (130, 143)
"""Exit codes of a program that ended by itself after SIGINT or SIGTERM."""


@dataclass(frozen=True)
class JobRow:
    """A container of a job, as its host reports it."""

    job: str
    verb: str
    host: Host
    state: str
    """State in the engine's terms, such as running, exited or created."""
    exit_code: int
    out_of_memory: bool
    since: str
    output: str
    """Absolute path on the host that the job writes to, or empty."""
    num_hosts: int = 1
    """Number of hosts on which the job was started."""

    @property
    def running(self) -> bool:
        return self.state in ("running", "created", "restarting", "paused")


def engine(ssh: Ssh, host: Host, *words: str, timeout_seconds: float | None = 60) -> Answer:
    """Run `docker WORDS` on a host and return the answer."""
    return ssh.run(host, ["sh", "-c", ENGINE_SCRIPT, "docker", *words], timeout_seconds=timeout_seconds)


def start(
    verb: str, config: Config, options: JobOptions, ssh: Ssh | None = None, hosts: tuple[Host, ...] = ()
) -> RunningJob:
    """Start a verb on hosts without waiting for its end. hosts: those of options.on, if they are known.

    Raises ConfigError or HostError before a container runs on any host: BusyError if a host runs another job. If one
    host cannot start its container, the containers of the other hosts are removed again.
    """
    ssh = ssh or Ssh()
    options.check()
    hosts = hosts or hosts_of(options.on, options.inventory, None)
    name = job_name(verb)
    make_spec(name, verb, config, options, len(hosts))
    facts = facts_of(hosts, options, ssh)
    if len(hosts) > 1 and not getattr(config, "nproc_per_node", None):
        check_same_gpus(facts, [host.name for host in hosts])
    rendezvous = f"{options.rendezvous_address or facts[0].address or hosts[0].address}:{options.rendezvous_port}"
    spec = make_spec(name, verb, config, options, len(hosts), rendezvous)
    refuse_taken(ssh, hosts, spec)
    known = remembered_hosts()
    # The inventory of a remembered host is kept, even if the job connects as another user.
    remember_hosts(host for host in hosts if options.inventory is None and not inventory_entry_of(host, known))
    job = RunningJob(name, verb, hosts, {host.name: each.address for host, each in zip(hosts, facts, strict=True)})
    try:
        ssh.each(list(hosts), lambda host: start_on(ssh, host, facts[hosts.index(host)], spec))
    except BaseException:
        # The other hosts would wait for the one that cannot start the job.
        ssh.each(list(hosts), lambda host: engine(ssh, host, "rm", "--force", name))
        raise
    return job


def facts_of(hosts: Sequence[Host], options: JobOptions, ssh: Ssh, *, needs_image: bool = True) -> list[HostFacts]:
    """Return the facts about each host. Raises HostError if one of them cannot run a job with these options."""
    found = ssh.each(hosts, lambda host: _facts_or_problem(ssh, host, options, needs_image=needs_image))
    refused = [item for item in found if isinstance(item, HostError)]
    _raise_all(refused, "Several hosts cannot run the job; nothing was started.")
    return [item for item in found if isinstance(item, HostFacts)]


def job_name(verb: str) -> str:
    """Return a new name for a job."""
    return f"{verb}-{time.strftime('%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:4]}"


def refuse_taken(ssh: Ssh, hosts: Sequence[Host], spec: JobSpec) -> None:
    """Raise BusyError if a host runs another job that uses its GPUs, OutputTakenError if a job writes to its output.

    Jobs that start at the same moment are told apart by the script that starts them (taking.py), and by the lock that
    each of them takes in its output.
    """
    rows = [row for row in list_jobs(hosts, ssh)[0] if row.running]
    outputs = {host: host_path(spec.output, spec.options.folders(host)) for host in hosts if spec.output is not None}
    same = [row for row in rows if row.output == outputs.get(row.host)]
    busy = [(row.host.name, row.job) for row in rows if row.verb in GPU_VERBS]
    is_busy = bool(busy) and needs_free_host(spec.verb, share=spec.options.share)
    if same and not (is_busy and spec.options.wait):
        raise OutputTakenError(
            "Another job writes to the same output.",
            where=same[0].output,
            problems=[f"{row.host.name}: {row.job} ({row.verb}), {row.state} since {row.since} UTC" for row in same],
            next_command=f"mixtral-run stop {same[0].job}; or another output for this job",
        )
    if is_busy:
        raise busy_error(busy)


def _facts_or_problem(ssh: Ssh, host: Host, options: JobOptions, *, needs_image: bool) -> HostFacts | HostError:
    folders = options.folders(host)
    arguments = ["sh", "-c", FACTS_SCRIPT, "facts", folders.checkpoints, options.image, CORDON_FILE]
    answer = ssh.run(host, arguments)
    if answer.exit_code == 255:
        return connection_error(host, answer.errors)
    if answer.exit_code:
        return _engine_problem(host, answer, "cannot run jobs")
    try:
        facts, lines = parse_facts(answer.output, folders)
    except ValueError as error:
        return odd_answer(host, "cannot run jobs", str(error))
    if lines["cordon"]:
        return cordon_error(host, lines["cordon"].removeprefix("1"))
    if needs_image and lines["image"] != "1":
        return HostError(
            f"There is no image of the kit on {host.name}.",
            where=host.target,
            expected=options.image,
            next_command=f"mixtral-run bootstrap {host.bootstrap_arguments} --tags image",
        )
    if lines["checkpoints"] != "1":
        return HostError(
            f"{host.name} has no checkpoints folder.",
            where=host.target,
            expected=folders.checkpoints,
            next_command=f"mixtral-run bootstrap {host.bootstrap_arguments} --tags hf_cache; "
            "or --checkpoints-folder FOLDER",
        )
    return facts


def _engine_problem(host: Host, answer: Answer, what: str) -> HostError:
    """Return the error for a host whose engine does not answer, or does not answer this user."""
    found = last_line(answer.errors) or f"exit code {answer.exit_code}"
    known = recognize(answer.errors)
    command = f"mixtral-run bootstrap {host.bootstrap_arguments}"
    if known and known.name == "docker-permission":
        # FIND_ENGINE reports the refused user: the user may be set in ~/.ssh/config only.
        command = known.commands_for(host.bootstrap_arguments)[0].replace('"USER"', f'"{found.partition(": ")[0]}"')
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


def send_files(ssh: Ssh, host: Host, facts: HostFacts, spec: JobSpec) -> None:
    """Write the settings and the sent files of a job into its folder on a host, and remove what old jobs left."""
    folder = f"{facts.folder}/{spec.name}"
    # The container runs with --user as the caller, who owns these files.
    ssh.check(host, ["mkdir", "-p", folder, f"{folder}/{STATE_FOLDER}"])
    ssh.check(host, _write_argv(f"{folder}/config.json"), stdin=spec.config_json().encode())
    for file, name in spec.files:
        ssh.send(host, _write_argv(f"{folder}/{name}"), file)
    _forget_old(ssh, host, facts)


def start_on(ssh: Ssh, host: Host, facts: HostFacts, spec: JobSpec, container: Container = DETACHED) -> None:
    """Start the container of a job on one host. Raises HostError if it cannot start."""
    send_files(ssh, host, facts, spec)
    answer = ssh.run(host, start_argv(container_argv(spec, facts, container), spec, facts), timeout_seconds=300)
    if answer.exit_code == BUSY:
        raise busy_error([(host.name, job_in(answer.errors))])
    if answer.exit_code == CORDONED:
        raise cordon_error(host, answer.errors)
    if answer.exit_code:
        engine(ssh, host, "rm", "--force", spec.name)  # one that was created counts as a job
        found = reason_of(answer.errors)
        raise HostError(
            f"The container of {spec.name} could not be started on {host.name}.",
            where=host.target,
            found=found or f"exit code {answer.exit_code}",
            next_command=f"mixtral-run explain {json.dumps(found[:120])}",
        )


def _write_argv(path: str) -> list[str]:
    return ["sh", "-c", 'cat > "$1.partial" && mv "$1.partial" "$1"', "write", path]


def _forget_old(ssh: Ssh, host: Host, facts: HostFacts) -> None:
    """Remove the containers and files of finished jobs, except for the newest. A container mounts its job's folder."""
    script = (
        'docker="$1"; $docker ps --all --quiet --filter status=exited --filter "label=$2" | tail -n "+$3" '
        '| xargs -r $docker rm >/dev/null; kept=$($docker ps --all --filter "label=$2" --format "$5") && cd "$4" '
        '&& ls -1t | tail -n +50 | grep -vxF -e "$kept" | xargs -r rm -rf --'
    )
    name_format = f'{{{{.Label "{LABEL_JOB}"}}}}'
    words = [" ".join(facts.docker), LABEL_JOB, str(KEPT_CONTAINERS + 1), facts.folder, name_format]
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
    host_facts.NEEDS_ENGINE
    + FIND_ENGINE
    + 'ids=$($docker ps --all --quiet --filter "label=$1") || exit; [ -z "$ids" ] || $docker inspect --format "$2" $ids'
)


def list_jobs(hosts: Sequence[Host], ssh: Ssh | None = None) -> tuple[list[JobRow], list[HostError]]:
    """Return the jobs on hosts, newest first, and an error for each host whose jobs are not all known.

    A host with one container that it describes in an unexpected form gives an error and its other containers.
    """
    ssh = ssh or Ssh()
    rows: list[JobRow] = []
    errors: list[HostError] = []
    for found, error in ssh.each(hosts, lambda host: _rows_of(ssh, host)):
        rows += found
        errors += [error] if error else []
    return sorted(rows, key=lambda row: row.since, reverse=True), errors


def _rows_of(ssh: Ssh, host: Host) -> tuple[list[JobRow], HostError | None]:
    try:
        answer = ssh.run(host, ["sh", "-c", _LIST_SCRIPT, "list", LABEL_JOB, _ROW])
    except HostError as error:
        return [], error
    if answer.exit_code == 255:
        return [], connection_error(host, answer.errors)
    if answer.exit_code == host_facts.NO_ENGINE:
        return [], host_facts.NoEngineError(host)
    # A container may be removed between `docker ps` and `docker inspect`.
    if answer.exit_code and "no such object" not in answer.errors.lower():
        return [], _engine_problem(host, answer, "does not report its jobs")
    rows, odd = [], []
    for line in answer.output.splitlines():
        try:
            rows.append(_row(host, line))
        except ValueError:
            odd.append(line)
    return rows, odd_answer(host, "does not report all its jobs", odd[0]) if odd else None


_ROW_PATTERN = re.compile(
    r"(?P<job>[A-Za-z0-9][A-Za-z0-9_.-]{0,127})\t(?P<verb>[a-z][a-z0-9_-]{0,31})\t(?P<state>[a-z]{1,16})"
    r"\t(?P<code>-?[0-9]{1,9})\t(?P<killed>true|false)\t(?P<since>[0-9TZ:.+-]{0,40})"
    r"\t(?P<output>(?:/|[a-z][a-z0-9]*://)[^\t]*|)\t(?P<num_hosts>[0-9]{0,5})"
)


def _row(host: Host, line: str) -> JobRow:
    """Return the container that a line of _ROW describes. Raises ValueError for a line in another form."""
    match = _ROW_PATTERN.fullmatch(line.replace("<no value>", ""))
    if match is None:
        raise ValueError(line)
    cells = match.groupdict()
    return JobRow(
        job=cells["job"], verb=cells["verb"], host=host, state=cells["state"], exit_code=int(cells["code"]),
        out_of_memory=cells["killed"] == "true", since=cells["since"][:19], output=cells["output"],
        num_hosts=int(cells["num_hosts"] or 1),
    )  # fmt: skip


def find_job(name: str, hosts: Sequence[Host] = (), ssh: Ssh | None = None) -> list[JobRow]:
    """Return the containers of a job, found by its name or the start of its name.

    Raises ConfigError if no job, or more than one, matches.
    """
    return find_whole_job(name, hosts, ssh)[0]


def find_whole_job(
    name: str, hosts: Sequence[Host] = (), ssh: Ssh | None = None, *, prefer_running: bool = False
) -> tuple[list[JobRow], list[HostError]]:
    """Return the containers of a job as `find_job` does; and the errors of hosts if hosts of the job are missing.

    With `prefer_running`, the start of a name selects the only running job, even if ended jobs match too.
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
    unknown = [error for error in errors if not isinstance(error, host_facts.NoEngineError)]
    if unknown and not found:
        _raise_all(unknown, f"No job is called {name!r} on the hosts that answer.")
    raise ConfigError(
        f"No job is called {name!r}." if not found else f"Several jobs are called {name!r}.",
        where=f"on {names_of(hosts)}",
        found=", ".join(sorted(found)) or ", ".join(row.job for row in rows[:5]) or "no jobs",
        next_command="mixtral-run jobs",
    )


def stop(rows: Sequence[JobRow], ssh: Ssh | None = None) -> list[JobRow]:
    """Ask a job to save and end (SIGTERM), wait for its end, and return its ended containers.

    The engine kills a container that has not ended after STOP_SECONDS. Raises HostError if a host cannot be asked.
    """
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
    _raise_all(errors, f"{job} was asked to end; its end is not known.")
    return [row for row in ended if row.job == job]
