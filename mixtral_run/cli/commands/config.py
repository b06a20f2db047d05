"""`mixtral-run config init`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from mixtral_run.cli.command import Option, VerbCommand, and_words, close_to, or_words
from mixtral_run.errors import ConfigError


@click.command(
    cls=VerbCommand, no_args_is_help=True, examples=("config init finetune -o run.yaml", "config init smoke")
)
@click.argument("action", metavar="init")
@click.argument("verb", metavar="[VERB]", default="finetune")
@click.option(
    "-o",
    "--output",
    cls=Option,
    section="Output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to write; must be new. Default: standard output.",
)
def config(action: str, verb: str, output: Path | None) -> None:
    """Write a YAML file for --config with all settings of VERB (default: finetune), their help and their defaults."""
    from mixtral_run.cli.config_template import CONFIGS, config_template, required_settings

    problems = []
    if action != "init":
        problems.append(f"{action!r}: expected init")
    if verb not in CONFIGS:
        meant = or_words(close_to(verb, CONFIGS))
        problems.append(
            f"{verb!r}: expected one of {', '.join(CONFIGS)}" + (f"; did you mean {meant}?" if meant else "")
        )
    if problems:
        raise ConfigError(
            "The command line cannot be understood.",
            where="command line",
            problems=problems,
            next_command="mixtral-run config init finetune -o run.yaml",
        )
    text = config_template(verb)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            "The config file exists, and is never overwritten.",
            where=str(output),
            next_command=f"mixtral-run config init {verb} -o ANOTHER",
        ) from error
    except FileNotFoundError as error:
        raise ConfigError(
            "The folder of the config file does not exist.",
            where=str(output),
            next_command=f"mkdir -p {shlex.quote(str(output.parent))}",
        ) from error
    needed = required_settings(verb)
    fill_in = f"fill in {and_words(needed)}, then " if needed else ""
    host = " USER@HOST" if verb == "up" else ""
    click.echo(f"✓ Wrote {output}\n  next: {fill_in}mixtral-run {verb}{host} --config {shlex.quote(str(output))}")
