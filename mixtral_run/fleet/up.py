"""`mixtral-run up`: bootstrap, convert, finetune, export and fetch. Steps that are already done are skipped."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_run.config.data_sources import combined_sha256, content_sha256
from mixtral_run.config.fields import flag_of
from mixtral_run.config.launch import CONVERTED_LAYOUT
from mixtral_run.config.lora import LORA_SHAPE
from mixtral_run.config.verbs.training import FinetuneConfig, UpConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.bootstrap.bootstrap import BootstrapRequest, bootstrap
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.container_paths import CHECKPOINTS
from mixtral_run.fleet.jobs.fetch import fetch
from mixtral_run.fleet.jobs.interactive import only_host
from mixtral_run.fleet.jobs.job_log import JobFollower
from mixtral_run.fleet.jobs.job_spec import JobOptions, host_path
from mixtral_run.fleet.jobs.jobs import RunningJob, list_jobs
from mixtral_run.fleet.jobs.queue import start_when_free
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.untrusted import parse_json
from mixtral_run.terminal.report import Report

STEPS = 5
MARKER = "latest_checkpointed_iteration.txt"
EXPORTED = "adapter_config.json"
RECORD = "mixtral_run.json"
SETTINGS_OF_A_RUN = (
    "mock_data", "pack", "seq_length", "global_batch_size", "seed", "lr", "min_lr", "lora_alpha", "lora_alpha_experts",
    "lora_scaling", "lora_plus_ratio", *LORA_SHAPE, "base_precision", "attention_precision",
)  # fmt: skip
"""Settings, apart from the data, that define an adapter."""


@dataclass(frozen=True)
class Done:
    """Steps that are already done on a host."""

    converted: bool
    trained_iteration: int
    exported: bool
    adapter: Mapping[str, Any]
    """Record of the adapter; empty if there is none. The other records are alike."""
    base: Mapping[str, Any] = field(default_factory=dict)
    export: Mapping[str, Any] = field(default_factory=dict)

    @property
    def export_is_old(self) -> bool:
        """True if training continued after the export."""
        return bool(self.export.get("iteration", self.trained_iteration) != self.trained_iteration)


def up(config: UpConfig, request: BootstrapRequest, options: JobOptions, report: Report | None = None) -> Path:
    """Run every step that is not done yet and return the local path of the exported adapter.

    Raises the error of the first step that fails. A second call continues from there.
    """
    report = report or Report()
    options.check()
    target = config.output_path
    _check_target(target)
    report.step(1, STEPS, "Bootstrap")
    end = bootstrap(request)
    report.say(end.text)
    end.raise_if_bad()
    host = only_host("up", options)
    ssh = Ssh()
    done = _what_is_done(ssh, host, config, options)
    _check_same_base(host, config, done)
    _check_same_training(host, config, done)
    exported = _export_folder(config)

    if done.converted:
        report.step(2, STEPS, f"Convert: {config.load} exists{_origin(done)}")
    else:
        report.step(2, STEPS, f"Convert {config.hf_model_path} → {config.load}")
        if _run(host, "convert", _convert_config(config), options):
            _check_same_base(host, config, _what_is_done(ssh, host, config, options))
    if _is_trained(config, done):
        report.step(3, STEPS, f"Finetune: {config.save} is at iteration {done.trained_iteration}")
    else:
        report.step(3, STEPS, f"Finetune → {config.save}")
        _finetune(host, config, done, options)
    if done.exported and _is_trained(config, done) and not done.export_is_old:
        report.step(4, STEPS, f"Export: {exported} exists")
    else:
        report.step(4, STEPS, f"Export → {exported}")
        export = ExportConfig(adapter=(str(config.save),), output_path=exported, overwrite=done.exported)
        _run(host, "export", export, options)
    report.step(5, STEPS, f"Fetch → {target}")
    path = host_path(_inside(exported), options.folders(host))
    place = fetch(host, path, target, ssh, overwrite=_is_ours(target), say=report.say)
    report.done(f"The adapter is {place}")
    return place


def _check_target(target: Path) -> None:
    """Raise ConfigError, before hours of training, if the adapter could not be written to `target` afterwards."""
    if target.exists() and not _is_ours(target):
        raise ConfigError(
            "The adapter cannot be written here.",
            where=str(target),
            expected="a new folder, or one with an adapter that an earlier call wrote",
            found="something else",
            next_command="--output-path ANOTHER",
        )


def _is_ours(target: Path) -> bool:
    """Return True if `target` holds an exported adapter. Only that is replaced."""
    return (target / EXPORTED).is_file()


def _what_is_done(ssh: Ssh, host: Host, config: UpConfig, options: JobOptions) -> Done:
    script = (
        'tell() { printf "%s=" "$1"; { tr -d "\\n" <"$2"; } 2>/dev/null; echo; }; '
        f'if [ -s "$1/{MARKER}" ]; then echo converted=1; else echo converted=0; fi; '
        f'iteration=$(cat "$2/{MARKER}" 2>/dev/null); echo "iteration=$iteration"; '
        f'if [ -s "$3/{EXPORTED}" ]; then echo exported=1; else echo exported=0; fi; '
        f'tell base "$1/{RECORD}"; tell export "$3/{RECORD}"; '
        f'[ -z "$iteration" ] || tell adapter "$2/iter_$(printf %07d "$iteration")/{RECORD}"'
    )
    folders = options.folders(host)
    words = [host_path(_inside(folder), folders) for folder in (config.load, config.save, _export_folder(config))]
    lines = ssh.check(host, ["sh", "-c", script, "look", *words]).splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    try:
        iteration = int(found["iteration"] or 0)
        records = {name: _record(found.get(name) or "{}") for name in ("adapter", "base", "export")}
        return Done(found["converted"] == "1", iteration, found["exported"] == "1", **records)
    except (KeyError, ValueError) as error:
        raise HostError(
            f"{host.name} does not report in the expected form what is done there.", found=str(lines)[:200]
        ) from error


def _record(text: str) -> dict[str, Any]:
    """Return the record of a checkpoint on a host. Raises ValueError if it is not in the form that the kit writes."""
    record = parse_json(text)
    for each in (record, record.get("base", {})) if isinstance(record, dict) else (None,):
        if (
            not isinstance(each, dict)
            or not all(isinstance(each.get(key, {}), dict) for key in ("training", "base"))
            or not all(isinstance(each.get(key) or "", str) for key in ("fingerprint", "data_sha256", "source"))
            or not isinstance(each.get("iteration", 0), int)
        ):
            raise ValueError("a record in another form")
    found: dict[str, Any] = record
    return found


def _origin(done: Done) -> str:
    return f", converted from {done.base['source']}" if done.base.get("source") else ""


def _check_same_base(host: Host, config: UpConfig, done: Done) -> None:
    """Raise ConfigError if the checkpoint on the host was converted from another model than the one that is named."""
    source = done.base.get("source", config.hf_model_path)
    if config.hf_model_path not in (source, UpConfig.hf_model_path):
        raise ConfigError(
            "The checkpoint on the host was converted from another model than the requested one.",
            where=f"{host.name}: {_inside(config.load)}",
            expected=f"--hf-model-path {source}",
            found=config.hf_model_path,
            next_command="--load NEW --save NEW --output-path NEW for a second checkpoint; or the same model",
        )


def _check_same_training(host: Host, config: FinetuneConfig, done: Done) -> None:
    """Raise ConfigError if the adapter on the host was trained with other data or settings than the requested ones."""
    recorded, asked = done.adapter.get("training", {}), config.to_mapping()
    # A setting that the record lacks had its default: an earlier version of the kit did not know it, or a job's
    # settings were sent without it.
    began = {**FinetuneConfig.defaults(), **FinetuneConfig.with_current_names(recorded)} if recorded else asked
    problems = [
        f"{flag_of(name)}: the adapter was trained with {began[name]}; found {asked[name]}"
        for name in SETTINGS_OF_A_RUN
        if began[name] != asked[name]
    ]
    known = done.adapter.get("data_sha256")
    # A file that does not exist here is a file of the host and is not compared.
    found = content_sha256(config.data_path)
    if known and found not in (None, known):
        problems.append(f"--data-path: the adapter was trained on another file than {', '.join(config.data_path)}")
    below, base = done.adapter.get("base", {}).get("fingerprint"), done.base.get("fingerprint")
    if below and base and any(one != other for one, other in zip(below.split("-"), base.split("-"), strict=False)):
        problems.append(f"--load: the adapter was trained on another base than {config.load}")
    if problems:
        raise ConfigError(
            "The adapter on the host differs from the requested one.",
            where=f"{host.name}: {_inside(config.save)}, iteration {done.trained_iteration}",
            problems=problems,
            next_command="--save NEW --output-path NEW for a second adapter; or the same settings",
        )


def _inside(path: Path) -> str:
    return str(path) if path.is_absolute() else f"{CHECKPOINTS}/{path}"


def _is_trained(config: FinetuneConfig, done: Done) -> bool:
    """Return True if the adapter on the host has all its iterations, or its run stopped early."""
    record: Mapping[str, Any] = done.adapter
    best = record.get("validation")
    if isinstance(best, dict) and config.early_stopping_patience:
        without = best.get("num_without_improvement", 0)
        if isinstance(without, int) and without >= config.early_stopping_patience:
            return True
    if config.epochs is None:
        return done.trained_iteration >= config.iterations
    # Only the host knows the data, and with them the iterations that the epochs are.
    trained = record.get("training", {})
    iterations = trained.get("train_iters")
    return (
        trained.get("epochs") == config.epochs
        and isinstance(iterations, int)
        and (done.trained_iteration >= iterations)
    )


def _export_folder(config: UpConfig) -> Path:
    return config.save.with_name(config.save.name + "-peft")


def _convert_config(config: UpConfig) -> ConvertConfig:
    return ConvertConfig(
        hf_model_path=config.hf_model_path,
        output_path=config.load,
        tensor_model_parallel_size=config.tensor_model_parallel_size or CONVERTED_LAYOUT[0],
        expert_model_parallel_size=config.expert_model_parallel_size or CONVERTED_LAYOUT[1],
    ).check()


def _finetune_config(config: UpConfig, done: Done) -> FinetuneConfig:
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(FinetuneConfig)}
    # A stopped run continues from its newest checkpoint.
    # Also after a host was set up anew, if its checkpoints are on a disk that stayed.
    values["resume"] = config.resume or ("auto" if done.trained_iteration > 0 else None)
    return FinetuneConfig(**values).check()


def _finetune(host: Host, config: UpConfig, done: Done, options: JobOptions) -> None:
    followed = _run(host, "finetune", _finetune_config(config, done), options)
    if followed:
        now = _what_is_done(Ssh(), host, config, options)
        if not _is_trained(config, now):
            # The followed job was started with fewer iterations.
            _run(host, "finetune", _finetune_config(config, now), options)


def _run(host: Host, verb: str, config: ConvertConfig | FinetuneConfig | ExportConfig, options: JobOptions) -> bool:
    """Run a step to its end, or follow the job of an earlier call that still runs. Return True if one was followed."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    output = config.save if isinstance(config, FinetuneConfig) else config.output_path
    writes = host_path(_inside(output), options.folders(host))
    running = [row for row in list_jobs([host])[0] if row.running and (row.verb, row.output) == (verb, writes)]
    if running:
        if isinstance(config, FinetuneConfig):
            _check_same_training(host, config, Done(True, 0, False, _settings_of(Ssh(), host, running[0].job)))
        say(f"{running[0].job} already writes {output}: following it")
        job = RunningJob(running[0].job, verb, (host,))
    else:
        job = start_when_free(verb, config, options, say)
    JobFollower(job, say=say).follow()
    return bool(running)


def _settings_of(ssh: Ssh, host: Host, job: str) -> Mapping[str, Any]:
    """Return the settings of a job in the form of an adapter's record; empty for the job of another user."""
    script = (
        'cd "$HOME/.local/state/mixtral-run/jobs/$1" 2>/dev/null && tr -d "\\n" <config.json && echo && '
        "sha256sum data_path* 2>/dev/null"
    )
    settings, _, sums = ssh.run(host, ["sh", "-c", script, "look", job]).output.partition("\n")
    try:
        training = parse_json(settings)
    except ValueError:
        return {}
    return {"training": training, "data_sha256": combined_sha256([line.split()[0] for line in sums.splitlines()])}
