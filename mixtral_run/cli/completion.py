"""Shell completion of remembered hosts, choices and paths. click completes verbs and flags by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete_hosts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the remembered hosts that begin as the last word of HOST,HOST does. No host is asked."""
    del ctx, param
    from mixtral_run.errors import MixtralRunError
    from mixtral_run.fleet.hosts import remembered_hosts

    before, comma, last = incomplete.rpartition(",")
    try:
        names = sorted({host.name for host in remembered_hosts()})
    except (MixtralRunError, OSError):
        return []
    return [CompletionItem(f"{before}{comma}{name}") for name in names if name.startswith(last)]


def complete_choices(choices: Sequence[str]) -> Completer:
    """Return a completer for a setting with fixed values. Several may be given, separated by commas."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        del ctx, param
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{choice}") for choice in choices if choice.startswith(last)]

    return complete


def complete_value(wanted: Any, name: str, incomplete: str) -> list[CompletionItem]:
    """Return the completion of a setting's value: the shell's own files for a path, nothing for other types."""
    is_path = wanted is Path or name in (
        "data_path",
        "valid_data_path",
        "hf_model_path",
        "chat_template",
        "against",
        "adapter",
    )
    return [CompletionItem(incomplete, type="file")] if is_path else []
