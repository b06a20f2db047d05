"""Containers that read this terminal: `chat --on HOST` and `shell --on HOST`. They end with the connection."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from mixtral_run.config.fields import Config
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host, inventory_entry_of, remember_hosts, remembered_hosts
from mixtral_run.fleet.jobs.job_spec import Container, HostFacts, JobOptions, JobSpec, container_argv, make_spec
from mixtral_run.fleet.jobs.jobs import facts_of, job_name, send_files
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh.connection import Ssh, terminal_argv

SHELL = "shell"
_CONNECTION_FAILED = 255


def run_here(verb: str, config: Config, options: JobOptions, ssh: Ssh | None = None) -> int:
    """Run a verb on a host with this process's standard streams, and return its exit code."""
    ssh = ssh or Ssh()
    if options.detach:
        raise ConfigError(f"{verb} reads this terminal.", found="--detach", next_command="the same without --detach")
    host = only_host(verb, options)
    spec = make_spec(job_name(verb), verb, config, options, 1)
    (facts,) = facts_of([host], options, ssh)
    send_files(ssh, host, facts, spec)
    remember(host, options)
    return _call(host, attached_argv(spec, facts, host, ssh.known_hosts))


def run_shell(options: JobOptions, words: tuple[str, ...], *, dry_run: bool, ssh: Ssh | None = None) -> int:
    """Open a shell in a job's container on a host, or run `words` there. Return the exit code.

    dry_run: only print the command.
    """
    ssh = ssh or Ssh()
    options.check()
    host = only_host(SHELL, options)
    (facts,) = facts_of([host], options, ssh)
    spec = JobSpec(name=job_name(SHELL), verb=SHELL, config={}, options=options)
    argv = attached_argv(spec, facts, host, ssh.known_hosts, words or ("bash",))
    if dry_run:
        print(shlex.join(argv))
        return 0
    send_files(ssh, host, facts, spec)
    remember(host, options)
    return _call(host, argv)


def only_host(verb: str, options: JobOptions) -> Host:
    """Return the host of --on. Raises ConfigError if there are several."""
    hosts = hosts_of(options.on, options.inventory, None)
    if len(hosts) != 1:
        raise ConfigError(f"{verb} runs on one host.", found=f"--on {','.join(host.name for host in hosts)}")
    return hosts[0]


def attached_argv(
    spec: JobSpec, facts: HostFacts, host: Host, known_hosts: Path, program: tuple[str, ...] | None = None
) -> list[str]:
    """Return `ssh … docker run …` with the standard input, and a terminal if this process has one."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    attach = ("--interactive", *(["--tty"] if terminal else []), "--rm")
    container = Container(attach=attach, program=program)
    return terminal_argv(host, container_argv(spec, facts, container), known_hosts, terminal=terminal)


def remember(host: Host, options: JobOptions) -> None:
    """Remember a host that ran something, unless an inventory names it."""
    if options.inventory is None and not inventory_entry_of(host, remembered_hosts()):
        remember_hosts([host])


def _call(host: Host, argv: list[str]) -> int:
    try:
        code = subprocess.run(argv, check=False).returncode
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed here.", next_command="apt-get install openssh-client") from error
    if code == _CONNECTION_FAILED:
        raise HostError(
            f"The connection to {host.name} failed or was lost.",
            where=host.target,
            next_command=f"mixtral-run jobs {host.name}, which lists what may still run there",
        )
    return code
