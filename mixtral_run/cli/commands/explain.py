"""`mixtral-run explain`."""

from __future__ import annotations

import sys

import click

from mixtral_run.cli.command import Option, VerbCommand


@click.command(cls=VerbCommand, examples=("explain gpu-01", "explain NCCL timeout"))
@click.argument("words", nargs=-1, metavar="[WORDS|HOST|JOB|-]...")
@click.option("--json", "as_json", cls=Option, section="Output", is_flag=True, help="Print the answer as JSON.")
def explain(words: tuple[str, ...], as_json: bool) -> None:
    """Explain a failure and what to do: for words, a pasted message, a host of the last bootstrap, or a job.

    Without WORDS: print the failures of the last bootstrap, then the list of all known failures. With -: read standard
    input.
    """
    from mixtral_run.fleet.explain.explain import explain as answer
    from mixtral_run.fleet.explain.explain import explain_json
    from mixtral_run.terminal.report import json_document

    asked = sys.stdin.read() if words == ("-",) else " ".join(words)
    with json_document(as_json) as document:
        if as_json:
            document |= {"ok": True, **explain_json(asked)}
        else:
            click.echo(answer(asked))
