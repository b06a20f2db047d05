"""`make mutants` changes in memory what a changed file would do, and the tests of a line are all that run it."""

from __future__ import annotations

import importlib.util
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.mutants import warm
from tests.mutants.left_out import KINDS, kind_of, places_of
from tests.mutants.swap import MOST_EVENTS, LineTrace, exchange, exchange_values, functions_of, statement_lines
from tests.mutants.warm import runs_product

TEXT = """import functools

LIMIT = 3
OTHER = 2 * LIMIT


def plain(value, more=1):
    if value > 2:
        value = sum(
            each + more
            for each in range(value)
        )
    return value


class Kind:
    size = 4

    def method(self):
        return [self.size + each for each in (1, 2)]


@functools.cache
def cached():
    return LIMIT


def loop(count):
    for _ in range(count):
        pass
"""


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ModuleType]:
    path = tmp_path / "changed_in_memory.py"
    path.write_text(TEXT)
    spec = importlib.util.spec_from_file_location("changed_in_memory", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["changed_in_memory"] = found
    spec.loader.exec_module(found)
    yield found
    del sys.modules["changed_in_memory"]


def changed(module: Any, old: str, new: str) -> bool:
    """Change a text in the file and exchange functions."""
    assert TEXT.count(old) == 1
    path = Path(module.__file__)
    after = TEXT.replace(old, new)
    path.write_text(after)
    return exchange(path, TEXT, after, functions_of(frozenset({str(path)}))[str(path)])


def test_bodies_of_functions_and_methods_are_exchanged_wherever_they_are_held(module: Any) -> None:
    held, kind = module.plain, module.Kind()
    assert held(3) == 6 and kind.method() == [5, 6]
    assert changed(module, "each + more", "each - more") and held(3) == 0
    assert changed(module, "self.size + each", "self.size * each") and kind.method() == [4, 8]
    # A change in a decorated function reaches the one within.
    assert changed(module, "return LIMIT", "return -LIMIT") and module.cached() == -3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("size = 4", "size = 5"),
        ("more=1", "more=2"),
        ("@functools.cache\n", ""),
        ("import functools\n", "import functools\nimport sys\n"),
    ],
)
def test_what_runs_at_import_is_not_taken_for_a_body(module: Any, old: str, new: str) -> None:
    assert not changed(module, old, new)


def test_constants_and_defaults_are_exchanged_in_all_modules(module: Any) -> None:
    other = ModuleType("imports_it")
    other.LIMIT = module.LIMIT = limit = 3000  # type: ignore[attr-defined]
    sys.modules["imports_it"] = other
    try:
        path, held = Path(module.__file__), module.plain
        path.write_text(TEXT.replace("LIMIT = 3", "LIMIT = 5"))
        assert limit == 3000 and exchange_values(path, 3, TEXT)
        assert (other.LIMIT, module.LIMIT, module.OTHER) == (5, 5, 10)  # type: ignore[attr-defined]
        path.write_text(TEXT.replace("more=1", "more=2"))
        assert exchange_values(path, 7, TEXT) and held(3) == 9 and module.plain is held
        for line in (1, 16, 23):  # an import, a class, a decorator
            assert not exchange_values(path, line, TEXT)
    finally:
        del sys.modules["imports_it"]


def test_the_lines_of_a_statement() -> None:
    lines = {number: statement_lines(TEXT, number) for number in (3, 7, 8, 10, 13, 20, 29)}
    assert {number: (found.start, found.stop - 1) for number, found in lines.items()} == {
        3: (3, 3), 7: (7, 7), 8: (8, 8), 10: (9, 12), 13: (13, 13), 20: (20, 20), 29: (29, 29),
    }  # fmt: skip


def test_the_lines_that_run(module: Any) -> None:
    trace = LineTrace(frozenset({module.__file__}))
    trace.start()
    module.plain(1)
    trace.stop()
    assert {line for _, line in trace.current} == {8, 13}
    module.plain(5)
    assert len(trace.current) == 2
    trace.start()
    module.loop(MOST_EVENTS)
    module.plain(3)
    trace.stop()
    assert trace.num_events == MOST_EVENTS + 1 and not any(line == 10 for _, line in trace.current)


def test_programs_that_may_run_code_of_the_product() -> None:
    """Of a program in a shell no line is changed: its test runs only where it runs the line itself."""
    assert runs_product((sys.executable, [sys.executable, "-m", "x"], None, {}))
    assert runs_product(("/bin/sh", ["sh", "-c", "exec python3 x"], None, None))
    assert not runs_product(("docker", ["docker", "run", "mixtral-run-model"], None, {"A": "python"}))


LEFT_OUT = """def one(number: int | None, *, seconds=30, rank=0, limit=30) -> int | str:
    assert number > 2
    if len(names) == 0 or rank > 0 or limit > 0:
        pairs = list(zip(a, b, strict=True))
    if x.dtype is torch.float32 or kind == "text" or kind is other:
        raise ConfigError(f"bad", found=text[:200])
    if time.monotonic() - began > 60 or total > 60:
        call(timeout=10, size=10, other=text[:200], pause_seconds=2)
        shutil.copyfileobj(open(p, buffering=0), file, 1 << 20)
    return number | 2, os.open(p, os.O_RDWR | os.O_CREAT)


class Kind:
    @abstractmethod
    def two(self, first, /, second): ...

    @functools.cache
    def three(self, *rest): ...


MOST_SECONDS = 600.0
MOST_BYTES = 600
"""


@pytest.mark.parametrize(
    ("line", "part", "operator", "kind"),
    [
        (1, "| None", "ReplaceBinaryOperator_BitOr_Add", "annotation"),
        (1, "| str", "ReplaceBinaryOperator_BitOr_Add", "annotation"),
        (1, "*,", "ReplaceBinaryOperator_Mul_Div", "signature"),
        (1, "30, rank", "NumberReplacer", "time"),
        (1, "0, limit", "NumberReplacer", None),
        (1, "30)", "NumberReplacer", None),
        (2, "> 2", "ReplaceComparisonOperator_Gt_Lt", "assertion"),
        (3, "== 0", "ReplaceComparisonOperator_Eq_LtE", "lower bound"),
        (3, "== 0", "ReplaceComparisonOperator_Eq_GtE", None),
        (3, "0 or rank", "NumberReplacer", None),
        (3, "> 0 or limit", "ReplaceComparisonOperator_Gt_NotEq", "lower bound"),
        (3, "> 0:", "ReplaceComparisonOperator_Gt_NotEq", None),
        (4, "True", "ReplaceTrueWithFalse", "assertion"),
        (5, "is torch", "ReplaceComparisonOperator_Is_Eq", "identity"),
        (5, "is torch", "ReplaceComparisonOperator_Is_IsNot", None),
        (5, "== ", "ReplaceComparisonOperator_Eq_Is", "literal"),
        (5, "== ", "ReplaceComparisonOperator_Eq_GtE", None),
        (5, "is other", "ReplaceComparisonOperator_Is_Eq", None),
        (6, "200", "NumberReplacer", "shown text"),
        (7, "> 60 or", "ReplaceComparisonOperator_Gt_GtE", "clock"),
        (7, "> 60 or", "ReplaceComparisonOperator_Gt_Lt", None),
        (7, "60 or", "NumberReplacer", "time"),
        (7, "> 60:", "ReplaceComparisonOperator_Gt_GtE", None),
        (7, "60:", "NumberReplacer", None),
        (8, "10, size", "NumberReplacer", "time"),
        (8, "10, other", "NumberReplacer", None),
        (8, "200", "NumberReplacer", None),
        (8, "2)", "NumberReplacer", None),
        (9, "0)", "NumberReplacer", "buffer"),
        (9, "<<", "ReplaceBinaryOperator_LShift_Add", "buffer"),
        (10, "| os", "ReplaceBinaryOperator_BitOr_Add", "flags"),
        (10, "| os", "ReplaceBinaryOperator_BitOr_BitAnd", None),
        (10, "| 2", "ReplaceBinaryOperator_BitOr_Add", None),
        (14, "@", "RemoveDecorator", "decorator"),
        (15, "/,", "ReplaceBinaryOperator_Div_Mul", "signature"),
        (17, "@", "RemoveDecorator", None),
        (18, "*rest", "ReplaceBinaryOperator_Mul_Div", None),
        (21, "600", "NumberReplacer", "time"),
        (22, "600", "NumberReplacer", None),
    ],
)  # fmt: skip
def test_changes_that_are_left_out(line: int, part: str, operator: str, kind: str | None) -> None:
    column = LEFT_OUT.splitlines()[line - 1].index(part)
    assert kind_of(places_of(LEFT_OUT), (line, column), f"core/{operator}") == kind
    assert kind is None or kind in KINDS


@pytest.mark.parametrize(("most", "expected"), [(100, 43), (40, 40), (resource.RLIM_INFINITY, 43)])
def test_a_test_that_becomes_endless_is_ended_by_its_own_limit(
    monkeypatch: pytest.MonkeyPatch, most: int, expected: int
) -> None:
    """32.5 s were used; the test may take 10 s more, in whole seconds, within the limit of all tests."""
    limits: list[Any] = []
    monkeypatch.setattr(warm.resource, "getrusage", lambda _: SimpleNamespace(ru_utime=30.0, ru_stime=2.5))
    monkeypatch.setattr(warm.resource, "getrlimit", lambda _: (5, most))
    monkeypatch.setattr(warm.resource, "setrlimit", lambda *given: limits.append(given))
    warm.limit_cpu(10.0)
    assert limits == [(resource.RLIMIT_CPU, (expected, most))]
