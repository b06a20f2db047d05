"""`mixtral-run serve`."""

from __future__ import annotations

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.launch.imports import importing
from mixtral_run.launch.run_job import run_job
from mixtral_run.train.jobs import PROVE


@click.command(
    cls=VerbCommand,
    examples=(
        "serve --on gpu-01 --load mistralai/Mixtral-8x7B-v0.1 --adapter peft",
        "serve --prove http://127.0.0.1:8000 --load mixtral --adapter adapter",
    ),
)
@config_options(ServeConfig)
def serve(config: ServeConfig) -> None:
    """Serve a model with OpenAI's API on a host, or prove that a server answers as generate does.

    With --on, an engine's container serves an HF model, with an adapter in PEFT's form. With --prove, --load and
    --adapter are what generate takes.
    """
    if config.prove is None:
        from mixtral_run.fleet.jobs.serve import refuse_here

        raise refuse_here()
    PROVE.import_ahead()
    with importing():
        from mixtral_run.inference.prove import check_proof
        from mixtral_run.planner.choose import settled
        from mixtral_run.train.preflight import with_base_here

    run_job(PROVE, settled(with_base_here(config)), lambda checked, _: check_proof(checked))
