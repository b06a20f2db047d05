"""Measure an all-reduce between each two hosts of a fleet, in the containers of jobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.host_facts import HostFacts, check_same_gpus
from mixtral_run.fleet.jobs.job_spec import Container, JobOptions, JobSpec, container_argv
from mixtral_run.fleet.jobs.jobs import engine, facts_of, job_name, refuse_taken, send_files
from mixtral_run.fleet.jobs.taking import BUSY, CORDONED, NETWORK, start_argv
from mixtral_run.fleet.network.verdict import PairResult, Verdict, judge, rounds
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from mixtral_run.fleet.ssh.problems import last_line
from mixtral_run.fleet.untrusted import one_line, parse_json

PAIR_SECONDS = 300.0
Say = Callable[[str], None]


def measure_pairs(
    hosts: Sequence[Host], options: JobOptions, floor: float | None, say: Say, ssh: Ssh | None = None
) -> tuple[tuple[PairResult, ...], Verdict]:
    """Measure each pair of hosts, as many pairs at a time as there are hosts for, and judge the figures.

    Raises ConfigError for a single host, and HostError or BusyError before anything runs if a host cannot run a job.
    """
    ssh = ssh or Ssh()
    if len(hosts) < 2:
        raise ConfigError("A network is measured between hosts.", expected="two hosts or more", found=f"{len(hosts)}")
    options.check()
    found = facts_of(hosts, options, ssh)
    check_same_gpus(found, [host.name for host in hosts])
    refuse_taken(ssh, hosts, JobSpec(name=NETWORK, verb=NETWORK, config={}, options=options))
    facts, named = dict(zip(hosts, found, strict=True)), {host.name: host for host in hosts}
    results: list[PairResult] = []
    all_rounds = rounds([host.name for host in hosts])
    for number, names in enumerate(all_rounds, 1):
        say(f"round {number} of {len(all_rounds)}: {', '.join(' – '.join(pair) for pair in names)}")
        pairs = {named[one]: (named[one], named[other]) for one, other in names}
        results += ssh.each(list(pairs), lambda first: _measure_pair(ssh, pairs[first], facts, options))  # noqa: B023
    return tuple(results), judge(results, {host.name: facts[host].rdma for host in hosts}, floor)


def _measure_pair(ssh: Ssh, pair: tuple[Host, Host], facts: dict[Host, HostFacts], options: JobOptions) -> PairResult:
    names = (pair[0].name, pair[1].name)
    spec = JobSpec(name=job_name(NETWORK), verb=NETWORK, config={}, options=options, num_hosts=2)
    address = options.rendezvous_address or facts[pair[0]].address or pair[0].address

    def run(host: Host) -> Answer:
        send_files(ssh, host, facts[host], spec)
        words = ["--address", address, "--port", str(options.rendezvous_port), "--node-rank", str(pair.index(host)),
                 "--processes", str(facts[host].num_gpus or 1)]  # fmt: skip
        program = ("python", "-m", "mixtral_run.trial.pair_bandwidth", *words)
        argv = container_argv(spec, facts[host], Container(attach=("--rm",), program=program))
        command = start_argv(argv, spec, facts[host], attached=True)
        answer = ssh.run(host, command, timeout_seconds=PAIR_SECONDS)
        if answer.exit_code:
            # The process on the other host would wait for this one; after a time limit this one still runs, too.
            for each in pair:
                engine(ssh, each, "rm", "--force", spec.name)
        return answer

    try:
        answers = ssh.each(list(pair), run)
        if any(answer.exit_code in (BUSY, CORDONED) for answer in answers):
            # Somebody took a host in between; these say who.
            refuse_taken(ssh, pair, spec)
            facts_of(pair, options, ssh)
    except HostError as error:
        return PairResult(hosts=names, error=one_line(str(error), 400))
    failed = [f"{host.name}: {_why(answer)}" for host, answer in zip(pair, answers, strict=True) if answer.exit_code]
    if failed:
        return PairResult(hosts=names, error="; ".join(failed))
    return result_of(names, answers[0].output)


def _why(answer: Answer) -> str:
    return one_line(last_line(answer.errors) or last_line(answer.output) or f"exit code {answer.exit_code}", 200)


def result_of(names: tuple[str, str], output: str) -> PairResult:
    """Return the figures in the last line of the first host's output. The host is not trusted."""
    try:
        values = parse_json(last_line(output))
        rate, backend, transports = (values[key] for key in ("all_reduce_gb_per_second", "backend", "transports"))
        if not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate < 0 or backend not in ("nccl", "gloo"):
            raise ValueError(rate)
        counts = {one_line(str(kind), 40): int(count) for kind, count in transports.items()}
        return PairResult(hosts=names, gb_per_second=float(rate), backend=backend, transports=counts)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return PairResult(hosts=names, error=f"its answer is not in the expected form: {one_line(output[-200:], 60)}")


def rows_of(results: Sequence[PairResult], verdict: Verdict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of the table for a terminal."""
    rows: list[tuple[str, ...]] = [
        (
            f"{'!' if each.name in verdict.remarks else '✓'} {each.name}",
            "" if each.gb_per_second is None else f"{each.gb_per_second:.4g}",
            ", ".join(sorted(each.transports)) or each.backend,
            verdict.remarks.get(each.name, ""),
        )
        for each in results
    ]
    return ("hosts", "all-reduce GB/s", "by", "remark"), rows
