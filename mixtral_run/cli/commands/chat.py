"""`mixtral-run chat`."""

from __future__ import annotations

import sys

import click

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import config_options
from mixtral_run.config.verbs.generate import ChatConfig
from mixtral_run.launch.imports import importing
from mixtral_run.launch.processes import is_worker
from mixtral_run.launch.run_job import run_job
from mixtral_run.launch.terminal import lend_terminal
from mixtral_run.terminal.report import Report
from mixtral_run.train.jobs import CHAT


@click.command(
    cls=VerbCommand,
    examples=(
        "chat --load mixtral --adapter adapter",
        'chat --load mixtral --adapter adapter --system "Answer in one sentence." --on gpu-01',
    ),
)
@config_options(ChatConfig)
def chat(config: ChatConfig) -> None:
    """Talk with a base model in a terminal. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        # Standard output has the answers only.
        Report.on_stderr()
    with importing():
        from mixtral_run.planner.available import ask_ahead

    # Both start processes that work while this one imports torch.
    if not config.has_layout:
        ask_ahead(config)
    CHAT.import_ahead()

    with importing():
        from mixtral_run.planner.choose import settled
        from mixtral_run.train.preflight import check_inference, with_base_here

    config = settled(with_base_here(config))
    if not is_worker():
        lend_terminal()
    run_job(CHAT, config, lambda checked, _: check_inference(checked, "chat"))
