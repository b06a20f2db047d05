"""Errors as JSON: with --json, the standard output of a verb is one JSON document, also if the verb fails.

A verb that has results prints them with its error. Where it has printed nothing yet, the error is printed here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

import click

from mixtral_run.errors import MixtralRunError, described, from_os_error
from mixtral_run.terminal.report import json_text

_WATCHED = "mixtral_run.json_errors"
"""Key of a click context's `meta`: the standard output of a verb that prints JSON."""


class _Watched:
    """A text stream that notes whether anything was written to it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.is_used = stream, False

    def write(self, text: str) -> int:
        self.is_used = self.is_used or bool(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def expect_json(ctx: click.Context) -> None:
    """Watch standard output from now on: the verb was called with --json, on the command line or in a config file.

    Of the processes of the user's torchrun only the first prints.
    """
    if _WATCHED not in ctx.meta and sys.stdout is not None and os.environ.get("RANK", "0") == "0":
        watched = _Watched(sys.stdout)
        ctx.meta[_WATCHED], sys.stdout = watched, cast(TextIO, watched)


@contextmanager
def errors_as_json(ctx: click.Context) -> Iterator[None]:
    """Print an error of the context as JSON if `expect_json` was called in it and nothing was printed since.

    The error is raised again, so that the caller reports it and sets the exit code.
    """
    try:
        yield
    except (MixtralRunError, OSError, click.ClickException) as error:
        watched = ctx.meta.get(_WATCHED)
        document = _document(error)
        if document is not None and watched is not None and not watched.is_used:
            # A reader that is gone or a full disk must not hide the error itself.
            with suppress(OSError):
                print(json_text({"ok": False, "error": document}), file=watched, flush=True)
        raise
    finally:
        watched = ctx.meta.get(_WATCHED)
        if isinstance(watched, _Watched) and cast(_Watched, sys.stdout) is watched:
            sys.stdout = watched.stream


def _document(error: MixtralRunError | OSError | click.ClickException) -> dict[str, object] | None:
    """Return the error as JSON values. None for one that is an error of the program, whose traceback is printed."""
    if isinstance(error, click.ClickException):
        return {"what": error.format_message(), "exit_code": error.exit_code}
    known = from_os_error(error) if isinstance(error, OSError) else error
    return None if known is None else described(known)
