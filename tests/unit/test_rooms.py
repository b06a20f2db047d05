"""The size of files and folders: what one person can hold in mind."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_ENTRIES, MOST_FILES, MOST_LINES = 14, 16, 400
ONE_A_FILE = {"mixtral_run/cli/commands", "plugins/modules"}
"""Folders with one verb, or one module of Ansible, a file: they may be as long as the list of them."""


def kept() -> list[str]:
    """Return the files of the repository: those that git knows or would add, or all in a copy without git."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return [name for name in answer.stdout.splitlines() if (ROOT / name).is_file()]
    folders = ("mixtral_run", "plugins", "roles", "tests", "benchmarks", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [str(path.relative_to(ROOT)) for path in files if path.is_file() and "__pycache__" not in path.parts]


def test_the_top_of_the_package_is_one_screen() -> None:
    names = {name.split("/")[1] for name in kept() if name.startswith("mixtral_run/")}
    assert len(names - {"__init__.py", "__main__.py", "py.typed"}) <= MOST_ENTRIES


def test_no_folder_is_a_heap() -> None:
    counts = Counter(str(Path(name).parent) for name in kept() if "/" in name)
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES and folder not in ONE_A_FILE} == {}


def test_no_module_is_a_book() -> None:
    lines = {name: len((ROOT / name).read_bytes().splitlines()) for name in kept() if name.endswith(".py")}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_only_tests_of_host_modules_import_ansible() -> None:
    """Ansible replaces functions of the interpreter; torch's compiler then fails in the tests after it."""
    for name in kept():
        if name.startswith("tests/unit/") and not name.startswith("tests/unit/host/") and name.endswith(".py"):
            tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
            imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            imported |= {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
            assert not {each for each in imported if each and each.split(".")[0] == "ansible"}, name
