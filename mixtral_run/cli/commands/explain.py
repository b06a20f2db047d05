"""`mixtral-run explain`."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("words", nargs=-1, metavar="[WORDS|HOST|JOB|-]...")
def explain(words: tuple[str, ...]) -> None:
    """Say why something fails and what to do: for words, a pasted message, a host of the last bootstrap, or a job.

    Without WORDS: the failures of the last bootstrap, then the list of all that are known; with -, standard input.
    """
    from mixtral_run.fleet.explain.explain import explain as answer

    click.echo(answer(sys.stdin.read() if words == ("-",) else " ".join(words)))
