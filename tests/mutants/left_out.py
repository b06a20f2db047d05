"""Changes that are not tried, by kind: no test can notice them, or another check of `make check` does.

Each kind says why in KINDS. A change belongs to a kind by its place in the syntax tree and, where the place alone does
not decide, by cosmic-ray's operator.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

Position = tuple[int, int]

KINDS = {
    "annotation": "annotations are not evaluated",
    "assertion": "assertions, also `strict=True` of zip, only stop a run that is wrong already",
    "decorator": "decorators of classes and `@abstractmethod` describe a class; nothing that runs depends on them",
    "signature": "`*` and `/` between parameters: mypy checks the calls",
    "lower bound": "a length, a count, a rank or a remainder is never below 0, and a number of processes never below 1",
    "identity": "dtypes, members of an Enum and lengths below 257 exist once, so that `is` and `==` are the same",
    "flags": "flags of a call have different bits, so that `|`, `+` and `^` of two of them are the same",
    "literal": "ruff (F632) refuses `is` with a literal",
    "clock": "two readings of a clock never differ by exactly a limit",
    "time": "a limit of time from 5 s that is 1 s longer or shorter is as good",
    "buffer": "the size of a buffer or of the pieces of a copy changes no byte",
    "shown text": "the length at which a text from outside is cut in a message",
}
LONG = 5
"""Least limit of time of which 1 s is a small part."""
LONG_TEXT = 20
"""Least length of a text of which one character is a small part."""

_LENGTHS = re.compile(r"(len\(.*\)|.*\.(numel|count|dim)\(.*\)|.*\.(st_size|ndim)|.* % .*)\Z", re.DOTALL)
_COUNTS = re.compile(r"(.*\.)?_?(num_\w+|rank|\w+_rank)(\(\))?\Z")
_GROUPS = re.compile(r"(.*\.)?(world_size|num_ranks|(tensor|expert|data|context)_size|(get_world_)?size\(\w*\))\Z")
_CLOCK = re.compile(r"\b(monotonic|time\.time|perf_counter)\(\)|\bnow\b")
_TIMES = re.compile(r"(.*_)?(timeout|seconds)\Z", re.IGNORECASE)
_MEMBER = re.compile(r"(\w+\.)*_?[A-Z]\w*\.[A-Z][A-Z0-9_]*\Z")
_DTYPE = re.compile(r"(.*[._])?dtype\Z|torch\.(bfloat16|float\w+|u?int\d+|uint8)\Z")
_IDENTITY = frozenset({"Eq_Is", "Is_Eq", "NotEq_IsNot", "IsNot_NotEq"})
_ENDS = frozenset({"Gt_GtE", "GtE_Gt", "Lt_LtE", "LtE_Lt"})
_SUM_OF_FLAGS = frozenset({"BitOr_Add", "BitOr_BitXor"})
_AT_BOUND = frozenset({"Eq_LtE", "LtE_Eq", "NotEq_Gt", "Gt_NotEq"})


@dataclass(frozen=True)
class Place:
    """A part of a file. changes: those of an operator there that belong to the kind; None: all changes."""

    kind: str
    first: Position
    last: Position
    changes: frozenset[str] | None = None

    def holds(self, position: Position, operator: str) -> bool:
        """Return True if a change of cosmic-ray at a position belongs here."""
        inside = self.first <= position < self.last
        return inside and (self.changes is None or operator.rpartition("Operator_")[2] in self.changes)


def places_of(text: str) -> list[Place]:
    """Return the places of a module that belong to a kind."""
    tree = ast.parse(text)
    return [place for node in ast.walk(tree) for place in (*_whole(node, text), *_comparisons(node), *_numbers(node))]


def kind_of(places: list[Place], position: Position, operator: str) -> str | None:
    """Return the kind of a change, None if it is to be tried."""
    return next((each.kind for each in places if each.holds(position, operator)), None)


def _around(kind: str, node: ast.AST, before: int = 0) -> Place:
    first = (node.lineno, node.col_offset - before)  # type: ignore[attr-defined]
    return Place(kind, first, (node.end_lineno, node.end_col_offset))  # type: ignore[attr-defined]


def _whole(node: ast.AST, text: str) -> Iterator[Place]:
    """Yield places in which every change belongs to a kind."""
    if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
        yield _around("annotation", node.annotation)
    elif isinstance(node, ast.FunctionDef):
        if node.returns is not None:
            yield _around("annotation", node.returns)
        # cosmic-ray counts the @ as part of a decorator.
        yield from (_around("decorator", each, 1) for each in node.decorator_list if _is(each, "abstractmethod"))
        yield from _markers(node, text)
    elif isinstance(node, ast.ClassDef):
        yield from (_around("decorator", each, 1) for each in node.decorator_list)
    elif isinstance(node, ast.Assert) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        yield _around("assertion", node)
    elif isinstance(node, ast.Call):
        if _is(node.func, "zip"):
            yield from (_around("assertion", each.value) for each in node.keywords if each.arg == "strict")
        if _is(node.func, "copyfileobj"):
            yield from (_around("buffer", each) for each in node.args[2:])
        yield from (_around("buffer", each.value) for each in node.keywords if each.arg == "buffering")


def _is(node: ast.AST, name: str) -> bool:
    return ast.unparse(node).rpartition(".")[2] == name


def _markers(node: ast.FunctionDef, text: str) -> Iterator[Place]:
    """Yield the lines' places of `*` and `/` that stand alone between the parameters."""
    arguments = node.args
    alone = bool(arguments.kwonlyargs) and arguments.vararg is None
    if not alone and not arguments.posonlyargs:
        return
    lines = text.splitlines()
    end = node.returns or node.body[0]
    for number in range(node.lineno, end.lineno + 1):
        for found in re.finditer(r"(?<=[(,\s])[*/](?=[,)])", lines[number - 1]):
            if (number, found.start()) < (end.lineno, end.col_offset):
                yield Place("signature", (number, found.start()), (number, found.end()))


def _comparisons(node: ast.AST) -> Iterator[Place]:
    """Yield the places of operators of a comparison or of flags, with the changes that are the same."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and _are_flags(node):
        yield Place("flags", *_between(node.left, node.right), _SUM_OF_FLAGS)
    if not isinstance(node, ast.Compare):
        return
    for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
        for kind, changes in _same_comparisons(left, right):
            yield Place(kind, *_between(left, right), changes)


def _between(left: ast.expr, right: ast.expr) -> tuple[Position, Position]:
    return (left.end_lineno or 0, left.end_col_offset or 0), (right.lineno, right.col_offset)


def _are_flags(node: ast.expr) -> bool:
    """Return True for `os.O_RDWR | os.O_CREAT` and the like."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitOr) and _are_flags(node.left) and _are_flags(node.right)
    return isinstance(node, ast.Attribute) and node.attr.isupper()


def _same_comparisons(left: ast.expr, right: ast.expr) -> Iterator[tuple[str, frozenset[str]]]:
    texts = [ast.unparse(each) for each in (left, right)]
    constants = [each.value for each in (left, right) if isinstance(each, ast.Constant)]
    if isinstance(right, ast.Constant) and type(right.value) is int and _lowest(texts[0]) == right.value:
        yield "lower bound", _AT_BOUND
    if any(_MEMBER.match(each) or _DTYPE.match(each) or each.startswith(("type(", "len(")) for each in texts):
        yield "identity", _IDENTITY
    if any(isinstance(each, str | bytes) for each in constants):
        yield "literal", _IDENTITY
    if any(_CLOCK.search(each) for each in texts):
        yield "clock", _ENDS


def _lowest(text: str) -> int | None:
    """Return the lowest value that an expression can have, None if that is not known."""
    if _GROUPS.match(text):
        return 1
    return 0 if _COUNTS.match(text) or _LENGTHS.match(text) else None


def _numbers(node: ast.AST) -> Iterator[Place]:
    """Yield the places of numbers that are limits of time, or lengths of texts in messages."""
    for value in _times(node):
        if isinstance(value, ast.Constant) and isinstance(value.value, int | float) and value.value >= LONG:
            yield _around("time", value)
    is_message = isinstance(node, ast.FormattedValue) or (
        isinstance(node, ast.Call) and re.search(r"(Error|\.(say|warn|log))\Z", ast.unparse(node.func)) is not None
    )
    for each in ast.walk(node) if is_message else ():
        upper = each.upper if isinstance(each, ast.Slice) else None
        if isinstance(upper, ast.Constant) and isinstance(upper.value, int) and upper.value >= LONG_TEXT:
            yield _around("shown text", upper)


def _times(node: ast.AST) -> Iterator[ast.AST | None]:
    """Yield what a name gives as a limit of time, or what is compared with a clock."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    named = [node.arg or ""] if isinstance(node, ast.keyword) else [ast.unparse(each) for each in targets]
    if isinstance(node, ast.keyword | ast.Assign | ast.AnnAssign) and any(map(_TIMES.match, named)):
        yield node.value
    elif isinstance(node, ast.Compare) and _CLOCK.search(ast.unparse(node.left)):
        yield node.comparators[0]
    elif isinstance(node, ast.FunctionDef):
        arguments = node.args
        names = [*arguments.posonlyargs, *arguments.args][::-1]
        pairs = [
            *zip(names, arguments.defaults[::-1], strict=False),
            *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
        ]
        yield from (value for name, value in pairs if _TIMES.match(name.arg))
