"""One known failure."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFailure:
    """A failure with a known cause and remedy."""

    name: str
    """Short name for `mixtral-run explain NAME`."""
    title: str
    pattern: str
    """Regular expression that matches output of the failure, regardless of case."""
    cause: str
    commands: tuple[str, ...]
    words: tuple[str, ...] = ()
    """Words that users search for."""

    def commands_for(self, host: str) -> tuple[str, ...]:
        """Return the commands with HOST replaced by the name of a host."""
        return tuple(re.sub(r"\bHOST\b", lambda _: host, command) for command in self.commands)
