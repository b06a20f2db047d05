"""Why a checkpoint could not be written, in the system's own word as far as it can be known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROBE_BYTES = 2**20


def save_failure(error: BaseException, folder: Path, rank: int) -> str:
    """Return one line that says why a save into `folder` failed on this rank.

    torch's writer in C++ reports a failed write without the system's error. Then the disk is asked by a write of its
    own: a full disk is still full.
    """
    for each in _chain(error):
        if isinstance(each, OSError) and each.strerror:
            return each.strerror + (f": {each.filename}" if each.filename else "")
    text = f"rank {rank}: {type(error).__name__}: {error}".splitlines()[0]
    word = _probe(folder)
    return f"{word} ({text})" if word else text


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [each.__cause__, each.__context__]


def _probe(folder: Path) -> str | None:
    """Return the system's error of a write into a folder; None if it succeeds."""
    file = folder / f".probe-{os.getpid()}"
    try:
        with file.open("wb") as stream:
            stream.write(bytes(_PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error.strerror
    finally:
        file.unlink(missing_ok=True)
    return None
