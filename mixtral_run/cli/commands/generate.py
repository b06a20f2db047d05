"""`mixtral-run generate`."""

from __future__ import annotations

import click

from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs import GenerateConfig
from mixtral_run.launch.run_job import run_job


@click.command()
@config_options(GenerateConfig)
def generate(config: GenerateConfig) -> None:
    """Continue prompts with a converted checkpoint, with or without an adapter."""

    from mixtral_run.launch.processes import import_ahead

    # Before the import below, which brings torch.
    import_ahead()

    from mixtral_run.train.preflight import with_base_here

    config = with_base_here(config)

    def job() -> None:
        from mixtral_run.inference.generate import generate

        generate(config)

    def check(world_size: int) -> None:
        del world_size
        from mixtral_run.train.preflight import check_inference

        check_inference(config)

    run_job("generate", config, job, check)
