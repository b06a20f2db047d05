"""`mixtral-run evaluate`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.evaluate import EvaluateConfig
from mixtral_run.launch.imports import importing
from mixtral_run.launch.run_job import run_job
from mixtral_run.train.jobs import EVALUATE


@click.command(
    cls=VerbCommand,
    examples=(
        "evaluate --load mixtral --adapter adapter --data-path test.jsonl",
        "evaluate --load mixtral --adapter adapter --tasks hellaswag --tasks arc_easy --tasks-limit 200 --json",
    ),
)
@config_options(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> None:
    """Measure a base model, and an adapter next to it: loss, exact match and ROUGE-L on a test set; lm-eval's tasks."""
    with importing():
        from mixtral_run.planner.available import ask_ahead

    # Both start processes that work while this one imports torch.
    if not config.has_layout:
        ask_ahead(config)
    EVALUATE.import_ahead()

    with importing():
        from mixtral_run.inference.evaluation.check import check_evaluation
        from mixtral_run.planner.choose import settled
        from mixtral_run.train.preflight import with_base_here

    run_job(EVALUATE, settled(with_base_here(config)), lambda checked, _: check_evaluation(checked))
