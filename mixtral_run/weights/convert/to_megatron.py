"""Convert HF safetensors to Megatron torch_dist as a stream of byte ranges: no model is built, memory stays bounded."""

from __future__ import annotations

import io
import os
import resource
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.home_folder import expanded
from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import ConfigError, WeightsError, shortened
from mixtral_run.terminal.report import Report
from mixtral_run.weights.convert.copy import copy_all, unwritable
from mixtral_run.weights.convert.copy_plan import Job, Plan, make_plan
from mixtral_run.weights.convert.journal import JOURNAL_NAME, Journal, identity, stale_jobs
from mixtral_run.weights.convert.write_proof import write_proof
from mixtral_run.weights.hf.fingerprint import fingerprint_of_checksums
from mixtral_run.weights.hf.hf_weights import HFWeights, open_hf_weights
from mixtral_run.weights.hf.hub import HubModel, resolve
from mixtral_run.weights.hf.tokenizer_files import copy_tokenizer, tokenizer_problems
from mixtral_run.weights.io.atomic_folder import GIB, Staging, disk_problems, next_output, on_one_disk, output_problems
from mixtral_run.weights.io.files import sync_path, write_atomically
from mixtral_run.weights.io.interrupts import Interrupts, interrupts
from mixtral_run.weights.manifest.checkpoint_folder import CONVERTED_ITERATION, LATEST
from mixtral_run.weights.manifest.folder_kind import HF_MODEL, refuse_other_kinds
from mixtral_run.weights.manifest.manifest import is_kind, write_manifest
from mixtral_run.weights.mapping import hf_to_megatron
from mixtral_run.weights.torch_dist import megatron_files
from mixtral_run.weights.torch_dist.metadata import write_metadata

_STEPS = 4
_SIDECAR_BYTES = 64 * 2**20
"""Disk space for everything but the weights: the metadata of a full-size model is 1 MB, a tokenizer a few MB."""


@dataclass(frozen=True)
class ConvertResult:
    """Result of a conversion. Sizes in bytes, times in seconds; `peak_rss_bytes` is that of this process."""

    output_path: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtype: str
    fingerprint: str
    seconds: float
    peak_rss_bytes: int
    num_workers: int

    @property
    def megabytes_per_second(self) -> float:
        return self.num_bytes / 1e6 / max(self.seconds, 1e-9)


def convert(config: ConvertConfig, report: Report | None = None) -> ConvertResult:
    """Write the checkpoint completely or not at all. Only one process may call.

    Raises ConfigError (layout, output folder, disk) or WeightsError (the HF model), each with all problems, before
    anything is written; KeyboardInterrupt on Ctrl-C and SIGTERM, after which the same command continues.
    """
    report = report or Report()
    model = config.check().hf_model_path
    if model is None:
        raise ConfigError("There is nothing to convert.", expected="--hf-model-path")
    started = time.monotonic()
    report.step(1, _STEPS, f"Read the headers of {model}")
    weights, plan = _check(config, model, report)
    _print_summary(weights, report)
    report.step(2, _STEPS, f"Plan TP{config.tensor_model_parallel_size}/EP{config.expert_model_parallel_size}")
    report.say(f"  {len(plan.files)} files, {plan.num_bytes / GIB:,.2f} GiB into {config.output_path}")
    size, padded = (weights.architecture.padded_vocab_size(tp) for tp in (1, config.tensor_model_parallel_size))
    if padded != size:
        report.say(f"  the vocabulary is padded from {size:,} to {padded:,} rows, as Megatron pads it")
    with (
        interrupts() as signals,
        Staging(config.output_path, LATEST, "mixtral-run convert") as staging,
        _work(weights, plan, staging, report) as journal,
    ):
        report.step(3, _STEPS, f"Copy {len(weights.sources):,} tensors")
        workers = _copy(config, weights, plan, journal, staging, signals, report)
        report.step(4, _STEPS, "Write the metadata, wait for the disk")
        checksums = {name: crc for each in journal.done.values() for name, crc in each.sources.items()}
        fingerprint = fingerprint_of_checksums(weights.architecture, weights.dtype, checksums)
        _write_sidecars(config, model, weights, plan, staging.folder, fingerprint)
        write_proof(staging.folder, weights, plan, journal.done)
        write_atomically(staging.folder / LATEST, f"{CONVERTED_ITERATION}\n")
        # The journal is removed last: until the result is in its place, an interrupted run continues from it.
        staging.publish(spent=(JOURNAL_NAME,))
    result = ConvertResult(
        output_path=config.output_path,
        num_tensors=len(weights.sources),
        num_parameters=weights.architecture.num_parameters,
        num_bytes=weights.num_bytes,
        dtype=weights.dtype,
        fingerprint=fingerprint,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
        num_workers=workers,
    )
    report.done("Conversion complete")
    report.say(
        f"  {result.num_bytes / 1e6:,.0f} MB in {result.seconds:,.1f} s, {result.megabytes_per_second:,.0f} MB/s, "
        f"peak RSS {result.peak_rss_bytes / 1e6:,.0f} MB, {result.num_workers} workers"
    )
    words = shlex.join(["verify", "--load", str(config.output_path), "--against", str(weights.directory)])
    report.say(f"  next: mixtral-run {words}")
    return result


@contextmanager
def _work(weights: HFWeights, plan: Plan, staging: Staging, report: Report) -> Iterator[Journal]:
    """Open the journal of this conversion; if the work ends early, the finished jobs stay for the same command."""
    journal = Journal(staging.folder, identity(weights, plan), plan.jobs)
    folder = _iteration_folder(staging)
    if journal.damage is not None:
        report.warn(f"{journal.path} is damaged ({journal.damage}): the conversion begins anew")
    if journal.is_new or not all((folder / name).is_file() for name in plan.files):
        staging.clear()
        journal.done.clear()
    elif journal.done:
        _drop_stale(weights, plan, folder, journal, report)
    try:
        yield journal
    except BaseException as error:
        staging.keep = bool(journal.done) and journal.path.is_file()
        if staging.keep:
            with suppress(BrokenPipeError):
                report.warn(
                    f"{_num_copied(weights, plan, journal) / GIB:,.2f} of {weights.num_bytes / GIB:,.2f} GiB are "
                    f"copied, in {staging.folder}: the same command continues from there"
                )
        if isinstance(error, OSError) and not isinstance(error, PermissionError):
            raise unwritable(Path(error.filename or staging.folder), error) from error
        raise


def _drop_stale(weights: HFWeights, plan: Plan, folder: Path, journal: Journal, report: Report) -> None:
    """Read what an interrupted run copied, and forget the jobs whose bytes are not what it noted."""
    num_bytes = _num_copied(weights, plan, journal)
    with report.progress(num_bytes, "checked") as progress:
        stale = stale_jobs(plan, folder, journal.done, progress.advance)
    for number in stale:
        del journal.done[number]
    if stale:
        report.warn(f"{len(stale):,} parts in {folder} are not what was written: they are copied again")


def _copy(
    config: ConvertConfig,
    weights: HFWeights,
    plan: Plan,
    journal: Journal,
    staging: Staging,
    signals: Interrupts,
    report: Report,
) -> int:
    """Write all chunks to the disk, continuing where an earlier run of the same conversion was interrupted.

    Returns the number of workers that copied; the journal has the checksums by job. Raises KeyboardInterrupt on Ctrl-C
    and SIGTERM once all finished jobs are on the disk and in the journal.
    """
    folder = _iteration_folder(staging)
    folder.mkdir(exist_ok=True)
    _write_objects(plan, folder)
    # Files of the journal's jobs must be found after a power failure: sync their entries in the folders as well.
    for each in (folder, staging.folder, staging.folder.parent):
        sync_path(each)
    journal.start(plan.jobs)
    copied = _num_copied(weights, plan, journal)
    if copied:
        report.say(f"  continuing after {copied / GIB:,.2f} GiB that an earlier run copied")
    with ExitStack() as shown:
        progress = shown.enter_context(report.progress(weights.num_bytes, "copied"))
        progress.advance(copied)

        def stopping() -> None:
            # Ctrl-C also ends a `| tee`. Close the bar first: it would overwrite the message, and hides the cursor.
            with suppress(BrokenPipeError):
                shown.close()
                report.say("  Stopping: copied data is flushed to the disk; Ctrl-C again ends at once, without it.")

        return copy_all(
            plan, weights, folder, workers=config.workers, journal=journal, advance=progress.advance,
            interrupts=signals, stopping=stopping,
        )  # fmt: skip


def _iteration_folder(staging: Staging) -> Path:
    return staging.folder / f"iter_{CONVERTED_ITERATION:07d}"


def _num_copied(weights: HFWeights, plan: Plan, journal: Journal) -> int:
    return sum(_num_bytes(weights, plan.jobs[number]) for number in journal.done)


def _num_bytes(weights: HFWeights, job: Job) -> int:
    return sum(weights.sources[name].num_bytes for name in job.unit.sources)


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process."""
    # getrusage would begin with the parent's size; the kernel's own count begins with the program.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_base(folder: Path) -> bool:
    return is_kind(folder, "base")


def _check(config: ConvertConfig, model: str, report: Report) -> tuple[HFWeights, Plan]:
    """Raise everything that can be found before the first byte is written; return the weights and the plan."""
    what = "an earlier checkpoint of this kit"
    problems = output_problems(config.output_path, overwrite=config.overwrite, is_ours=_is_base, what=what)
    try:
        refuse_other_kinds("--hf-model-path", expanded(model), HF_MODEL)
        weights = open_hf_weights(resolve(model, report, lambda found: _check_before_download(config, found, problems)))
    except WeightsError as error:
        error.problems = (*error.problems, *_layout_problems(config, model), *problems)
        raise
    tp, ep = config.tensor_model_parallel_size, config.expert_model_parallel_size
    layout_problems = weights.architecture.layout_problems(tp, ep)
    if layout_problems:
        raise ConfigError(
            "The model cannot be converted as asked.",
            problems=shortened([*layout_problems, *problems]),
            next_command="mixtral-run convert --help",
        )
    plan = make_plan(weights, tp, ep, len(_empty_object()))
    problems += tokenizer_problems(weights.directory)
    problems += disk_problems(config.output_path, plan.num_bytes + _SIDECAR_BYTES)
    if problems:
        raise ConfigError("The checkpoint cannot be written.", problems=problems, next_command=next_output(problems))
    return weights, plan


def _check_before_download(config: ConvertConfig, model: HubModel, problems: list[str]) -> None:
    """Raise ConfigError with all problems that can be found without weights, those of the output folder included."""
    a = model.architecture
    needed = model.num_bytes + _SIDECAR_BYTES
    if on_one_disk(config.output_path, model.cache):
        needed += model.missing_bytes
    found = a.layout_problems(config.tensor_model_parallel_size, config.expert_model_parallel_size)
    found += [*problems, *disk_problems(config.output_path, needed)]
    if found:
        raise ConfigError(
            "The model cannot be converted as asked.",
            where=model.name,
            problems=found,
            next_command=next_output(found) or "mixtral-run convert --help",
        )


def _layout_problems(config: ConvertConfig, model: str) -> list[str]:
    """Return the layout's problems if the weights cannot be used but their config.json can."""
    from mixtral_run.model.architecture import MixtralArchitecture

    try:
        architecture = MixtralArchitecture.from_hf_directory(Path(model))
    except WeightsError:
        return []
    return architecture.layout_problems(config.tensor_model_parallel_size, config.expert_model_parallel_size)


def _print_summary(weights: HFWeights, report: Report) -> None:
    a = weights.architecture
    report.say(
        f"  {len(weights.files)} files, {len(weights.sources):,} tensors, {a.num_parameters:,} parameters, "
        f"{weights.dtype}, {weights.num_bytes / GIB:,.2f} GiB"
    )
    report.say(
        f"  {a.num_layers} layers, hidden {a.hidden_size}, {a.num_attention_heads} heads in {a.num_query_groups} "
        f"groups, {a.num_experts} experts of {a.ffn_hidden_size}, top-{a.moe_router_topk}"
    )
    for note in weights.notes:
        report.warn(note)


def _empty_object() -> bytes:
    """Return an empty `_extra_state` object as Megatron stores it: the list [None]."""
    import torch

    stream = io.BytesIO()
    torch.save([None], stream)
    return stream.getvalue()


def _write_objects(plan: Plan, folder: Path) -> None:
    content = _empty_object()
    for name in plan.files:
        # Not truncated: an earlier run's chunks may be in it.
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            for item in plan.objects:
                if item.file == name:
                    os.pwrite(descriptor, content, item.start)
        except OSError as error:
            raise unwritable(folder / name, error) from error
        finally:
            os.close(descriptor)


def _write_sidecars(
    config: ConvertConfig, model: str, weights: HFWeights, plan: Plan, folder: Path, fingerprint: str
) -> None:
    """Write everything next to the weights but the proof and the marker file, which completes the checkpoint."""
    iteration_folder = folder / f"iter_{CONVERTED_ITERATION:07d}"
    tp, ep = config.tensor_model_parallel_size, config.expert_model_parallel_size
    a, dtype = weights.architecture, weights.dtype
    # An earlier run may have copied files that the source no longer has.
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    copy_tokenizer(weights.directory, folder / "tokenizer")
    megatron_files.write_common(iteration_folder, a, dtype, tp, ep, CONVERTED_ITERATION)
    megatron_files.write_run_config(iteration_folder, a, dtype, tp, ep)
    write_metadata(iteration_folder / ".metadata", hf_to_megatron.megatron_tensors(a, tp), dtype, plan.stored_items())
    megatron_files.write_metadata_json(iteration_folder)
    write_manifest(
        folder,
        "base",
        architecture=a.to_mapping(),
        dtype=dtype,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        source=model,
        fingerprint=fingerprint,
    )
