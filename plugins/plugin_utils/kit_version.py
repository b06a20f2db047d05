"""The version of the kit: in a checkout with its commit, in an installed collection, or in a wheel."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def kit_version() -> str:
    """Return the version of the kit, with `+` and the commit if this is a checkout; empty if it is unknown."""
    return f"{_version()}{_commit()}"


def _version() -> str:
    for file in (ROOT / "galaxy.yml", ROOT / "MANIFEST.json"):
        if file.is_file() and (found := re.search(r'"?\bversion"?: "?(\d[\w.+-]*)', file.read_text(encoding="utf-8"))):
            return found[1]
    try:
        return importlib.metadata.version("mixtral-run")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    # A copy inside a repository of others has no commit of its own.
    if not (ROOT / ".git").exists():
        return ""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"+{answer.stdout.strip()}" if answer.returncode == 0 else ""
