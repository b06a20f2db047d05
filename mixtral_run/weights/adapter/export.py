"""Export an adapter, or a weighted sum of several: as a PEFT directory, or merged into a full HF model, streamed."""

from __future__ import annotations

import shlex
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.adapter_sum import AdapterSum, open_sum
from mixtral_run.weights.adapter.checkpoint import OpenAdapter
from mixtral_run.weights.adapter.lora_factors import Factors
from mixtral_run.weights.adapter.merge import merge_files
from mixtral_run.weights.adapter.merge_journal import MERGE_JOURNAL, MergeJournal, identity
from mixtral_run.weights.adapter.model_card import published_name, write_card
from mixtral_run.weights.adapter.peft_directory import PeftDirectory
from mixtral_run.weights.adapter.peft_layouts import FUSED_AXIS_ORDER, FUSED_PEFT_VERSION, max_lora_rank
from mixtral_run.weights.adapter.push import Repository
from mixtral_run.weights.hf import fingerprint
from mixtral_run.weights.hf.fingerprint import fingerprint_of_checksums
from mixtral_run.weights.hf.hf_weights import HFWeights, is_hf_directory, open_hf_weights
from mixtral_run.weights.hf.hub import HubModel, hub_name_of, resolve
from mixtral_run.weights.hf.tokenizer_files import copy_tokenizer, tokenizer_files
from mixtral_run.weights.io.atomic_folder import GIB, Staging, disk_problems, next_output, output_problems
from mixtral_run.weights.io.interrupts import interrupts
from mixtral_run.weights.manifest.adapter_files import TOKENIZER
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.manifest import MANIFEST_NAME, BaseManifest, is_kind, read_manifest, write_manifest

_STEPS = 3
_OF_MODELS = ("config.json", "generation_config.json")
"""Files next to a tokenizer that make a folder a model: a PEFT directory is none."""
_SIDECAR_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ExportResult:
    """Result of an export: sizes of the tensors in bytes, and seconds."""

    output_path: Path
    kind: str
    num_tensors: int
    num_bytes: int
    seconds: float


def export(config: ExportConfig, report: Report | None = None) -> ExportResult:
    """Write the directory completely or not at all. Only one process may call.

    Raises ConfigError or WeightsError before anything is written. An adapter of another base is refused at the start,
    by the norms and routers of --hf-model-path, or, if other tensors differ, once all of them were read while merging,
    before the result is put in its place.
    """
    report = report or Report()
    started = time.monotonic()
    report.step(1, _STEPS, f"Read the adapter {' + '.join(config.adapter)}")
    adapters = open_sum(config.adapter, report)
    adapter = adapters.first
    with adapters.factors(report) as factors:
        peft = PeftDirectory(factors, config.format)
        weights = _check(config, adapter, peft, report)
        repository = _repository(config)
        _describe(adapters, factors, report)
        with interrupts(), Staging(config.output_path, MANIFEST_NAME, "mixtral-run export") as staging:
            if config.merge:
                assert weights is not None
                count, size = _merge(adapters, weights, factors, staging, report)
            else:
                staging.clear()
                _write_peft(config, adapters, peft, staging.folder, report)
                count, size = len(peft.entries), peft.num_bytes
            report.step(3, _STEPS, "Wait for the disk")
            _write_record(config, adapters, staging.folder)
            staging.publish(spent=(MERGE_JOURNAL,))
    kind = "hf" if config.merge else "peft"
    result = ExportResult(config.output_path, kind, count, size, time.monotonic() - started)
    report.done("Export complete")
    report.say(f"  {count:,} tensors, {size / 1e6:,.1f} MB in {result.seconds:,.1f} s, in {config.output_path}")
    if repository is not None:
        if not config.merge and published_name(_base_name(config, adapter)) is None:
            report.warn(
                "The adapter's base is a folder of this machine; --hf-model-path OWNER/NAME names it on the hub"
            )
        report.done(f"Uploaded: {repository.push(config.output_path, report)}")
    if config.format == "vllm" and not config.merge:
        report.say(
            f"  next: vllm serve HF_MODEL --enable-lora --max-lora-rank {max_lora_rank(peft.max_rank)} "
            f"--lora-modules {shlex.quote(f'adapter={config.output_path}')}"
        )
    elif config.merge:
        report.say(f"  next: mixtral-run generate --load {shlex.quote(str(config.output_path))} --instruction …")
    else:
        report.say(f"  next: PeftModel.from_pretrained(model, {str(config.output_path)!r})")
    return result


def _repository(config: ExportConfig) -> Repository | None:
    """Return the repository of --push after a check that it can be written; None without one."""
    if config.push is None:
        return None
    return Repository(config.push, config.hf_token_file, public=config.push_public)


def _is_export(folder: Path) -> bool:
    return is_kind(folder, "peft", "hf")


def _check(config: ExportConfig, adapter: OpenAdapter, peft: PeftDirectory, report: Report) -> HFWeights | None:
    """Raise everything that can be found before the first byte is written; return the base's weights, if given."""
    what = "an earlier export of this kit"
    problems = output_problems(config.output_path, overwrite=config.overwrite, is_ours=_is_export, what=what)
    if config.format == "vllm" and adapter.lora.train_also and not config.merge:
        also = ", ".join(adapter.lora.train_also)
        problems.append(
            f"--format vllm: engines read no modules_to_save, and the adapter has {also}; --merge writes a whole model"
        )
    weights = None
    if config.hf_model_path is not None:
        try:
            weights = open_hf_weights(
                resolve(
                    str(config.hf_model_path), report, lambda found: _check_before_download(adapter, found, problems)
                )
            )
        except WeightsError as error:
            error.problems = (*error.problems, *problems)
            raise
    if config.merge and weights is not None:
        needed = sum(file.stat().st_size for file in weights.files)
    else:
        needed = peft.num_bytes
    problems += disk_problems(config.output_path, needed + _SIDECAR_BYTES)
    if config.merge and weights is not None and not weights.as_stored:
        problems.append(
            f"--merge copies safetensors files of one dtype; {'; '.join(weights.notes)}. "
            "Merge by way of a checkpoint: mixtral-run convert --hf-model-path MODEL --output-path BASE, then "
            "mixtral-run convert --from-megatron BASE --adapter ADAPTER --output-path OUTPUT"
        )
    if problems:
        raise ConfigError(
            "The adapter cannot be exported as asked.", problems=problems, next_command=next_output(problems)
        )
    if weights is not None:
        _check_base(adapter, weights)
    return weights


def _check_before_download(adapter: OpenAdapter, model: HubModel, problems: list[str]) -> None:
    if problems:
        raise ConfigError(
            "The adapter cannot be exported as asked.", problems=problems, next_command=next_output(problems)
        )
    _check_architecture(adapter, model.architecture, model.name)


def _check_architecture(adapter: OpenAdapter, architecture: MixtralArchitecture, where: str) -> None:
    ours = adapter.checkpoint.architecture
    differing = ours.differing(architecture)
    if differing:
        expected, found = (
            ", ".join(f"{name} {getattr(each, name)}" for name in differing) for each in (ours, architecture)
        )
        raise _another_base(adapter, where, expected, found)


def _check_base(adapter: OpenAdapter, weights: HFWeights) -> None:
    where = str(weights.directory)
    _check_architecture(adapter, weights.architecture, where)
    found = fingerprint.quick_fingerprint(weights)
    if found != adapter.base_fingerprint.split("-")[0]:
        raise _another_base(adapter, where, f"fingerprint {adapter.base_fingerprint}", f"fingerprint {found}-…")


def _another_base(adapter: OpenAdapter, where: str, expected: str, found: str) -> WeightsError:
    path = adapter.manifest.base.path
    return WeightsError(
        "The adapter was trained on another base.",
        where=where,
        expected=f"{expected} (converted at {path})",
        found=found,
        next_command="give --hf-model-path the model that was converted for the training",
    )


def _describe(adapters: AdapterSum, factors: Factors, report: Report) -> None:
    places = f"{', '.join(factors.target_modules)}: {len(factors.places):,} HF tensors"
    if factors.trained_also:
        places += f", and {len(factors.trained_also)} weights of the base"
    if not adapters.is_plain:
        ranks = sorted({factors.rank(module) for module in factors.target_modules})
        report.say(f"  their sum: rank {' and '.join(map(str, ranks))}, {places}")
        return
    lora = adapters.first.lora
    if lora.shared:
        report.say("  the experts of a layer share one adapter, which is written once for each expert")
    iteration = adapters.first.checkpoint.iteration
    report.say(f"  iteration {iteration}, {lora.describe()}, {places}")


def _write_peft(config: ExportConfig, adapters: AdapterSum, peft: PeftDirectory, folder: Path, report: Report) -> None:
    report.step(2, _STEPS, f"Write adapter_model.safetensors in the layout {config.format}")
    added = [module for module in peft.target_modules if module not in peft.factors.target_modules]
    if added:
        why = (
            "vLLM wants w1, w2 and w3 of every expert"
            if config.format == "vllm"
            else "without it PEFT leaves out linear_fc1"
        )
        report.say(f"  {', '.join(added)} was not trained and is written as zeros: {why}")
    base_name = _base_name(config, adapters.first)
    with report.progress(peft.num_bytes, "written") as progress:
        peft.write(folder, base_name, progress.advance)
    _copy_tokenizer(adapters.first, folder)
    write_card(folder, adapters, peft, config.format, base_name)


def _copy_tokenizer(adapter: OpenAdapter, folder: Path) -> None:
    """Copy the tokenizer that is next to the adapter, and its chat template: the one that it was trained with."""
    source = adapter.checkpoint.folder / TOKENIZER
    for name in tokenizer_files(source):
        if name not in _OF_MODELS:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    if adapter.manifest.chat_template is not None:
        adapter.manifest.chat_template.write(folder)


def _base_name(config: ExportConfig, adapter: OpenAdapter) -> str | None:
    """Return the HF model for PEFT's config: as given, or as recorded by the base checkpoint, if that still exists."""
    name = config.hf_model_path or _source_of(adapter.manifest.base.path)
    if name is None:
        return None
    # PEFT would take a relative path for a name on the hub.
    return str(name.resolve() if name.is_dir() else name)


def _source_of(path: str | None) -> Path | None:
    """Return the HF model of the base that an adapter was trained on: the base itself, or its source."""
    if path is None:
        return None
    base = Path(path)
    if is_hf_directory(base) and not (base / LATEST).exists():
        name = hub_name_of(base)
        return base if name is None else Path(name)
    try:
        source = read_manifest(base, BaseManifest).source
    except WeightsError:
        return None
    return None if source is None else Path(source)


def _merge(
    adapters: AdapterSum, weights: HFWeights, factors: Factors, staging: Staging, report: Report
) -> tuple[int, int]:
    folder, adapter = staging.folder, adapters.first
    folders = [(each.weight, each.adapter.checkpoint.iteration_folder) for each in adapters.summands]
    journal = MergeJournal(folder, identity(weights, folders))
    if journal.is_new:
        staging.clear()
    else:
        report.say("  continuing after the files that an earlier run finished")
    journal.start()
    report.step(2, _STEPS, f"Merge into {len(weights.files)} files ({weights.num_bytes / GIB:,.2f} GiB)")
    try:
        with report.progress(weights.num_bytes, "merged") as progress:
            crcs = merge_files(weights, factors, folder, journal, progress.advance)
    except BaseException:
        staging.keep = journal.has_files
        if staging.keep:
            with suppress(BrokenPipeError):
                report.warn(f"Finished files stay in {folder}: the same command continues from there")
        raise
    found = fingerprint_of_checksums(weights.architecture, weights.dtype, crcs)
    if found != adapter.base_fingerprint:
        expected = f"fingerprint {adapter.base_fingerprint}"
        raise _another_base(adapter, str(weights.directory), expected, f"fingerprint {found}")
    copy_tokenizer(weights.directory, folder)
    if adapter.manifest.chat_template is not None:
        adapter.manifest.chat_template.write(folder)
    return len(weights.sources), weights.num_bytes


def _write_record(config: ExportConfig, adapters: AdapterSum, folder: Path) -> None:
    values: dict[str, Any] = {
        **adapters.record(),
        "layout": None if config.merge else config.format,
        "base": adapters.first.manifest.values["base"],
    }
    if config.format == "peft-fused" and not config.merge:
        values["peft"] = {"version": f">={FUSED_PEFT_VERSION}", "axis_order": FUSED_AXIS_ORDER}
    template = adapters.first.manifest.chat_template
    if template is not None and not config.merge:
        # The form of Mixtral-Instruct is in no file, and the tokenizer may have another template.
        values["chat_template"] = template.to_mapping()
    write_manifest(folder, "hf" if config.merge else "peft", **values)
