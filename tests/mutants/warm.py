"""A pytest that has collected its tests and forks for every run of some of them.

Nothing is imported anew for a changed function: its code is exchanged in the fork. Changes of what runs when a module
is imported need a pytest that has not imported it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.swap import MOST_EVENTS, LineTrace, exchange, exchange_values, functions_of

ROOT = Path(__file__).parents[2]
MORE_MEMORY = 4 << 30
LARGEST_FILE = 1 << 31
Change = tuple[Path, int, str, str]
"""A file, the line that has changed, and the text before and after."""
PROGRAMS = ("subprocess.Popen", "os.posix_spawn")


@dataclass
class Baseline:
    """What the tests do without a change.

    lines: of each test, those that it runs, its fixtures included. seconds: of each test. imported: lines that run
    while the tests are collected. opaque: tests that start a Python or run very many lines; not all that they run is
    known. failed: these are left out.
    """

    lines: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    imported: set[tuple[str, int]] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ran:
    """Outcome of some tests. failed: the first that did, "" if there is none. late: a limit ended them."""

    failed: str | None
    late: bool = False


def runs_product(arguments: Sequence[Any]) -> bool:
    """Return True if a program that is started may run code of the product. arguments: of the audit event."""
    words = repr(arguments[:2])
    return "python" in words or "bin/mixtral-run" in words


class Recorder:
    """Plugin of a baseline: which lines each test runs, how long it takes, and whether it passes."""

    def __init__(self, baseline: Baseline, trace: LineTrace) -> None:
        self.baseline = baseline
        self._trace = trace
        self._fixtures: dict[int, set[tuple[str, int]]] = {}
        self._item = ""
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._item and (event == "os.fork" or (event in PROGRAMS and runs_product(arguments))):
            self.baseline.opaque.add(self._item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        began, self._item = time.monotonic(), item.nodeid
        self._trace.current, self._trace.num_events = set(), 0
        self._trace.start()
        result = yield
        if self._trace.num_events > MOST_EVENTS:
            self.baseline.opaque.add(item.nodeid)
        self._trace.stop()
        lines = self._trace.current
        # A fixture of a session runs in the first test that asks for it; all that use it depend on its lines.
        info = getattr(item, "_fixtureinfo", None)
        for definitions in info.name2fixturedefs.values() if info else ():
            for each in definitions:
                lines |= self._fixtures.get(id(each), set())
        self.baseline.lines[item.nodeid] = lines
        self.baseline.seconds[item.nodeid] = time.monotonic() - began
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        outer, self._trace.current = self._trace.current, set()
        self._trace.start()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self._fixtures[id(fixturedef)] = set(self._trace.current)
            self._trace.current |= outer

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.baseline.failed:
            self.baseline.failed.append(report.nodeid)


class FirstFailure:
    """Plugin of a run: the first test that fails."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


class Server:
    """Plugin: runs tests in forks as a function asks for them, instead of all."""

    def __init__(self, ask: Callable[[Server], None], trace: LineTrace, files: frozenset[str]) -> None:
        self._ask = ask
        self._trace = trace
        self._files = files
        self.items: dict[str, pytest.Item] = {}
        self.session: pytest.Session

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._trace.stop()
        if session.testsfailed:
            raise session.Interrupted("some tests cannot be collected")
        self.session = session
        self.items = {each.nodeid: each for each in session.items}
        self._functions = functions_of(self._files)
        self._ask(self)
        return True

    def _made(self, change: Change) -> bool:
        path, line, before, after = change
        if not any(getattr(each, "__file__", None) == str(path) for each in list(sys.modules.values())):
            # A test imports it, and then takes the changed file.
            return True
        if exchange(path, before, after, self._functions[str(path)]):
            return True
        return exchange_values(path, line, before)

    def run(
        self, names: Sequence[str], plugin: Recorder | FirstFailure, seconds: Mapping[str, float] | None = None
    ) -> None:
        """Run tests in this process, until the first fails if the plugin is a FirstFailure.

        seconds: that each test takes without a change. A change that makes one endless is noticed by that test's limit.
        """
        self.session.config.pluginmanager.register(plugin)
        items = [self.items[each] for each in names]
        for item, after in zip(items, [*items[1:], None], strict=True):
            if seconds is not None:
                limit_cpu(10 + 3 * seconds[item.nodeid])
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if isinstance(plugin, FirstFailure) and plugin.failed:
                break

    def first_failure(
        self, names: Sequence[str], change: Change | None = None, seconds: Mapping[str, float] | None = None
    ) -> str | None:
        """Run tests in this process, with a change of a file. Return None if it cannot be made in this process."""
        if change is not None and not self._made(change):
            return None
        plugin = FirstFailure()
        self.run(names, plugin, seconds)
        return plugin.failed


def collect(copy: Path, tests: Sequence[str], plugins: Sequence[object], output: Path) -> int:
    """Collect tests of a copy of this tree with pytest. Return its exit code."""
    os.chdir(copy)
    with output.open("wb") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    sys.path[:] = [str(copy), *(each for each in sys.path if Path(each or ".").resolve() != ROOT)]
    for name in [each for each in sys.modules if re.match(r"(tests|mixtral_run)(\.|$)", each)]:
        del sys.modules[name]
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--show-capture=no", *tests], plugins=list(plugins)))


def in_fork(work: Callable[[], object], folder: Path, seconds: float, cpu_seconds: int) -> tuple[str | None, bool]:
    """Call a function in a fork with limits.

    Returns:
        Its result as JSON, or None if the process ended in another way, and whether a limit ended it.
    """
    answer, temporary = folder / "answer.json", folder / "tmp"
    answer.unlink(missing_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            os.environ["PYTEST_DEBUG_TEMPROOT"] = os.environ["TMPDIR"] = str(temporary)
            # A changed module that was compiled would be taken again after it was restored.
            sys.dont_write_bytecode = True
            _limit(cpu_seconds)
            answer.write_text(json.dumps(work()), encoding="utf-8")
            os._exit(0)
        except BaseException:
            os._exit(1)
    until, late, status = time.monotonic() + seconds, False, 0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > until:
            late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    late |= os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    whole = os.waitstatus_to_exitcode(status) == 0 and answer.is_file()
    return answer.read_text(encoding="utf-8") if whole else None, late


def limit_cpu(more_seconds: float) -> None:
    """Let SIGXCPU end this process when it has used more processor time than now by so much, or its own limit."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = int(used.ru_utime + used.ru_stime + more_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def _limit(cpu_seconds: int) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, used + MORE_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
