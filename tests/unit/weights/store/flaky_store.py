"""STAND-IN for an object store: fsspec's store in memory, which fails when a test says so, and records its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from mixtral_run.weights.store.folder import StoreFolder

Hook = Callable[[str, str], None]


def no_fault(what: str, path: str) -> None:
    """Let every call through."""


class FlakyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """calls: (what, object) of everything that was asked. hook: called before each, and may raise."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store = {}
        self.pseudo_dirs = [""]
        self.calls: list[tuple[str, str]] = []
        self.hook: Hook = no_fault

    def _asked(self, what: str, path: str) -> None:
        self.calls.append((what, path))
        self.hook(what, path)

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "wb":
            self._asked("write", path)
        return super()._open(path, mode=mode, **more)

    def cat_file(self, path: str, *words: Any, **more: Any) -> Any:
        self._asked("read", path)
        return super().cat_file(path, *words, **more)

    def find(self, path: str, *words: Any, **more: Any) -> Any:
        self._asked("list", path)
        return super().find(path, *words, **more)

    def rm_file(self, path: str) -> None:
        self._asked("remove", path)
        super().rm_file(path)

    def written(self) -> list[str]:
        """Return the last parts of the names of the objects that were written, in their order."""
        return [path.removeprefix("/bucket/run/") for what, path in self.calls if what == "write"]


def flaky_store() -> tuple[StoreFolder, FlakyFileSystem]:
    """Return an empty store's folder, and its file system."""
    fs = FlakyFileSystem()
    return StoreFolder(fs, "/bucket/run", "s3://bucket/run"), fs
