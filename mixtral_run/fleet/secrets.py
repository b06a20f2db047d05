"""Secrets: always passed as a file that only this user can read, never as a command-line argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mixtral_run.fleet.state import state_folder, write_private


@contextmanager
def token_file(source: str | None, ask: Callable[[], str]) -> Iterator[Path | None]:
    """Yield the file that holds a token.

    Args:
        source: a path; `-` for a private file with the answer of `ask`, removed afterwards; or None, which yields None.
    """
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
