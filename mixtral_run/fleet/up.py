"""From a bare host to an adapter here: bootstrap, convert, finetune, export, fetch; what is done is skipped."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config import ConvertConfig, ExportConfig, FinetuneConfig, UpConfig
from mixtral_run.errors import HostError
from mixtral_run.fleet.bootstrap import BootstrapRequest, bootstrap
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.job_log import JobFollower
from mixtral_run.fleet.job_spec import CHECKPOINTS, JobOptions, host_path
from mixtral_run.fleet.jobs import fetch, start
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh import Ssh
from mixtral_run.report import Report

STEPS = 5
MARKER = "latest_checkpointed_iteration.txt"
EXPORTED = "adapter_config.json"


@dataclass(frozen=True)
class Done:
    """What a host holds already."""

    converted: bool
    trained_iteration: int
    exported: bool


def up(config: UpConfig, request: BootstrapRequest, options: JobOptions, report: Report | None = None) -> Path:
    """Do every step that is not done yet; returns where the exported adapter lies here.

    Raises the first step's error; a second call goes on from there.
    """
    report = report or Report()
    options.check()
    target = config.output_path
    report.step(1, STEPS, "Bootstrap")
    end = bootstrap(request)
    report.say(end.text)
    end.raise_if_bad()
    (host,) = hosts_of(options.on, options.inventory, None)
    ssh = Ssh()
    done = _what_is_done(ssh, host, config, options)
    exported = _export_folder(config)

    if done.converted:
        report.step(2, STEPS, f"Convert: {config.load} is there")
    else:
        report.step(2, STEPS, f"Convert {config.hf_model_path} → {config.load}")
        _run("convert", _convert_config(config), options)
    if done.trained_iteration >= config.train_iters:
        report.step(3, STEPS, f"Finetune: {config.save} is at iteration {done.trained_iteration}")
    else:
        report.step(3, STEPS, f"Finetune → {config.save}")
        _run("finetune", _finetune_config(config, done), options)
    if done.exported and done.trained_iteration >= config.train_iters:
        report.step(4, STEPS, f"Export: {exported} is there")
    else:
        report.step(4, STEPS, f"Export → {exported}")
        export = ExportConfig(adapter=config.save, output_path=exported, overwrite=done.exported)
        _run("export", export, options)
    report.step(5, STEPS, f"Fetch → {target}")
    place = fetch(host, host_path(_inside(exported), options), target, ssh, overwrite=_is_ours(target))
    report.done(f"The adapter is {place}")
    return place


def _is_ours(target: Path) -> bool:
    """Whether an earlier fetch left something there: only that is replaced."""
    return (target / EXPORTED).is_file()


def _what_is_done(ssh: Ssh, host: Host, config: UpConfig, options: JobOptions) -> Done:
    script = (
        'if [ -s "$1" ]; then echo converted=1; else echo converted=0; fi; '
        'echo "iteration=$(cat "$2" 2>/dev/null)"; if [ -s "$3" ]; then echo exported=1; else echo exported=0; fi'
    )
    files = (config.load / MARKER, config.save / MARKER, _export_folder(config) / EXPORTED)
    words = [host_path(_inside(file), options) for file in files]
    lines = ssh.check(host, ["sh", "-c", script, "look", *words]).splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    try:
        iteration = int(found["iteration"] or 0)
        return Done(found["converted"] == "1", iteration, found["exported"] == "1")
    except (KeyError, ValueError) as error:
        raise HostError(f"{host.name} does not tell what is done there.", found=str(lines)[:200]) from error


def _inside(path: Path) -> str:
    return str(path) if path.is_absolute() else f"{CHECKPOINTS}/{path}"


def _export_folder(config: UpConfig) -> Path:
    return config.save.with_name(config.save.name + "-peft")


def _convert_config(config: UpConfig) -> ConvertConfig:
    return ConvertConfig(
        hf_model_path=config.hf_model_path,
        output_path=config.load,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
    ).check()


def _finetune_config(config: UpConfig, done: Done) -> FinetuneConfig:
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(FinetuneConfig)}
    # A run that was stopped goes on from its newest checkpoint.
    values["resume"] = config.resume or done.trained_iteration > 0
    return FinetuneConfig(**values).check()


def _run(verb: str, config: ConvertConfig | FinetuneConfig | ExportConfig, options: JobOptions) -> None:
    job = start(verb, config, options)
    JobFollower(job, say=lambda text: print(text, file=sys.stderr, flush=True)).follow()
