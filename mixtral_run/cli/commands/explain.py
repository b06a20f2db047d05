"""`mixtral-run explain`."""

from __future__ import annotations

import sys

import click

from mixtral_run.cli.command import VerbCommand


@click.command(cls=VerbCommand, examples=("explain gpu-01", "explain NCCL timeout"))
@click.argument("words", nargs=-1, metavar="[WORDS|HOST|JOB|-]...")
def explain(words: tuple[str, ...]) -> None:
    """Explain a failure and what to do: for words, a pasted message, a host of the last bootstrap, or a job.

    Without WORDS: print the failures of the last bootstrap, then the list of all known failures. With -: read standard
    input.
    """
    from mixtral_run.fleet.explain.explain import explain as answer

    click.echo(answer(sys.stdin.read() if words == ("-",) else " ".join(words)))
