"""`mixtral-run verify`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.weights import VerifyConfig


@click.command(
    cls=VerbCommand,
    examples=(
        "verify --load mixtral --proof",
        "verify --load mixtral --against mistralai/Mixtral-8x7B-v0.1 --no-logits --json",
    ),
)
@config_options(VerifyConfig)
def verify(config: VerifyConfig) -> None:
    """Describe a checkpoint. With --against compare it with the HF weights, bit by bit and by logits."""
    from mixtral_run.launch import processes
    from mixtral_run.terminal.report import json_document

    # Under the user's torchrun only the first process reads the checkpoint and prints.
    is_first = processes.rank() == 0
    with json_document(config.json and is_first) as document:
        if is_first:
            from mixtral_run.weights.verify.verify import verify as verify_weights

            result = verify_weights(config)
            document |= result.to_mapping()
            result.check()
            if result.kind not in ("base", "hf"):
                return
        if config.against is not None and config.logits:
            _compare_logits(config)


def _compare_logits(config: VerifyConfig) -> None:
    """Compare the logits in the processes of a job, unless the models do not fit into memory."""
    from mixtral_run.launch import processes
    from mixtral_run.launch.run_job import run_job
    from mixtral_run.planner.available import logits_fit
    from mixtral_run.terminal.report import Report
    from mixtral_run.train.jobs import COMPARE_LOGITS
    from mixtral_run.weights.hf.hub import with_models_here

    report = Report.silent() if processes.rank() != 0 else Report.on_stderr() if config.json else Report()
    config = with_models_here(config, report)
    if processes.is_worker() or logits_fit(config):
        run_job(COMPARE_LOGITS, config)
