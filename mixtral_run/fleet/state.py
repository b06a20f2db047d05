"""State of the operator's side: known host keys, plays, the hosts of the fleet, recorded failures.

All state is in one folder under XDG_STATE_HOME that only this user can open.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mixtral_run.errors import MixtralRunError


def state_folder(*parts: str) -> Path:
    """Return the state folder or a folder inside it. A missing folder is created with mode 0700.

    Raises MixtralRunError if the folder cannot be created.
    """
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    folder = Path(base).joinpath("mixtral-run", *parts)
    try:
        Path(base, "mixtral-run").mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkdir keeps the mode of an existing folder and gives parents the mode of the umask.
        for each in (folder, Path(base, "mixtral-run")):
            each.chmod(0o700)
    except OSError as error:
        raise MixtralRunError(
            "The state folder of the kit cannot be used.",
            where=str(folder),
            found=error.strerror,
            next_command="set XDG_STATE_HOME to another folder",
        ) from error
    return folder


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically. Only this user can read it."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path, default: Any) -> Any:
    """Return the value in a JSON file, or `default` if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def write_json(path: Path, value: Any) -> None:
    """Replace a file atomically with a value as JSON. Only this user can read it."""
    write_private(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
