"""Empty modules in place of packages that a rival imports and that this measurement does not call.

axolotl imports wandb, evaluate and others when it starts. They are for logging, metrics and telemetry: a step of
training calls none of them. Whatever is called of such a module raises, so that no figure comes from a placeholder.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Placeholder(types.ModuleType):
    """A module whose every public attribute is a class that cannot be made."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _unavailable(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class _Unavailable(type):
    """The class of such attributes: their own attributes are of the same kind."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _unavailable(f"{cls.__name__}.{name}")


def _unavailable(name: str) -> type:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"{name} is a placeholder of benchmarks/rivals: it must not be called")

    return _Unavailable(name, (), {"__new__": refuse})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        self.used: set[str] = set()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if fullname.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        self.used.add(spec.name.split(".")[0])
        return Placeholder(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def placeholders(*names: str) -> Iterator[set[str]]:
    """While this lasts, importing those of the packages that are not installed gives empty modules.

    Yields the names of the packages that were replaced so far. Code that was imported keeps its references.
    """
    finder = _Finder([name for name in names if importlib.util.find_spec(name) is None])
    sys.meta_path.append(finder)
    try:
        yield finder.used
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in finder.names]:
            del sys.modules[name]
