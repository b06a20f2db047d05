"""Programs of a host as small scripts in a folder that stands first in PATH; what they were called with is kept."""

from pathlib import Path

import pytest


class Programs:
    """The stand-in programs of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._calls = folder / "bin", folder / "calls"
        self.folder.mkdir()

    def put(self, name: str, *lines: str) -> None:
        """Add a program, or replace it: lines of sh."""
        path = self.folder / name
        # Made beside and renamed: a program that another process just forked for writing cannot be run (ETXTBSY).
        fresh = path.with_suffix(".new")
        fresh.write_text("\n".join(["#!/bin/sh", f'echo "{name} $*" >> {self._calls}', *lines]) + "\n")
        fresh.chmod(0o755)
        fresh.rename(path)

    def calls(self, beginning: str = "") -> list[str]:
        """What was called, in order."""
        text = self._calls.read_text() if self._calls.exists() else ""
        return [line for line in text.splitlines() if line.startswith(beginning)]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path)
    monkeypatch.setenv("PATH", f"{made.folder}:/usr/bin:/bin")
    return made
