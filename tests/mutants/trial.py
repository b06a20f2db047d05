"""Try the changes of one room."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.mutants.rooms import Mutant, applied, copy_tree, modules_of, sample_of, tests_of
from tests.mutants.swap import LineTrace, statement_lines
from tests.mutants.warm import Baseline, Change, Recorder, Server, collect, in_fork

BASELINE_SECONDS = 900
"""Longest run of all tests of a room without a change. It records lines, which makes it several times slower."""
START_SECONDS = 60
"""Time that a pytest may take to start and collect."""


@dataclass
class Room:
    """One room while it is tried. alone: whether a test passes alone without a change."""

    name: str
    copy: Path
    folder: Path
    tests: list[str]
    server: Server
    baseline: Baseline
    alone: dict[str, bool] = field(default_factory=dict)


def try_room(name: str, folder: Path, number: int, seed: int, end: float, share: float) -> tuple[int, int, list[str]]:
    """Try a sample of a room's changes, for a share of the time that is left after a run without a change.

    Returns:
        Numbers of possible and of tried changes, and those that no test noticed.
    """
    copy = folder.resolve() / "tree"
    copy_tree(copy)
    sample, possible = sample_of(name, copy, number, seed)
    tests = tests_of(name)
    files = frozenset(str(each) for each in modules_of(name, copy))
    with _Cold(copy, tests, folder) as cold:
        trace = LineTrace(files)
        result: list[Any] = [possible, 0, []]

        def ask(server: Server) -> None:
            baseline = _baseline(server, trace, folder)
            room = Room(name, copy, folder, tests, server, baseline)
            until = time.monotonic() + (end - time.monotonic()) * share
            _try_sample(room, sample, cold, until, result)

        report = os.dup(1)
        cold.report = report
        trace.start()
        code = collect(copy, tests, [Server(ask, trace, files)], folder / "output.txt")
        if code not in (0, 5):
            text = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            _say(report, f"{name}: pytest failed without a change:\n{text[-2000:]}")
    return result[0], result[1], result[2]


def _say(report: int, text: str) -> None:
    os.write(report, f"{text}\n".encode())


def _baseline(server: Server, trace: LineTrace, folder: Path) -> Baseline:
    """Run all tests without a change, in a fork."""

    def work() -> object:
        baseline = Baseline()
        server.run(list(server.items), Recorder(baseline, trace))
        return {
            "lines": {name: sorted(lines) for name, lines in baseline.lines.items()},
            "seconds": baseline.seconds,
            "opaque": sorted(baseline.opaque),
            "failed": baseline.failed,
        }

    imported = set(trace.current)
    text, _ = in_fork(work, folder, BASELINE_SECONDS, BASELINE_SECONDS)
    if text is None:
        raise RuntimeError(f"the tests did not end within {BASELINE_SECONDS} seconds without a change")
    found = json.loads(text)
    lines = {name: {(file, line) for file, line in each} for name, each in found["lines"].items()}
    return Baseline(lines, found["seconds"], imported, set(found["opaque"]), found["failed"])


def _try_sample(room: Room, sample: Sequence[Mutant], cold: _Cold, until: float, result: list[Any]) -> None:
    baseline, report = room.baseline, cold.report
    # Recording lines makes tests slow; some have a limit of time.
    baseline.failed = [each for each in baseline.failed if not _passes_alone(room, each)]
    _say(
        report,
        f"{room.name}: {result[0]:,} possible, {len(baseline.lines)} tests, {sum(baseline.seconds.values()):.0f} s",
    )
    for each in baseline.failed:
        _say(report, f"  fails without a change, left out: {each}")
    num_late = 0
    for mutant in sample:
        if time.monotonic() > until:
            break
        path = room.copy / mutant.module
        before = path.read_text(encoding="utf-8")
        with applied(mutant, room.copy) as change:
            if change is None:
                continue
            failed, late = _noticed_by(
                room, mutant, (path, mutant.line, before, path.read_text(encoding="utf-8")), cold
            )
            result[1] += 1
            num_late += late
            if not failed and not late:
                result[2].append(f"{mutant.describe()}: {change}")
                _say(report, f"  survived: {result[2][-1]}")
    noticed = result[1] - len(result[2])
    _say(report, f"{room.name}: {noticed} of {result[1]} noticed, {num_late} of them by a limit")


def _noticed_by(room: Room, mutant: Mutant, change: Change, cold: _Cold) -> tuple[str, bool]:
    """Return the first test that fails with a change, "" if none does, and whether a limit ended the run."""
    path, _, before, _ = change
    changed = {(str(path), each) for each in statement_lines(before, mutant.line)}
    at_import = bool(changed & room.baseline.imported)
    left_out = set(room.baseline.failed)
    while True:
        names = _tests_near(room, path, left_out) if at_import else _tests_for(room, changed, str(path), left_out)
        if not names:
            return "", False
        failed, late = _in_warm(room, names, change)
        if failed is None or (at_import and not failed and not late):
            # A value that was exchanged may have been used in another module before.
            names = _tests_near(room, path, left_out)
            failed, late = cold.run(names, *_limits(room, names))
        if late or not failed or _passes_alone(room, failed):
            return failed or "", late
        # It depends on other tests, and fails without a change.
        left_out.add(failed)


def _tests_for(room: Room, changed: set[tuple[str, int]], file: str, left_out: set[str]) -> list[str]:
    """Return the tests that run these lines, and those of which that is not known."""
    lines, opaque = room.baseline.lines, room.baseline.opaque
    found = [name for name, each in lines.items() if name not in left_out and (each & changed or name in opaque)]
    return _ranked(room, found, {file})


def _tests_near(room: Room, path: Path, left_out: set[str]) -> list[str]:
    """Return the tests for what a module does when it is imported, and for its constants and classes.

    They run a line of the module or of one that names it, or stand in a file that names it.
    """

    def names_it(file: Path) -> bool:
        return re.search(rf"\b{path.stem}\b", file.read_text(encoding="utf-8")) is not None

    near = {str(each) for each in modules_of(room.name, room.copy) if each == path or names_it(each)}
    files = {name: name.split("::")[0] for name in room.baseline.lines if name not in left_out}
    naming = {each for each in set(files.values()) if names_it(room.copy / each)}
    opaque = room.baseline.opaque
    found = [
        name
        for name, file in files.items()
        if file in naming or name in opaque or any(each in near for each, _ in room.baseline.lines[name])
    ]
    return _ranked(room, found, {str(path)})


def _ranked(room: Room, names: Sequence[str], files: set[str]) -> list[str]:
    """Return the tests in order: those that run a line of the files come first, and slow ones last."""

    def rank(name: str) -> tuple[bool, float]:
        return not any(each in files for each, _ in room.baseline.lines[name]), room.baseline.seconds[name]

    return sorted(names, key=rank)


def _limits(room: Room, names: Sequence[str]) -> tuple[float, int]:
    seconds = sum(room.baseline.seconds[each] for each in names)
    return 30 + 6 * seconds, int(10 + 3 * seconds)


def _in_warm(room: Room, names: Sequence[str], change: Change | None) -> tuple[str | None, bool]:
    """Run tests in a fork of the collected pytest. Return None if the change cannot be made there."""
    seconds, cpu_seconds = _limits(room, names)
    alone = room.baseline.seconds
    text, late = in_fork(lambda: room.server.first_failure(names, change, alone), room.folder, seconds, cpu_seconds)
    return ("the process ended" if text is None else json.loads(text)), late


def _passes_alone(room: Room, name: str) -> bool:
    """Return True if a test passes alone without a change; also for what is no test."""
    if name not in room.server.items:
        return True
    if name not in room.alone:
        failed, late = _in_warm(room, [name], None)
        room.alone[name] = not failed and not late
    return room.alone[name]


class _Cold:
    """A process that has imported nothing of the product. It forks a pytest for a change of what runs at import."""

    def __init__(self, copy: Path, tests: Sequence[str], folder: Path) -> None:
        self.report = 1
        self._copy, self._tests, self._folder = copy, tests, folder / "cold"
        self._folder.mkdir()

    def __enter__(self) -> _Cold:
        asked, self._ask = os.pipe()
        self._answers, answer = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            with contextlib.suppress(BaseException):
                os.close(self._ask)
                self._serve(asked, answer)
            os._exit(0)
        os.close(asked)
        os.close(answer)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ask)
        os.waitpid(self._child, 0)

    def run(self, names: Sequence[str], seconds: float, cpu_seconds: int) -> tuple[str, bool]:
        """Run tests with the files as they are now. Return the first failure and whether a limit ended the run."""
        question = json.dumps([names, START_SECONDS * 3 + seconds, START_SECONDS + cpu_seconds]).encode()
        os.write(self._ask, len(question).to_bytes(8, "big"))
        with contextlib.suppress(InterruptedError):
            sent = 0
            while sent < len(question):
                sent += os.write(self._ask, question[sent:])
        text, late = json.loads(_read(self._answers))
        return ("the tests cannot be collected" if text is None else json.loads(text)), late

    def _serve(self, asked: int, answer: int) -> None:
        while question := _read(asked):
            names, seconds, cpu_seconds = json.loads(question)
            work = functools.partial(self._first_failure, names)
            outcome = json.dumps(in_fork(work, self._folder, seconds, cpu_seconds)).encode()
            os.write(answer, len(outcome).to_bytes(8, "big") + outcome)

    def _first_failure(self, names: Sequence[str]) -> str:
        found = [""]

        def ask(server: Server) -> None:
            found[0] = server.first_failure([each for each in names if each in server.items]) or ""

        tests = sorted({each.split("::")[0] for each in names}) or list(self._tests)
        code = collect(
            self._copy, tests, [Server(ask, LineTrace(frozenset()), frozenset())], self._folder / "output.txt"
        )
        return found[0] or ("" if code in (0, 5) else "the tests cannot be collected")


def _read(descriptor: int) -> bytes:
    """Read one message: its length in 8 bytes, and its bytes. Empty at the end."""

    def exactly(number: int) -> Iterator[bytes]:
        while number:
            part = os.read(descriptor, number)
            if not part:
                return
            number -= len(part)
            yield part

    return b"".join(exactly(int.from_bytes(b"".join(exactly(8)), "big")))
