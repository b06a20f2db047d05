"""Handing a secret on: always as a file that only this user can read, never as a word of a command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mixtral_run.fleet.state import state_folder, write_private


@contextmanager
def token_file(source: str | None, ask: Callable[[], str]) -> Iterator[Path | None]:
    """The file that holds a token: the one named, or for `-` one with what was asked for, gone afterwards."""
    if source is None:
        yield None
    elif source != "-":
        yield Path(source).expanduser()
    else:
        path = state_folder("tmp") / "hf-token"
        write_private(path, ask().strip() + "\n")
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
