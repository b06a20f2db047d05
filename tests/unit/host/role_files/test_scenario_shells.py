"""Assertions in shell of the roles' scenarios can fail: the shell ignores more errors than it seems."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[4]
FILES = sorted([*ROOT.glob("roles/*/molecule/**/*.yml"), *ROOT.glob("tests/molecule/*/*.yml")])


def _shells(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("ansible.builtin.shell", "shell", "ansible.builtin.raw", "raw"):
                yield value["cmd"] if isinstance(value, dict) else value
            else:
                yield from _shells(value)
    elif isinstance(node, list):
        for each in node:
            yield from _shells(each)


def problems(script: str) -> list[str]:
    """Lines of a shell script that let a failure pass."""
    lines = script.strip().splitlines()
    found = [f"set -e forgives it, say `if …; then exit 1; fi`: {line}" for line in lines if line.strip()[:2] == "! "]
    if len(lines) > 1 and lines[0] != "set -e" and not lines[0].endswith("\\"):
        found.append(f"only the last line counts without `set -e`: {lines[0]}")
    return found


def test_the_shell_forgives_what_is_looked_for_here() -> None:
    assert problems("set -e\n! true\ntrue") and problems("false\ntrue") and problems("! false")
    assert not problems("set -e\nif true; then exit 1; fi\ntrue") and not problems("false")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_failing_line_fails_its_task(path: Path) -> None:
    assert [problem for script in _shells(yaml.safe_load(path.read_text())) for problem in problems(script)] == []
