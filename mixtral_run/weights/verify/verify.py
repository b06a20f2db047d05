"""Describe a checkpoint, and compare it with the HF weights bit by bit, in blocks: no GPU, little memory."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from mixtral_run.config.verbs.weights import VerifyConfig
from mixtral_run.errors import CheckFailed, ConfigError, WeightsError, shortened
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.checkpoint import parts_of_vocabulary
from mixtral_run.weights.adapter.schema import adapter_tensors, is_of_optimizer
from mixtral_run.weights.hf import fingerprint as checksums
from mixtral_run.weights.hf.fingerprint import fingerprint_of_checksums
from mixtral_run.weights.hf.hf_weights import HFWeights, is_hf_directory, open_hf_weights
from mixtral_run.weights.hf.hub import BeforeDownload, HubModel, is_on_hub, resolve
from mixtral_run.weights.io.atomic_folder import GIB
from mixtral_run.weights.manifest.adapter_files import check_adapter
from mixtral_run.weights.manifest.checkpoint_folder import (
    LATEST,
    Checkpoint,
    files_manifest_of,
    iteration_folder_of,
    newest_iteration,
    open_checkpoint,
)
from mixtral_run.weights.manifest.fields import Fields
from mixtral_run.weights.manifest.folder_kind import ADAPTER, BASE, HF_MODEL, refuse_other_kinds
from mixtral_run.weights.manifest.manifest import (
    MANIFEST_NAME,
    AdapterManifest,
    BaseManifest,
    TrainedManifest,
    is_kind,
)
from mixtral_run.weights.manifest.proof import PROOF_NAME, check_files, check_proof
from mixtral_run.weights.mapping import hf_to_megatron
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader, TensorInfo
from mixtral_run.weights.verify.compare_tensors import Comparing, Difference
from mixtral_run.weights.verify.quantized_cache import verify_quantized_caches
from mixtral_run.weights.verify.result import Comparison, VerifyResult

_MOST_DIFFERENCES = 20


def verify(config: VerifyConfig, report: Report | None = None) -> VerifyResult:
    """Describe the checkpoint and compare it with --against; the caller decides on the result's `problems`.

    Raises WeightsError if the checkpoint or the HF model cannot be read at all.
    """
    report = report or (Report.on_stderr() if config.json else Report())
    if is_on_hub(config.load):
        config = dataclasses.replace(config, load=resolve(str(config.load), report))
    refuse_other_kinds("--load", config.load, BASE, ADAPTER, HF_MODEL)
    if config.against is not None:
        refuse_other_kinds("--against", config.against, HF_MODEL)
    if is_hf_directory(config.load) and not (config.load / LATEST).exists():
        return _verify_hf(config, report)
    if config.proof and not _is_trained(config.load):
        _check_files(config.load)
    checkpoint = open_checkpoint(config.load)
    has_sums = isinstance(checkpoint.manifest, TrainedManifest | AdapterManifest)
    if has_sums and config.proof and not files_manifest_of(checkpoint).files:
        raise ConfigError(
            "The adapter has no checksums.",
            where=str(config.load),
            expected="an adapter that a newer version of the kit saved",
            next_command="the same command without --proof, which reads every tensor",
        )
    if checkpoint.kind == "adapter" or (has_sums and config.proof):
        _check_adapter(checkpoint, report)
    with Reader(checkpoint.iteration_folder) as reader:
        result = _describe(checkpoint, reader)
        _print_table(result, report)
        if config.proof and has_sums:
            report.done("Every file is what was written, by the checksums in the manifest.")
        elif config.proof and not result.problems:
            result = dataclasses.replace(result, problems=_check_proof(checkpoint, reader, report))
        manifest = checkpoint.manifest
        if isinstance(manifest, BaseManifest) and config.load == checkpoint.folder and not result.problems:
            result = _with_caches(result, config, manifest.fingerprint, report, proof=config.proof)
        if config.against is not None and not result.problems:
            check = _before_download(config.load, checkpoint.architecture)
            weights = open_hf_weights(resolve(str(config.against), report, check))
            for note in weights.notes:
                report.warn(note)
            if isinstance(manifest, BaseManifest):
                comparison, problems = _compare_base(manifest, reader, weights, report)
            else:
                comparison, problems = _compare_adapter(manifest, weights, report)
            result = dataclasses.replace(result, comparison=comparison, problems=(*result.problems, *problems))
            if not problems:
                _report_equal(checkpoint, comparison, report)
    if not result.problems and (config.proof or result.comparison is not None or checkpoint.kind == "adapter"):
        report.done("Verified.")
    elif not result.problems:
        report.done("Described: every tensor is there in its shape. Its values were compared with nothing.")
        report.say(f"  next: mixtral-run verify --load {shlex.quote(str(config.load))} --against HF_MODEL, or --proof")
    return result


def _is_trained(load: Path) -> bool:
    """Return True if training saved the checkpoint: its manifest has the checksums, in place of a proof."""
    manifest = iteration_folder_of(load) / MANIFEST_NAME
    return manifest.is_file() and is_kind(manifest.parent, *BaseManifest.KINDS, *AdapterManifest.KINDS)


def _check_files(load: Path) -> None:
    """Raise CheckFailed naming each small file that differs from what was written, before any of them is read."""
    folder = load.parent if (load / ".metadata").is_file() else load
    newest_iteration(folder)
    problems = check_files(folder)
    if problems:
        raise CheckFailed(
            "The checkpoint's files are not what was written.",
            where=str(folder),
            problems=shortened(problems),
            next_command="copy them again from where the checkpoint was made, or mixtral-run convert --overwrite",
        )


def _check_adapter(checkpoint: Checkpoint, report: Report) -> None:
    """Raise CheckFailed naming each file of an iteration that differs from what was written, before it is read."""
    try:
        check_adapter(checkpoint, report)
    except WeightsError as error:
        raise CheckFailed(
            error.what, where=error.where, problems=error.problems, next_command=error.next_command
        ) from error


def _verify_hf(config: VerifyConfig, report: Report) -> VerifyResult:
    """Verify an HF directory, which is a base as well: compute its fingerprint, and compare it with --against."""
    weights = open_hf_weights(config.load)
    for note in weights.notes:
        report.warn(note)
    if config.proof:
        raise ConfigError(
            "An HF directory has no proof.json.",
            where=str(config.load),
            expected="a checkpoint that mixtral-run convert wrote, or --against another HF directory",
        )
    with report.progress(weights.num_bytes, "read") as progress:
        fingerprint = checksums.fingerprint(weights, progress.advance)
    result = VerifyResult(
        path=str(config.load),
        kind="hf",
        iteration=0,
        dtype=weights.dtype,
        layout="–",
        num_parameters=weights.architecture.num_parameters,
        num_bytes=weights.num_bytes,
        num_tensors=len(weights.sources),
        num_chunks=len(weights.sources),
        num_files=len(weights.files),
        record={"kind": "hf", "architecture": weights.architecture.to_mapping(), "fingerprint": fingerprint},
        comparison=None,
        problems=(),
    )
    _print_table(result, report)
    # Every byte of the model was read; the caches are read completely as well.
    result = _with_caches(result, config, fingerprint, report, proof=True)
    if config.against is not None and not result.problems:
        started = time.monotonic()
        check = _before_download(config.load, weights.architecture)
        other = open_hf_weights(resolve(str(config.against), report, check))
        with report.progress(other.num_bytes, "read") as progress:
            theirs = checksums.fingerprint(other, progress.advance)
        seconds = time.monotonic() - started
        comparison = Comparison(str(other.directory), len(other.sources), other.num_bytes, seconds, theirs, ())
        problems = [] if theirs == fingerprint else [f"fingerprint: {fingerprint}; {other.directory} has {theirs}"]
        result = dataclasses.replace(result, comparison=comparison, problems=tuple(problems))
        if not problems:
            report.done(f"{other.directory}: the same weights, bit by bit ({len(other.sources):,} tensors)")
    if result.comparison is not None and not result.problems:
        report.done("Verified.")
    elif not result.problems:
        report.done("Read completely: every tensor is there in its shape. Their values were compared with nothing.")
        report.say(f"  next: mixtral-run verify --load {shlex.quote(str(config.load))} --against HF_MODEL")
    return result


def _with_caches(
    result: VerifyResult, config: VerifyConfig, fingerprint: str, report: Report, *, proof: bool
) -> VerifyResult:
    caches, problems = verify_quantized_caches(config.load, report, proof=proof, fingerprint=fingerprint)
    return dataclasses.replace(result, kept=caches, problems=(*result.problems, *problems))


def _check_proof(checkpoint: Checkpoint, reader: Reader, report: Report) -> tuple[str, ...]:
    started = time.monotonic()
    with report.progress(reader.num_bytes, "read") as progress:
        problems = check_proof(checkpoint.folder, reader, progress.advance)
    if not problems:
        seconds = time.monotonic() - started
        report.done(
            f"{PROOF_NAME}: every byte is what was written ({reader.num_bytes / 1e6:,.0f} MB in {seconds:,.1f} s)"
        )
    return tuple(problems)


def compare_with_source(load: Path, against: Path, report: Report) -> int:
    """Compare every tensor of a base checkpoint with its HF model, bit by bit; return the number of tensors.

    Raises CheckFailed naming those that differ, WeightsError if either cannot be read.
    """
    result = verify(VerifyConfig(load=load, against=against), report).check()
    assert result.comparison is not None
    return result.comparison.num_tensors


def _expected_tensors(checkpoint: Checkpoint, reader: Reader) -> dict[str, hf_to_megatron.Shape]:
    manifest = checkpoint.manifest
    if isinstance(manifest, BaseManifest):
        return hf_to_megatron.megatron_tensors(manifest.architecture, parts_of_vocabulary(reader))
    return adapter_tensors(manifest.architecture, manifest.lora, parts_of_vocabulary(reader))


def _num_parameters(checkpoint: Checkpoint, found: Mapping[str, TensorInfo]) -> int:
    """Return the number of parameters without padding of the vocabulary."""
    most = checkpoint.architecture.vocab_size
    return sum(
        prod((min(info.shape[0], most), *info.shape[1:]) if key in hf_to_megatron.VOCABULARY_KEYS else info.shape)
        for key, info in found.items()
    )


def _describe(checkpoint: Checkpoint, reader: Reader) -> VerifyResult:
    expected = _expected_tensors(checkpoint, reader)
    found = {key: info for key, info in reader.tensors.items() if not is_of_optimizer(key)}
    problems = [f"{key}: missing" for key in expected if key not in found]
    problems += [f"{key}: not part of such a checkpoint" for key in found if key not in expected]
    for key, info in found.items():
        if key in expected and info.shape != expected[key]:
            problems.append(f"{key}: expected shape {list(expected[key])}; found {list(info.shape)}")
    dtypes = sorted({info.dtype for info in found.values()})
    manifest = checkpoint.manifest
    if isinstance(manifest, BaseManifest) and dtypes != [manifest.dtype]:
        problems.append(f"dtype: expected {manifest.dtype}; found {', '.join(dtypes)}")
    return VerifyResult(
        path=str(checkpoint.folder),
        kind=checkpoint.kind,
        iteration=checkpoint.iteration,
        dtype=", ".join(dtypes),
        layout=_layout(reader, found),
        num_parameters=_num_parameters(checkpoint, found),
        num_bytes=sum(info.num_bytes for info in found.values()),
        num_tensors=len(found),
        num_chunks=sum(len(reader.chunks(key)) for key in found),
        num_files=len(reader.files),
        record=dict(manifest.values),
        comparison=None,
        problems=tuple(problems),
    )


def _layout(reader: Reader, found: dict[str, Any]) -> str:
    """Return the TP/EP layout in which the chunks were written, as far as they show it."""
    if hf_to_megatron.LINEAR_QKV_KEY not in found:
        return "–"
    tp = reader.layout_of(hf_to_megatron.LINEAR_QKV_KEY, 1)
    files: dict[str, set[int]] = {}
    for item in reader.chunks(hf_to_megatron.LINEAR_FC1_KEY) if hf_to_megatron.LINEAR_FC1_KEY in found else ():
        # __RANK_NUMBER.distcp
        files.setdefault(item.file.split("_")[2], set()).add((item.offset or (0, 0))[1])
    return f"TP{tp}/EP{max(len(files), 1)}"


def _print_table(result: VerifyResult, report: Report) -> None:
    rows = [
        ("kind", result.kind),
        ("iteration", str(result.iteration)),
        ("layout", result.layout),
        ("parameters", f"{result.num_parameters:,}"),
        ("dtype", result.dtype),
        ("bytes", f"{result.num_bytes:,} ({result.num_bytes / GIB:,.2f} GiB)"),
        ("tensors", f"{result.num_tensors} in {result.num_chunks:,} chunks in {result.num_files} files"),
    ]
    values = result.record
    rows += [(name, str(values[name])) for name in ("source", "fingerprint") if name in values]
    if "lora" in values:
        lora = Fields(values, []).lora()
        rows.append(("LoRA", lora.describe()))
        rows.append(("targets", ", ".join(lora.target_modules)))
    if "base" in values:
        rows += [(f"base {name}", str(value)) for name, value in values["base"].items()]
    report.table(("", result.path), rows)


def _report_equal(checkpoint: Checkpoint, comparison: Comparison, report: Report) -> None:
    what = "every tensor is equal, bit by bit" if checkpoint.kind == "base" else "this is the adapter's base"
    report.done(
        f"{comparison.directory}: {what} ({comparison.num_tensors:,} tensors, {comparison.num_bytes / 1e6:,.0f} MB in "
        f"{comparison.seconds:,.1f} s)"
    )


def _before_download(load: Path, architecture: MixtralArchitecture) -> BeforeDownload:
    """Return a check that refuses a model of other sizes once its config.json is downloaded."""

    def check(model: HubModel) -> None:
        problems = _architecture_problems(architecture, model.architecture)
        if problems:
            raise CheckFailed(f"{model.name} is another model.", where=str(load), problems=problems)

    return check


def _architecture_problems(ours: MixtralArchitecture, theirs: MixtralArchitecture) -> list[str]:
    return [
        f"{name}: the checkpoint has {getattr(ours, name)}, the HF model {getattr(theirs, name)}"
        for name in ours.differing(theirs)
    ]


def _compare_base(
    manifest: BaseManifest, reader: Reader, weights: HFWeights, report: Report
) -> tuple[Comparison, list[str]]:
    started = time.monotonic()
    problems = _architecture_problems(manifest.architecture, weights.architecture)
    if problems:
        return Comparison(str(weights.directory), 0, 0, 0.0, "", ()), problems
    if reader.tensors[hf_to_megatron.LINEAR_QKV_KEY].dtype != weights.dtype:
        found = reader.tensors[hf_to_megatron.LINEAR_QKV_KEY].dtype
        return Comparison(str(weights.directory), 0, 0, 0.0, "", ()), [
            f"dtype: the checkpoint has {found}, the HF model {weights.dtype}"
        ]
    differences: list[Difference] = []
    crcs: dict[str, int] = {}
    with report.progress(weights.num_bytes, "compared") as progress, ThreadPoolExecutor(2, "compare") as pool:
        comparing = Comparing(reader, weights, progress.advance)
        for found_crcs, different in pool.map(comparing.unit, hf_to_megatron.units(weights.architecture)):
            crcs |= found_crcs
            differences += different
    fingerprint = fingerprint_of_checksums(weights.architecture, weights.dtype, crcs)
    problems = [str(difference) for difference in differences]
    if not problems and fingerprint != manifest.fingerprint:
        problems.append(f"fingerprint: the record says {manifest.fingerprint}, the weights have {fingerprint}")
    return (
        Comparison(
            str(weights.directory),
            len(weights.sources),
            weights.num_bytes,
            time.monotonic() - started,
            fingerprint,
            tuple(differences[:_MOST_DIFFERENCES]),
        ),
        problems,
    )


def _compare_adapter(manifest: AdapterManifest, weights: HFWeights, report: Report) -> tuple[Comparison, list[str]]:
    """Check that the weights have the fingerprint of the base that the adapter was trained on."""
    started = time.monotonic()
    with report.progress(weights.num_bytes, "read") as progress:
        fingerprint = checksums.fingerprint(weights, progress.advance)
    recorded = manifest.base.fingerprint
    problems = []
    if fingerprint != recorded:
        problems.append(f"base: the adapter was trained on {recorded}, these weights are {fingerprint}")
    seconds = time.monotonic() - started
    directory = str(weights.directory)
    return Comparison(directory, len(weights.sources), weights.num_bytes, seconds, fingerprint, ()), problems
