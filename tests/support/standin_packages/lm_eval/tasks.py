"""STAND-IN for lm-eval's tasks: those of tasks.json in a folder, by name, each a list of requests by their kind."""

import json
from pathlib import Path
from typing import Any


class TaskManager:
    """The tasks of a folder."""

    def __init__(
        self,
        verbosity: str | None = None,
        include_path: str | Path | list[str | Path] | None = None,
        include_defaults: bool = True,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.found: dict[str, dict[str, list[Any]]] = {}
        if isinstance(include_path, (str, Path)):
            self.found = json.loads((Path(include_path) / "tasks.json").read_text())

    @property
    def all_tasks(self) -> list[str]:
        return sorted(self.found)
