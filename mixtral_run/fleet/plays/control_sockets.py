"""The folder of the sockets by which Ansible's connections to a host share one of SSH.

Ansible takes ~/.ansible/cp. The path of a socket has at most 107 bytes, so that in a long home folder no host can be
reached.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from mixtral_run.config.home_folder import expanded

VARIABLE = "ANSIBLE_SSH_CONTROL_PATH_DIR"
MOST_BYTES = 107
"""Bytes of a Unix socket's path on Linux, without the zero at its end (unix(7))."""
NAME_BYTES = 1 + 10 + 1 + 16
"""Bytes of a socket's name with the slash: Ansible's hash, and the ending that ssh adds while it makes the socket."""
SHORT_FOLDER = "/tmp"


def settings() -> dict[str, str]:
    """Return Ansible's setting of the folder if its own has too long a path and the user gave none, else nothing."""
    home = expanded(os.environ.get("ANSIBLE_HOME") or "~/.ansible")
    if os.environ.get(VARIABLE) or fits(home / "cp"):
        return {}
    return {VARIABLE: str(_own_folder(Path(SHORT_FOLDER) / f"mixtral-run-{os.getuid()}"))}


def fits(folder: Path) -> bool:
    """Return True if a socket in this folder has a path that Linux takes."""
    return len(os.fsencode(folder)) + NAME_BYTES <= MOST_BYTES


def _own_folder(folder: Path) -> Path:
    """Return the folder, made for this user alone, or a new one if somebody else made it or can write to it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="mixtral-run-", dir=SHORT_FOLDER))
