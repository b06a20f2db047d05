"""The whole job at small size, through the same code that 8 GPUs run, every step proved.

A tiny random Mixtral is written in the released layout; then convert → verify → finetune → generate → export.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.trial import RehearseConfig
from mixtral_run.config.verbs import ConvertConfig, ExportConfig, FinetuneConfig, GenerateConfig, VerifyConfig
from mixtral_run.errors import CheckFailed, ConfigError
from mixtral_run.launch import processes
from mixtral_run.launch.run_job import run_job
from mixtral_run.report import Report
from mixtral_run.train.data.examples import read_examples
from mixtral_run.train.jobs import COMPARE_LOGITS, FINETUNE, GENERATE
from mixtral_run.train.metrics import read_metrics
from mixtral_run.train.preflight import check_inference, check_training
from mixtral_run.trial.sizes import PLAN, tokenizer_texts, write_rehearsal_pairs
from mixtral_run.trial.steps import Steps

CONVERTED_LOGITS_TOLERANCE = 5e-6
ADAPTER_LOGITS_TOLERANCE = 1e-5
MARKER = ".mixtral-run-rehearsal"
"""Tells a folder of an earlier rehearsal, which may be replaced, from a folder of the user's."""


@dataclass(frozen=True)
class Places:
    """Where the rehearsal puts what it makes."""

    work: Path

    @property
    def hf_model(self) -> Path:
        return self.work / "hf-model"

    @property
    def checkpoint(self) -> Path:
        return self.work / "checkpoint"

    @property
    def pairs(self) -> Path:
        return self.work / "pairs.jsonl"

    @property
    def adapter(self) -> Path:
        return self.work / "adapter"

    @property
    def peft(self) -> Path:
        return self.work / "peft-adapter"


def rehearse(config: RehearseConfig) -> None:
    """Run and prove every step; print the table; write report.json and loss.png. Raises CheckFailed when one fails."""
    report = Report.on_stderr() if config.json else Report()
    places = Places(config.work_path)
    _fresh_folder(config.work_path)
    layout = _layout(config)
    report.say(
        f"Rehearsing in {config.work_path} with {layout['nproc_per_node']} processes on {layout['device']}, "
        f"TP{layout['tensor_model_parallel_size']}/EP{layout['expert_model_parallel_size']}"
    )
    steps = Steps(7, report)
    steps.run("write a tiny Mixtral", lambda: _write_model(places, config))
    steps.run("convert", lambda: _convert(places, layout, report))
    steps.run("verify: every parameter, and logits", lambda: _verify(places, layout))
    steps.run("finetune", lambda: _finetune(places, layout))
    steps.run("generate", lambda: _generate(places, layout))
    steps.run("export", lambda: _export(places))
    steps.run("reload with PEFT", lambda: _reload(places, layout))
    steps.table("Rehearsal")
    losses = _losses(places)
    if losses:
        _plot(losses, config.work_path / "loss.png")
    document = steps.write(config.work_path / "report.json", layout=layout, losses=losses)
    if config.json:
        print(document, end="", flush=True)
    steps.raise_if_failed("The rehearsal failed.", "mixtral-run --debug rehearse")
    report.say(f"  report: {config.work_path / 'report.json'}   loss: {config.work_path / 'loss.png'}")
    report.done("Rehearsal complete: this machine does the whole job.")


def _fresh_folder(folder: Path) -> None:
    """Make FOLDER empty. Raises ConfigError when it holds anything but an earlier rehearsal."""
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists()):
            raise ConfigError(
                "The rehearsal would overwrite something that it did not make.",
                where=f"--work-path {folder}",
                expected="a new folder, an empty one, or that of an earlier rehearsal",
                found="other files",
                next_command="mixtral-run rehearse --work-path another-folder",
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def _layout(config: RehearseConfig) -> dict[str, Any]:
    """TP2/EP2 on two processes; on GPUs as many as there are, a power of two up to 8."""
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


def _write_model(places: Places, config: RehearseConfig) -> str:
    from mixtral_run.trial.random_mixtral import write_random_mixtral

    write_random_mixtral(
        places.hf_model,
        architecture=PLAN.architecture,
        dtype=PLAN.dtype,
        seed=config.seed,
        texts=tokenizer_texts(),
        num_shards=PLAN.num_shards,
        initializer_range=PLAN.initializer_range,
        embedding_range=PLAN.embedding_range,
    )
    write_rehearsal_pairs(places.pairs)
    return f"{PLAN.architecture.num_parameters:,} parameters in {PLAN.num_shards} shards, {PLAN.num_pairs} pairs"


def _convert(places: Places, layout: dict[str, Any], report: Report) -> str:
    from mixtral_run.weights.convert.to_megatron import convert

    result = convert(
        ConvertConfig(
            hf_model_path=str(places.hf_model),
            output_path=places.checkpoint,
            tensor_model_parallel_size=layout["tensor_model_parallel_size"],
            expert_model_parallel_size=layout["expert_model_parallel_size"],
        ),
        report,
    )
    return f"{result.num_bytes / 1e6:.1f} MB streamed, fingerprint {result.fingerprint[:12]}"


def _verify(places: Places, layout: dict[str, Any]) -> str:
    from mixtral_run.weights.verify.verify import compare_with_source

    compared = compare_with_source(places.checkpoint, places.hf_model, Report.silent())
    logits = _compare_logits(places, layout, CONVERTED_LOGITS_TOLERANCE, with_adapter=False)
    return f"{compared} tensors bit-equal; logits differ from HF's by at most {logits:.1e}"


def _compare_logits(places: Places, layout: dict[str, Any], tolerance: float, *, with_adapter: bool) -> float:
    file = places.work / ("logits-adapter.json" if with_adapter else "logits.json")
    config = VerifyConfig(
        **layout,
        load=places.checkpoint,
        against=places.hf_model,
        adapter=places.adapter if with_adapter else None,
        peft_path=places.peft if with_adapter else None,
        logits_tolerance=tolerance,
        logits_file=file,
    )
    run_job(COMPARE_LOGITS, config.check())
    return float(json.loads(file.read_text(encoding="utf-8"))["largest_difference"])


def _finetune(places: Places, layout: dict[str, Any]) -> str:
    before = _content(places.checkpoint)
    run_job(
        FINETUNE,
        FinetuneConfig(
            **layout,
            load=places.checkpoint,
            data_path=places.pairs,
            save=places.adapter,
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
    if _content(places.checkpoint) != before:
        raise CheckFailed("Fine-tuning changed the base checkpoint.", where=str(places.checkpoint))
    losses = _losses(places)
    first, last = losses[0], losses[-1]
    if not last <= first * PLAN.highest_final_loss_share:
        raise CheckFailed(
            "The loss did not fall clearly below its start.",
            where=str(places.adapter / "metrics.jsonl"),
            expected=f"at most {PLAN.highest_final_loss_share:.0%} of {first:.4f}",
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


def _generate(places: Places, layout: dict[str, Any]) -> str:
    pair = read_examples(places.pairs)[0]
    file = places.work / "answers.json"
    run_job(
        GENERATE,
        GenerateConfig(
            **layout,
            load=places.checkpoint,
            adapter=places.adapter,
            instruction=(pair.instruction,),
            max_new_tokens=PLAN.max_new_tokens,
            output_file=file,
        ).check(),
        lambda config, _: check_inference(config),
    )
    answer = json.loads(file.read_text(encoding="utf-8"))[0]["text"]
    if answer != pair.response:
        raise CheckFailed(
            "Generation did not give back what was learned.",
            where=f"instruction: {pair.instruction}",
            expected=pair.response,
            found=answer,
        )
    return f"“{pair.instruction}” → “{answer}”"


def _export(places: Places) -> str:
    from mixtral_run.weights.adapter.export import export

    export(ExportConfig(adapter=places.adapter, output_path=places.peft), Report.silent())
    size = sum(path.stat().st_size for path in places.peft.iterdir())
    return f"PEFT directory {places.peft.name}, {size / 1e6:.1f} MB"


def _reload(places: Places, layout: dict[str, Any]) -> str:
    difference = _compare_logits(places, layout, ADAPTER_LOGITS_TOLERANCE, with_adapter=True)
    return f"PEFT over HF gives the same logits within {difference:.1e}"


def _losses(places: Places) -> list[float]:
    file = places.adapter / "metrics.jsonl"
    return [line["loss"] for line in read_metrics(file)] if file.exists() else []


def _plot(losses: list[float], path: Path) -> None:
    from mixtral_run.trial.loss_plot import loss_plot

    loss_plot(losses, path, title="Rehearsal: LoRA on a tiny Mixtral")
