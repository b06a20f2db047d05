"""Smoke test on real hardware: convert if needed, pretrain, LoRA, generate; results with time and memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from mixtral_run.config.fields import SETTINGS_ERROR
from mixtral_run.config.launch import CONVERTED_LAYOUT
from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.trial import SmokeConfig
from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import CheckFailed, ConfigError
from mixtral_run.launch import processes
from mixtral_run.launch.run_job import run_job
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.planner.choose import settled
from mixtral_run.terminal.report import Report
from mixtral_run.train.jobs import FINETUNE, GENERATE, PRETRAIN
from mixtral_run.train.metrics import read_metrics
from mixtral_run.train.preflight import check_inference, check_training, layout_problems
from mixtral_run.trial.sizes import tokenizer_texts
from mixtral_run.trial.steps import Steps
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.describe import describe_base

PROMPT = "The three states of matter that people meet every day are"
LAUNCH_SETTINGS = (
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "nproc_per_node",
    "device",
    "dtype",
    "distributed_timeout_minutes",
    "seed",
)


def smoke(config: SmokeConfig) -> None:
    """Run the steps, print the table, write report.json. Raises CheckFailed if a step fails."""
    processes.num_processes(config)
    check_smoke(config)
    report = Report.on_stderr() if config.json else Report()
    config.work_path.mkdir(parents=True, exist_ok=True)
    steps = Steps(4, report)
    steps.run("convert", lambda: _convert(config, report))
    steps.run(f"pretrain {config.train_iters}", lambda: _pretrain(config))
    steps.run(f"LoRA {config.train_iters}", lambda: _finetune(config))
    steps.run("generate", lambda: _generate(config))
    steps.table("Smoke")
    document = steps.write(config.work_path / "report.json", settings=config.to_mapping())
    if config.json:
        print(document, end="", flush=True)
    steps.raise_if_failed("The smoke test failed.", "mixtral-run --debug smoke …")
    report.done(f"Smoke test passed; report in {config.work_path / 'report.json'}")


def check_smoke(config: SmokeConfig) -> None:
    """Raise ConfigError if there is no checkpoint and no single source for it."""
    if _converted(config):
        problems = layout_problems(config, describe_base(config.load))
        if problems:
            raise ConfigError(SETTINGS_ERROR, problems=problems)
    elif (config.hf_model_path is None) == (config.random_layers is None):
        raise ConfigError(
            "There is no checkpoint yet, and one source for it is needed.",
            where=f"--load {config.load}",
            expected="--hf-model-path DIR or --random-layers N",
            found="neither" if config.hf_model_path is None else "both",
        )


def _converted(config: SmokeConfig) -> bool:
    return (config.load / LATEST).exists()


def _launch_settings(config: SmokeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in LAUNCH_SETTINGS}


def _training_settings(config: SmokeConfig) -> dict[str, Any]:
    return {
        **_launch_settings(config),
        "load": config.load,
        "mock_data": True,
        "micro_batch_size": config.micro_batch_size,
        "global_batch_size": config.global_batch_size,
        "train_iters": config.train_iters,
        "seq_length": config.seq_length,
        "recompute_activations": config.recompute_activations,
    }


def _convert(config: SmokeConfig, report: Report) -> str:
    if _converted(config):
        base = describe_base(config.load)
        return f"already done: {base.architecture.num_parameters:,} parameters in {config.load}"
    from mixtral_run.weights.convert.to_megatron import convert

    source, random_model = config.hf_model_path, None
    if source is None:
        random_model = _random_model(config, config.random_layers or 1, report)
        source = str(random_model)
    result = convert(
        ConvertConfig(
            hf_model_path=source,
            output_path=config.load,
            tensor_model_parallel_size=config.tensor_model_parallel_size or CONVERTED_LAYOUT[0],
            expert_model_parallel_size=config.expert_model_parallel_size or CONVERTED_LAYOUT[1],
        ),
        report,
    )
    if random_model is not None:
        shutil.rmtree(random_model)
    return f"{result.num_bytes / 1e9:.2f} GB at {result.num_bytes / 1e6 / result.seconds:,.0f} MB/s"


def _random_model(config: SmokeConfig, num_layers: int, report: Report) -> Path:
    from mixtral_run.trial.random_mixtral import write_random_mixtral

    folder = config.work_path / "random-model"
    shutil.rmtree(folder, ignore_errors=True)
    architecture = dataclasses.replace(MIXTRAL_8X7B, num_layers=num_layers)
    report.say(f"Writing a random Mixtral of full width with {num_layers} layers …")
    write_random_mixtral(
        folder,
        architecture=architecture,
        dtype="bfloat16",
        seed=config.seed,
        texts=tokenizer_texts(),
        num_shards=max(1, num_layers // 2),
    )
    return folder


def _pretrain(config: SmokeConfig) -> str:
    metrics = config.work_path / "pretrain-metrics.jsonl"
    metrics.unlink(missing_ok=True)
    # SGD with a small rate: the run proves that all weights get gradients and must not change them much. One micro
    # batch per process, so that the gradients need not all be held (train/steps/sgd_in_backward.py).
    settings = PretrainConfig(
        **{**_training_settings(config), "global_batch_size": 0}, lr=1e-4, min_lr=1e-4, metrics_file=metrics
    )
    run_job(PRETRAIN, settled(settings.check()), check_training)
    return _speed(metrics)


def _finetune(config: SmokeConfig) -> str:
    save = config.work_path / "adapter"
    shutil.rmtree(save, ignore_errors=True)
    settings = FinetuneConfig(**_training_settings(config), save=save, tensorboard=False)
    run_job(FINETUNE, settled(settings.check()), check_training)
    return _speed(save / "metrics.jsonl")


def _speed(metrics_file: Path) -> str:
    metrics = read_metrics(metrics_file)
    # The first iteration includes the warm-up.
    steady = sorted(line["tokens_per_second_per_process"] for line in metrics[1:] or metrics)
    middle = steady[len(steady) // 2]
    peak = max(line["peak_memory_gib"] for line in metrics) * 1.073741824
    loss = f"loss {metrics[0]['loss']:.3f} → {metrics[-1]['loss']:.3f}"
    return f"{loss}, {middle:,.0f} tokens/s a process, peak {peak:.1f} GB"


def _generate(config: SmokeConfig) -> str:
    file = config.work_path / "answers.json"
    settings = GenerateConfig(
        **_launch_settings(config),
        load=config.load,
        adapter=config.work_path / "adapter",
        prompt=(PROMPT,),
        max_new_tokens=32,
        output_file=file,
    )
    run_job(GENERATE, settled(settings.check()), lambda checked, _: check_inference(checked))
    answer = json.loads(file.read_text(encoding="utf-8"))[0]
    if not answer["num_tokens"]:
        raise CheckFailed("Generation returned no token.", where=str(config.load))
    return f"{answer['num_tokens']} tokens"
