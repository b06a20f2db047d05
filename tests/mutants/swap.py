"""Exchange the code of functions that are already imported, and find the tests that run a line."""

from __future__ import annotations

import ast
import dis
import gc
import importlib.util
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

Lines = set[tuple[str, int]]
MOST_EVENTS = 100_000
"""Lines that are recorded of one test. One that runs more is taken to run every line."""


class LineTrace:
    """Records which lines of some files run.

    current: the lines since it was last emptied. num_events: how often one ran since it was last set to zero.
    """

    def __init__(self, files: frozenset[str]) -> None:
        self.current: Lines = set()
        self.num_events = 0
        self._files = files

    def start(self) -> None:
        threading.settrace(self._called)
        sys.settrace(self._called)

    def stop(self) -> None:
        threading.settrace(None)  # type: ignore[arg-type]
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.current.add((frame.f_code.co_filename, frame.f_lineno))
            self.num_events += 1
            if self.num_events > MOST_EVENTS:
                self.stop()
                return None
        return self._line


def statement_lines(text: str, line: int) -> range:
    """Return the lines of the innermost statement around a line: of a compound one, those before its body."""
    best = range(line, line + 1)
    width = sys.maxsize
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
            continue
        first = getattr(node, "lineno", 0) or node.pattern.lineno  # type: ignore[union-attr]
        body = getattr(node, "body", None)
        last = max(first, body[0].lineno - 1) if body else node.end_lineno or first  # type: ignore[union-attr]
        if first <= line <= last and last - first < width:
            best, width = range(first, last + 1), last - first
    return best


def functions_of(files: frozenset[str]) -> dict[str, list[FunctionType]]:
    """Return all functions of files that are in memory."""
    found: dict[str, list[FunctionType]] = {each: [] for each in files}
    for each in gc.get_objects():
        if isinstance(each, FunctionType) and each.__code__.co_filename in files:
            found[each.__code__.co_filename].append(each)
    return found


def exchange(file: Path, before: str, after: str, functions: list[FunctionType]) -> bool:
    """Give the functions of a module the code of its changed text.

    Returns:
        False if that cannot be done: what has changed runs when the module is imported, or is no function in memory.
    """
    old, new = (compile(each, str(file), "exec", dont_inherit=True) for each in (before, after))
    if not _same_when_imported(old, new):
        return False
    old_codes, new_codes = (dict(_functions_in(each)) for each in (old, new))
    if set(old_codes) != set(new_codes):
        return False
    changed = {name for name in old_codes if not _same(old_codes[name], new_codes[name])}
    if not changed:
        return False
    done = set()
    for function in functions:
        names = [name for name in old_codes if old_codes[name] == function.__code__]
        for name in names:
            if name in changed:
                if function.__code__.co_freevars != new_codes[name].co_freevars:
                    return False
                function.__code__ = new_codes[name]
                done.add(name)
    return done == changed


def exchange_values(file: Path, line: int, before: str) -> bool:
    """Give a module that is imported, and those that imported from it, the values that its changed text assigns.

    Returns:
        False if that cannot be done: what has changed is no assignment at the module's own level, and no default of a
        function there. Raises what the changed text raises when it is imported.
    """
    module = next((each for each in list(sys.modules.values()) if getattr(each, "__file__", None) == str(file)), None)
    statement = next((each for each in ast.parse(before).body if each.lineno <= line <= (each.end_lineno or 0)), None)
    if module is None or not isinstance(statement, ast.Assign | ast.AnnAssign | ast.FunctionDef):
        return False
    if isinstance(statement, ast.FunctionDef) and statement.decorator_list:
        return False
    spec = importlib.util.spec_from_file_location(module.__name__, file)
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    space = vars(again)
    if isinstance(statement, ast.FunctionDef):
        old, new = vars(module)[statement.name], space[statement.name]
        old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
        return True
    plain = {name: value for name, value in space.items() if not isinstance(value, type | FunctionType | ModuleType)}
    changed = {
        name: (vars(module)[name], value)
        for name, value in plain.items()
        if not name.startswith("__") and name in vars(module) and repr(vars(module)[name]) != repr(value)
    }
    for each in list(sys.modules.values()):
        for name, (old, new) in changed.items():
            if getattr(each, "__dict__", {}).get(name) is old:
                setattr(each, name, new)
    return bool(changed)


def _same_when_imported(old: CodeType, new: CodeType) -> bool:
    """Return True if two modules or classes differ in nothing but the bodies of their functions."""
    if _instructions(old) != _instructions(new):
        return False
    ours, theirs = (
        [each for each in code.co_consts if isinstance(each, CodeType) and not each.co_flags & inspect.CO_OPTIMIZED]
        for code in (old, new)
    )
    return len(ours) == len(theirs) and all(_same_when_imported(*each) for each in zip(ours, theirs, strict=True))


def _functions_in(code: CodeType, seen: Counter[str] | None = None) -> Iterator[tuple[str, CodeType]]:
    """Yield the functions that a module makes when it is imported, each with a name that only it has."""
    seen = Counter() if seen is None else seen
    for each in code.co_consts:
        if not isinstance(each, CodeType):
            continue
        if each.co_flags & inspect.CO_OPTIMIZED:
            seen[each.co_qualname] += 1
            yield f"{each.co_qualname} {seen[each.co_qualname]}", each
        else:
            yield from _functions_in(each, seen)


def _instructions(code: CodeType) -> list[tuple[str, object]]:
    """Return what a code does, without the codes of what it defines."""
    return [
        (each.opname, each.argval.co_qualname if isinstance(each.argval, CodeType) else repr(each.argval))
        for each in dis.get_instructions(code)
    ]


def _same(old: CodeType, new: CodeType) -> bool:
    if _instructions(old) != _instructions(new):
        return False
    ours, theirs = ([each for each in code.co_consts if isinstance(each, CodeType)] for code in (old, new))
    return len(ours) == len(theirs) and all(_same(*each) for each in zip(ours, theirs, strict=True))
