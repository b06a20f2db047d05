"""Which kit made a run: its version, and in a checkout the commit."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import mixtral_run

_SECONDS = 10


@dataclass(frozen=True)
class Kit:
    """Identity of the running kit.

    commit: of the checkout; None for an installed wheel, or if git cannot tell.
    modified: True if tracked files differ from the commit; None without a commit.
    """

    version: str
    commit: str | None = None
    modified: bool | None = None

    def __str__(self) -> str:
        commit = f", commit {self.commit[:12]}" if self.commit else ""
        return f"mixtral-run {self.version}{commit}{' with changes' if self.modified else ''}"


def this_kit() -> Kit:
    """Return the identity of the running kit. Never raises."""
    return kit_in(Path(mixtral_run.__file__).parents[1])


def kit_in(root: Path) -> Kit:
    """Return the identity of a kit whose package is in `root`."""
    # Only the kit's own repository counts, and not one around the folder of installed packages.
    if not (root / ".git").exists():
        return Kit(mixtral_run.__version__)
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return Kit(mixtral_run.__version__)
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return Kit(mixtral_run.__version__, commit, None if changes is None else bool(changes))


def _git(root: Path, *words: str) -> str | None:
    """Return what git prints; None if it fails."""
    argv = ["git", "--no-optional-locks", "-C", str(root), *words]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
