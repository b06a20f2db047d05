"""Serve a model on a host: the container of an engine, started, watched and stopped as a job."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import time

from mixtral_run.config.names.hub_names import may_be_hub_name
from mixtral_run.config.names.store_names import store_url
from mixtral_run.config.verbs.serve import IMAGES, ServeConfig
from mixtral_run.errors import ConfigError, HostError, WeightsError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.container_paths import HF_HOME, KERNELS
from mixtral_run.fleet.jobs.engine_command import PORT_INSIDE, engine_entrypoint, engine_words, read_adapter_config
from mixtral_run.fleet.jobs.host_facts import HostFacts
from mixtral_run.fleet.jobs.interactive import only_host, remember
from mixtral_run.fleet.jobs.job_log import job_error
from mixtral_run.fleet.jobs.job_spec import Container, JobOptions, JobSpec, container_argv, host_path, make_spec
from mixtral_run.fleet.jobs.jobs import RunningJob, engine, facts_of, job_name, list_jobs, refuse_taken, start_on
from mixtral_run.fleet.jobs.queue import when_free
from mixtral_run.fleet.ssh.connection import Ssh, destination
from mixtral_run.fleet.ssh.problems import last_line

SERVE = "serve"
POLL_SECONDS = 5.0
_LARGEST_CONFIG = 1_000_000
_HEALTH = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{PORT_INSIDE}/health', timeout=5).read()"

_LOOK = """
if [ -f "$1/latest_checkpointed_iteration.txt" ]; then echo checkpoint
elif [ -f "$1/$2" ]; then echo ok; head -c "$3" "$1/$2"
else echo none; fi
"""
"""Script that prints what a folder is, and the file that it must have. Arguments: folder, file, most bytes."""

ENVIRONMENT = {
    "HF_HOME": HF_HOME,
    # The user of the container may be unknown to the image, and has no home folder there.
    "HOME": "/tmp", "USER": "mixtral", "XDG_CACHE_HOME": "/tmp/.cache", "VLLM_CACHE_ROOT": f"{KERNELS}/vllm",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


def serve(config: ServeConfig, options: JobOptions, ssh: Ssh | None = None) -> RunningJob | None:
    """Start a server and wait until it answers; with --detach, only start it; with --dry-run, print its command.

    Raises ConfigError, WeightsError or HostError before a container runs if model or adapter cannot be served.
    """
    ssh = ssh or Ssh()
    _check(config, options)
    options = dataclasses.replace(options, image=config.engine_image or IMAGES[config.engine])
    job = when_free(SERVE, options, _say, ssh, lambda hosts: _start(config, options, ssh, hosts))
    if job is None:
        return None
    _say(f"{job.name} runs on {job.hosts[0].name}; to stop it: mixtral-run stop {job.name}")
    if options.detach:
        _say(f"output: mixtral-run logs -f {job.name}")
        return job
    _wait(ssh, job, config.wait_minutes)
    _say_how(config, job)
    return job


def _check(config: ServeConfig, options: JobOptions) -> None:
    """Raise ConfigError for settings that an engine on one host cannot use."""
    problems = [
        f"{flag}: expected a folder of the host, or for --load a model on the hub; found {url}"
        for flag, url in (("--load", store_url(config.load)), ("--adapter", store_url(config.adapter)))
        if url is not None
    ]
    if options.min_hosts is not None:
        problems.append(f"--min-hosts: a server runs on one host; found {options.min_hosts}")
    if problems:
        raise ConfigError("Some settings of the server are wrong.", problems=problems)


def _start(config: ServeConfig, options: JobOptions, ssh: Ssh, hosts: tuple[Host, ...]) -> RunningJob | None:
    """Start the container of a server. With --dry-run, print its command and return None."""
    host = only_host(SERVE, options, hosts)
    spec = make_spec(job_name(SERVE), SERVE, config, options, 1)
    (facts,) = facts_of([host], options, ssh, needs_image=False)
    rank = _check_model(ssh, host, spec)
    container = serving_container(config, spec, facts, rank)
    if config.dry_run:
        print(shlex.join(container_argv(spec, facts, container)))
        return None
    refuse_taken(ssh, [host], spec)
    _pull(ssh, host, options.image)
    try:
        start_on(ssh, host, facts, spec, container)
    except HostError as error:
        raise _port_error(host, config, error) from error
    remember(host, options)
    return RunningJob(spec.name, SERVE, (host,))


def serving_container(config: ServeConfig, spec: JobSpec, facts: HostFacts, rank: int | None) -> Container:
    """Return what the container of the engine has beside that of a job."""
    adapter = spec.config["adapter"]
    words = engine_words(config, str(spec.config["load"]), adapter, rank, facts.num_gpus)
    publish = f"{f'[{config.bind}]' if ':' in config.bind else config.bind}:{config.port}:{PORT_INSIDE}"
    more = (*engine_entrypoint(config.engine), "--publish", publish)
    return Container(program=tuple(words), more=more, environment=ENVIRONMENT)


def _check_model(ssh: Ssh, host: Host, spec: JobSpec) -> int | None:
    """Return the rank of the adapter, None without one. Raises WeightsError for what an engine cannot serve."""
    load = str(spec.config["load"])
    if not may_be_hub_name(load):
        folder = host_path(load, spec.options.folders(host))
        kind, _ = _look(ssh, host, folder, "config.json")
        if kind != "ok":
            raise WeightsError(
                "The engine serves an HF model.",
                where=f"{host.name}:{folder}",
                expected="a folder with config.json, or the name of a model on the hub",
                found="a checkpoint of Megatron" if kind == "checkpoint" else "no config.json there",
                next_command="give --load the HF model; mixtral-run convert --from-megatron CHECKPOINT makes one",
            )
    if spec.config["adapter"] is None:
        return None
    folder = host_path(str(spec.config["adapter"]), spec.options.folders(host))
    kind, text = _look(ssh, host, folder, "adapter_config.json")
    if kind != "ok":
        raise WeightsError(
            "The engine serves an adapter in PEFT's form.",
            where=f"{host.name}:{folder}",
            expected="a folder with adapter_config.json",
            found="a checkpoint that finetune saved" if kind == "checkpoint" else "no adapter_config.json there",
            next_command=f"mixtral-run export --on {host.name} --adapter … --format vllm --output-path FOLDER",
        )
    return read_adapter_config(text, f"{host.name}:{folder}/adapter_config.json")


def _look(ssh: Ssh, host: Host, folder: str, file: str) -> tuple[str, str]:
    answer = ssh.check(host, ["sh", "-c", _LOOK, "look", folder, file, str(_LARGEST_CONFIG)])
    kind, _, text = answer.partition("\n")
    return kind, text


def _pull(ssh: Ssh, host: Host, image: str) -> None:
    if engine(ssh, host, "image", "inspect", image).exit_code == 0:
        return
    _say(f"{host.name} pulls {image}, which takes minutes …")
    answer = engine(ssh, host, "pull", "--quiet", image, timeout_seconds=None)
    if answer.exit_code:
        raise HostError(
            f"{host.name} cannot pull the engine's image.",
            where=image,
            found=last_line(answer.errors),
            next_command="--engine-image NAME, an image that the host has or can pull",
        )


def _port_error(host: Host, config: ServeConfig, error: HostError) -> HostError:
    """Return the error in the user's terms if the port is taken; else the error itself."""
    if not re.search("port is already allocated|address already in use", error.found or ""):
        return error
    return HostError(
        f"Port {config.port} of {host.name} is taken.",
        where=f"{config.bind}:{config.port}",
        found=error.found,
        next_command=f"another --port; mixtral-run jobs {host.name}, which lists servers",
    )


def _wait(ssh: Ssh, job: RunningJob, minutes: int) -> None:
    """Wait until the server answers. Raises the error of its container, or HostError after the time."""
    (host,), until = job.hosts, time.monotonic() + 60 * minutes
    _say("waiting until the server answers; it loads the model (Ctrl-C leaves it running) …")
    while time.monotonic() < until:
        if engine(ssh, host, "exec", job.name, "python3", "-c", _HEALTH).exit_code == 0:
            return
        rows, _ = list_jobs([host], ssh)
        row = next((each for each in rows if each.job == job.name), None)
        if row is not None and not row.running:
            tail = engine(ssh, host, "logs", "--tail", "60", job.name)
            lines = (tail.output + tail.errors).splitlines()
            for line in lines[-15:]:
                _say(f"  | {line}")
            raise job_error(job, host, row, lines)
        time.sleep(POLL_SECONDS)
    raise HostError(
        f"The server does not answer after {minutes} minutes.",
        where=f"{job.name} on {host.name}",
        expected="200 at /health",
        next_command=f"mixtral-run logs {job.name}; or a longer --wait-minutes",
    )


def _say_how(config: ServeConfig, job: RunningJob) -> None:
    (host,) = job.hosts
    name = config.adapter_name if config.adapter is not None else config.base_name
    local = config.bind in ("127.0.0.1", "localhost", "::1")
    _say(f"✓ {host.name} serves on port {config.port}{', of the host only' if local else f' of {config.bind}'}")
    if local:
        tunnel = f"{config.port}:127.0.0.1:{config.port}"
        _say(f"  from here: {shlex.join(['ssh', '-N', '-L', tunnel, *destination(host)])}")
    _say(
        f"  curl http://127.0.0.1:{config.port}/v1/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "prompt": "Once", "max_tokens": 16}}\''
    )
    _say(f"  output: mixtral-run logs {job.name}; to stop it: mixtral-run stop {job.name}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def refuse_here() -> ConfigError:
    """Return the error of `serve` without a host."""
    return ConfigError(
        "serve runs an engine on a host, or proves a server.",
        expected="--on HOST, or --prove URL",
        found="neither",
    )
