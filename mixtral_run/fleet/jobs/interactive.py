"""Containers that read this terminal: `chat --on HOST` and `shell --on HOST`. They end with the connection."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

from mixtral_run.config.fields import Config
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host, inventory_entry_of, remember_hosts, remembered_hosts
from mixtral_run.fleet.jobs.host_facts import HostFacts
from mixtral_run.fleet.jobs.job_spec import Container, JobOptions, JobSpec, container_argv, make_spec
from mixtral_run.fleet.jobs.jobs import engine, facts_of, job_name, list_jobs, refuse_taken, send_files
from mixtral_run.fleet.jobs.queue import when_free
from mixtral_run.fleet.jobs.taking import BUSY, CORDONED, SHELL, busy_error, start_argv, start_mark
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh.connection import Ssh, terminal_argv

_CONNECTION_FAILED = 255
_STOP_SECONDS = 10


def run_here(verb: str, config: Config, options: JobOptions, ssh: Ssh | None = None) -> int:
    """Run a verb on a host with this process's standard streams, and return its exit code.

    Raises BusyError or HostError for a host that is busy, cordoned or not ready, as for a job.
    """
    ssh = ssh or Ssh()
    refuse_unused(verb, options)

    def attempt(hosts: tuple[Host, ...]) -> int:
        host = only_host(verb, options, hosts)
        spec = make_spec(job_name(verb), verb, config, options, 1)
        (facts,) = facts_of([host], options, ssh)
        return _run_attached(ssh, host, facts, spec)

    return when_free(verb, options, _say, ssh, attempt)


def run_shell(options: JobOptions, words: tuple[str, ...], *, dry_run: bool, ssh: Ssh | None = None) -> int:
    """Open a shell in a job's container on a host, or run `words` there. Return the exit code.

    dry_run: only print the command. Raises as `run_here` does.
    """
    ssh = ssh or Ssh()
    refuse_unused(SHELL, options)

    def attempt(hosts: tuple[Host, ...]) -> int:
        host = only_host(SHELL, options, hosts)
        (facts,) = facts_of([host], options, ssh)
        spec = JobSpec(name=job_name(SHELL), verb=SHELL, config={}, options=options)
        if dry_run:
            argv = _container(spec, facts, words or ("bash",))
            print(shlex.join(terminal_argv(host, argv, ssh.known_hosts, terminal=_has_terminal())))
            return 0
        if not words:
            _say(f"Jobs may start on {host.name} while this shell is open, except while a process of it uses a GPU.")
        return _run_attached(ssh, host, facts, spec, words or ("bash",))

    return when_free(SHELL, options, _say, ssh, attempt)


def refuse_unused(verb: str, options: JobOptions) -> None:
    """Raise ConfigError for options that mean nothing for a container which ends with the connection."""
    given = {
        "--detach": options.detach,
        "--max-restarts": options.max_restarts is not None,
        "--min-hosts": options.min_hosts is not None,
    }
    flags = [flag for flag, is_given in given.items() if is_given]
    if flags:
        raise ConfigError(
            f"{verb} reads this terminal, and ends with the connection.",
            found=", ".join(flags),
            next_command=f"the same without {' and '.join(flags)}",
        )


def only_host(verb: str, options: JobOptions, hosts: tuple[Host, ...] = ()) -> Host:
    """Return the only one of `hosts`, or of the hosts of --on if there are none. Raises ConfigError for several."""
    hosts = hosts or hosts_of(options.on, options.inventory, None)
    if len(hosts) != 1:
        raise ConfigError(f"{verb} runs on one host.", found=f"--on {','.join(host.name for host in hosts)}")
    return hosts[0]


def _run_attached(ssh: Ssh, host: Host, facts: HostFacts, spec: JobSpec, program: tuple[str, ...] | None = None) -> int:
    """Run a container on a free host with this process's standard streams, and return its exit code."""
    refuse_taken(ssh, [host], spec)
    send_files(ssh, host, facts, spec)
    remember(host, spec.options)
    argv = start_argv(_container(spec, facts, program), spec, facts, attached=True)
    code = _call(ssh, host, spec.name, terminal_argv(host, argv, ssh.known_hosts, terminal=_has_terminal()))
    # A program may end with these codes too, and must not run twice: without the mark somebody took the host before it.
    if code in (BUSY, CORDONED) and ssh.run(host, ["test", "-e", start_mark(spec, facts)]).exit_code == 1:
        refuse_taken(ssh, [host], spec)
        facts_of([host], spec.options, ssh)
        if code == BUSY:
            shells = [
                (row.host.name, row.job) for row in list_jobs([host], ssh)[0] if row.running and row.verb == SHELL
            ]
            raise busy_error(shells or [(host.name, "another job")])
    return code


def _container(spec: JobSpec, facts: HostFacts, program: tuple[str, ...] | None) -> list[str]:
    """Return `docker run …` with the standard input, and a terminal if this process has one."""
    attach = ("--interactive", *(["--tty"] if _has_terminal() else []), "--rm")
    return container_argv(spec, facts, Container(attach=attach, program=program))


def _has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def remember(host: Host, options: JobOptions) -> None:
    """Remember a host that ran something, unless an inventory names it."""
    if options.inventory is None and not inventory_entry_of(host, remembered_hosts()):
        remember_hosts([host])


def _call(ssh: Ssh, host: Host, name: str, argv: list[str]) -> int:
    """Run `ssh … docker run …` and return its exit code, or 128 and the number of the signal that ended this process.

    Without a terminal the container would outlive a connection that is cut here, so that it is stopped then.
    """
    asked: list[int] = []
    with _terminal_as_found():
        try:
            process = subprocess.Popen(argv)
        except FileNotFoundError as error:
            raise HostError(
                f"{argv[0]} is not installed here.", next_command="apt-get install openssh-client"
            ) from error

        def end(number: int, frame: FrameType | None) -> None:
            del frame
            asked.append(number)
            process.terminate()

        try:
            with _handlers(dict.fromkeys((signal.SIGTERM, signal.SIGHUP), end)):
                code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            _stop(ssh, host, name)
            raise
    if asked or code < 0:
        _stop(ssh, host, name)
    if asked:
        return 128 + asked[0]
    if code < 0 or code == _CONNECTION_FAILED:
        raise HostError(
            f"The connection to {host.name} failed or was lost.",
            where=host.target,
            next_command=f"mixtral-run jobs {host.name}, which lists what may still run there",
        )
    return code


def _stop(ssh: Ssh, host: Host, name: str) -> None:
    """Stop a container, if it is there; --rm then removes it."""
    engine(ssh, host, "stop", "--time", str(_STOP_SECONDS), name)


@contextmanager
def _terminal_as_found() -> Iterator[None]:
    """Restore the terminal at the end: an ssh that is killed leaves it in raw mode."""
    if not sys.stdin.isatty():
        yield
        return
    found = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        # A terminal that was closed has nothing to restore.
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, found)


@contextmanager
def _handlers(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Install signal handlers for the duration of the context."""
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
