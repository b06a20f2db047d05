"""Programs of a host as small scripts in a folder that stands first in PATH; what they were called with is kept."""

import shlex
from pathlib import Path

import jinja2
import pytest
import yaml

ROLES = Path(__file__).parents[3] / "roles"


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
        """Return the calls in their order."""
        text = self._calls.read_text() if self._calls.exists() else ""
        return [line for line in text.splitlines() if line.startswith(beginning)]


def preflight_script(proxy: str = "", no_proxy: str = "localhost,127.0.0.1") -> str:
    """Run preflight's commands in the shell of a host that may have no Python."""
    text = yaml.safe_load((ROLES / "preflight/vars/main.yml").read_text())["__preflight_python_script"]
    environment = jinja2.Environment(trim_blocks=True)
    environment.filters["quote"] = shlex.quote
    values = {"ansible_check_mode": False, "preflight_proxy": proxy, "preflight_no_proxy": no_proxy}
    return environment.from_string(text).render(values)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path)
    monkeypatch.setenv("PATH", f"{made.folder}:/usr/bin:/bin")
    return made
