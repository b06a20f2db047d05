"""The identity of the kit that made a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import mixtral_run
from mixtral_run.results.kit import Kit, kit_in


def git(folder: Path, *words: str) -> str:
    settings = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *settings, "-C", folder, *words], check=True, capture_output=True, text=True).stdout


def test_the_commit_of_a_checkout_and_its_changes(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "one")
    commit = (tmp_path / ".git" / git(tmp_path, "symbolic-ref", "HEAD").strip()).read_text().strip()
    assert kit_in(tmp_path) == Kit(mixtral_run.__version__, commit, modified=False)
    (tmp_path / "b.py").write_text("not tracked")
    assert kit_in(tmp_path).modified is False
    (tmp_path / "a.py").write_text("2")
    assert kit_in(tmp_path).modified is True
    assert str(kit_in(tmp_path)) == f"mixtral-run {mixtral_run.__version__}, commit {commit[:12]} with changes"


def test_a_repository_around_the_installed_package_is_not_the_kits(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "site-packages").mkdir()
    assert kit_in(tmp_path / "site-packages") == Kit(mixtral_run.__version__)


def test_a_damaged_repository_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: /nowhere\n")
    assert kit_in(tmp_path) == Kit(mixtral_run.__version__)
