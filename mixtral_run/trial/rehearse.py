"""Rehearsal: the whole job at a small size with the same code that runs on 8 GPUs; every step is checked.

It writes a tiny random Mixtral in the released layout, then runs convert → verify → finetune → generate → export.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.trial import RehearseConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig, VerifyConfig
from mixtral_run.errors import CheckFailed, ConfigError
from mixtral_run.launch import processes
from mixtral_run.launch.run_job import run_job
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.reading.examples import read_examples
from mixtral_run.train.jobs import COMPARE_LOGITS, FINETUNE, GENERATE
from mixtral_run.train.metrics import read_metrics
from mixtral_run.train.preflight import check_inference, check_training
from mixtral_run.trial.sizes import PLAN, tokenizer_texts, write_rehearsal_examples
from mixtral_run.trial.steps import Steps

CONVERTED_LOGITS_TOLERANCE = 5e-6
ADAPTER_LOGITS_TOLERANCE = 1e-5
MARKER = ".mixtral-run-rehearsal"
"""File that marks the folder of an earlier rehearsal, which may be replaced, unlike a folder of the user."""


@dataclass(frozen=True)
class Paths:
    """Paths of the rehearsal's outputs."""

    work: Path

    @property
    def hf_model(self) -> Path:
        return self.work / "hf-model"

    @property
    def checkpoint(self) -> Path:
        return self.work / "checkpoint"

    @property
    def examples(self) -> Path:
        return self.work / "pairs.jsonl"

    @property
    def adapter(self) -> Path:
        return self.work / "adapter"

    @property
    def peft(self) -> Path:
        return self.work / "peft-adapter"


def rehearse(config: RehearseConfig) -> None:
    """Run and check every step, print the table, write report.json and loss.png. Raises CheckFailed if a step fails."""
    report = Report.on_stderr() if config.json else Report()
    paths = Paths(config.work_path)
    _fresh_folder(config.work_path)
    layout = _layout(config)
    report.say(
        f"Rehearsing in {config.work_path} with {layout['nproc_per_node']} processes on {layout['device']}, "
        f"TP{layout['tensor_model_parallel_size']}/EP{layout['expert_model_parallel_size']}"
    )
    steps = Steps(7, report)
    steps.run("write a tiny Mixtral", lambda: _write_model(paths, config))
    steps.run("convert", lambda: _convert(paths, layout, report))
    steps.run("verify: every parameter, and logits", lambda: _verify(paths, layout))
    steps.run("finetune", lambda: _finetune(paths, layout))
    steps.run("generate", lambda: _generate(paths, layout))
    steps.run("export", lambda: _export(paths))
    steps.run("reload with PEFT", lambda: _reload(paths, layout))
    steps.table("Rehearsal")
    losses = _losses(paths)
    if losses:
        _plot(losses, config.work_path / "loss.png")
    document = steps.write(config.work_path / "report.json", layout=layout, losses=losses)
    if config.json:
        print(document, end="", flush=True)
    steps.raise_if_failed("The rehearsal failed.", "mixtral-run --debug rehearse")
    report.say(f"  report: {config.work_path / 'report.json'}   loss: {config.work_path / 'loss.png'}")
    report.done("Rehearsal complete: the whole job works on this machine.")


def _fresh_folder(folder: Path) -> None:
    """Create an empty folder. Raises ConfigError if it contains anything but an earlier rehearsal."""
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists()):
            raise ConfigError(
                "The rehearsal would overwrite files that it did not create.",
                where=f"--work-path {folder}",
                expected="a new folder, an empty one, or that of an earlier rehearsal",
                found="other files",
                next_command="mixtral-run rehearse --work-path another-folder",
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def _layout(config: RehearseConfig) -> dict[str, Any]:
    """Return the layout: TP2/EP2 on two processes on a CPU; on GPUs all of them, a power of two up to 8."""
    import torch

    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    count = processes.default_num_processes(config.device)
    size = max(power for power in (1, 2, 4, 8) if power <= count)
    return {
        "nproc_per_node": size,
        "device": "cuda" if on_gpu else "cpu",
        "dtype": "fp32",
        "tensor_model_parallel_size": min(2, size),
        "expert_model_parallel_size": min(4, size),
        "seed": config.seed,
    }


def _write_model(paths: Paths, config: RehearseConfig) -> str:
    from mixtral_run.trial.random_mixtral import write_random_mixtral

    write_random_mixtral(
        paths.hf_model,
        architecture=PLAN.architecture,
        dtype=PLAN.dtype,
        seed=config.seed,
        texts=tokenizer_texts(),
        num_shards=PLAN.num_shards,
        initializer_range=PLAN.initializer_range,
        embedding_range=PLAN.embedding_range,
    )
    write_rehearsal_examples(paths.examples)
    return f"{PLAN.architecture.num_parameters:,} parameters in {PLAN.num_shards} shards, {PLAN.num_examples} examples"


def _convert(paths: Paths, layout: dict[str, Any], report: Report) -> str:
    from mixtral_run.weights.convert.to_megatron import convert

    result = convert(
        ConvertConfig(
            hf_model_path=str(paths.hf_model),
            output_path=paths.checkpoint,
            tensor_model_parallel_size=layout["tensor_model_parallel_size"],
            expert_model_parallel_size=layout["expert_model_parallel_size"],
        ),
        report,
    )
    return f"{result.num_bytes / 1e6:.1f} MB streamed, fingerprint …{result.fingerprint.split('-')[-1][:12]}"


def _verify(paths: Paths, layout: dict[str, Any]) -> str:
    from mixtral_run.weights.verify.verify import compare_with_source

    compared = compare_with_source(paths.checkpoint, paths.hf_model, Report.silent())
    logits = _compare_logits(paths, layout, CONVERTED_LOGITS_TOLERANCE, with_adapter=False)
    return f"{compared} tensors bit-equal; logits differ from HF's by at most {logits:.1e}"


def _compare_logits(paths: Paths, layout: dict[str, Any], tolerance: float, *, with_adapter: bool) -> float:
    file = paths.work / ("logits-adapter.json" if with_adapter else "logits.json")
    config = VerifyConfig(
        **layout,
        load=paths.checkpoint,
        against=paths.hf_model,
        adapter=paths.adapter if with_adapter else None,
        peft_path=paths.peft if with_adapter else None,
        logits_tolerance=tolerance,
        logits_file=file,
    )
    run_job(COMPARE_LOGITS, config.check())
    return float(json.loads(file.read_text(encoding="utf-8"))["largest_difference"])


def _finetune(paths: Paths, layout: dict[str, Any]) -> str:
    before = _content(paths.checkpoint)
    run_job(
        FINETUNE,
        FinetuneConfig(
            **layout,
            load=paths.checkpoint,
            data_path=(str(paths.examples),),
            save=paths.adapter,
            seq_length=PLAN.seq_length,
            micro_batch_size=PLAN.micro_batch_size,
            global_batch_size=PLAN.global_batch_size * _replicas(layout),
            train_iters=PLAN.train_iters,
            log_interval=10,
            lr=PLAN.lr,
            min_lr=PLAN.min_lr,
            lr_warmup_iters=PLAN.lr_warmup_iters,
            weight_decay=PLAN.weight_decay,
            clip_grad=PLAN.clip_grad,
            lora_rank=PLAN.lora_rank,
            lora_alpha=PLAN.lora_alpha,
            lora_target_modules=PLAN.lora_target_modules,
        ).check(),
        check_training,
    )
    if _content(paths.checkpoint) != before:
        raise CheckFailed("Fine-tuning changed the base checkpoint.", where=str(paths.checkpoint))
    losses = _losses(paths)
    first, last = losses[0], losses[-1]
    if not last <= first * PLAN.max_final_loss_ratio:
        raise CheckFailed(
            "The loss did not fall clearly.",
            where=str(paths.adapter / "metrics.jsonl"),
            expected=f"at most {PLAN.max_final_loss_ratio:.0%} of {first:.4f}",
            found=f"{last:.4f}",
        )
    return f"loss {first:.3f} → {last:.4f} in {len(losses)} iterations; base unchanged"


def _replicas(layout: dict[str, Any]) -> int:
    replicas: int = layout["nproc_per_node"] // layout["tensor_model_parallel_size"]
    return replicas


def _content(folder: Path) -> dict[str, str]:
    import hashlib

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _generate(paths: Paths, layout: dict[str, Any]) -> str:
    example = next(iter(read_examples([str(paths.examples)])))
    instruction, response = (message.content for message in example.messages)
    file = paths.work / "answers.json"
    run_job(
        GENERATE,
        GenerateConfig(
            **layout,
            load=paths.checkpoint,
            adapter=paths.adapter,
            instruction=(instruction,),
            max_new_tokens=PLAN.max_new_tokens,
            output_file=file,
        ).check(),
        lambda config, _: check_inference(config),
    )
    answer = json.loads(file.read_text(encoding="utf-8"))[0]["text"]
    if answer != response:
        raise CheckFailed(
            "Generation did not return the learned response.",
            where=f"instruction: {instruction}",
            expected=response,
            found=answer,
        )
    return f"“{instruction}” → “{answer}”"


def _export(paths: Paths) -> str:
    from mixtral_run.weights.adapter.export import export

    export(ExportConfig(adapter=(str(paths.adapter),), output_path=paths.peft), Report.silent())
    size = sum(path.stat().st_size for path in paths.peft.iterdir())
    return f"PEFT directory {paths.peft.name}, {size / 1e6:.1f} MB"


def _reload(paths: Paths, layout: dict[str, Any]) -> str:
    difference = _compare_logits(paths, layout, ADAPTER_LOGITS_TOLERANCE, with_adapter=True)
    return f"PEFT over HF gives the same logits within {difference:.1e}"


def _losses(paths: Paths) -> list[float]:
    file = paths.adapter / "metrics.jsonl"
    return [line["loss"] for line in read_metrics(file)] if file.exists() else []


def _plot(losses: list[float], path: Path) -> None:
    from mixtral_run.results.loss_plot import write_loss_plot

    write_loss_plot(path, list(enumerate(losses, start=1)), title="Rehearsal: LoRA on a tiny Mixtral")
