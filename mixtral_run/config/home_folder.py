"""Paths that begin with ~."""

from __future__ import annotations

from pathlib import Path


def expanded(path: Path | str) -> Path:
    """Return the path with a leading ~ or ~USER replaced by that user's home folder.

    The path of a user whom this machine does not know stays as it is, as in a shell: it will not be found, and the
    message names it. Path.expanduser raises RuntimeError.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
