"""`mixtral-run verify`."""

from __future__ import annotations

import click

from mixtral_run.commands.options import config_options
from mixtral_run.config import VerifyConfig


@click.command()
@config_options(VerifyConfig)
def verify(config: VerifyConfig) -> None:
    """Say what a checkpoint is; with --against compare it with the HF weights, bit by bit and by logits."""
    from mixtral_run import launch

    if launch.rank() == 0 and not launch.is_ours():
        import json

        from mixtral_run.weights.verify import verify as verify_weights

        result = verify_weights(config)
        if config.json:
            click.echo(json.dumps(result.to_mapping(), indent=2, ensure_ascii=False))
        result.check()
        if result.kind not in ("base", "hf"):
            return
    if config.against is None or not config.logits:
        return
    if launch.is_worker():
        from mixtral_run.parity import compare_logits

        compare_logits(config)
    elif _fits(config):
        launch.torchrun("verify", config)


def _fits(config: VerifyConfig) -> bool:
    from mixtral_run.memory import logits_fit

    return logits_fit(config)
