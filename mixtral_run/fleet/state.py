"""Where the operator's side keeps what it must remember: known host keys, plays, the fleet's hosts, jobs that run.

Everything lies in one folder under XDG state that only this user can open.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mixtral_run.errors import MixtralRunError


def state_folder(*parts: str) -> Path:
    """The state folder, or a folder inside it; made with mode 0700 where it is missing.

    Raises MixtralRunError where it cannot be made.
    """
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    folder = Path(base).joinpath("mixtral-run", *parts)
    try:
        Path(base, "mixtral-run").mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkdir leaves the mode of a folder that was there, and parents get the umask's.
        for each in (folder, Path(base, "mixtral-run")):
            each.chmod(0o700)
    except OSError as error:
        raise MixtralRunError(
            "The folder for the kit's state cannot be used.",
            where=str(folder),
            found=error.strerror,
            next_command="name another with XDG_STATE_HOME",
        ) from error
    return folder


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step, readable by this user alone."""
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
    """The value in a JSON file; `default` where there is no file or it cannot be read as JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def write_json(path: Path, value: Any) -> None:
    write_private(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
