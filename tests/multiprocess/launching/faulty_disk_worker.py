"""Run a writer once for each of its calls to a disk, which fails at that call.

This process has tests/support/faulty_disk.c preloaded. It imports what the writers need once, then reads requests from
standard input, a line of JSON each: the name of a scenario, a folder, and 1 for every call or n for every n-th. Each
run is a fork. The answer is a line of JSON: the number of runs, and a text for each run that did not go right. In
scenarios that are killed the process does not get an error, it ends at that call.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mixtral_run.errors import MixtralRunError, from_os_error
from tests.multiprocess.launching.faulty_disk_scenarios import SCENARIOS, Content, Scenario

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
LIBRARY = ctypes.CDLL(None)


def run(scenario: Scenario, good: Content, new: Content | None, at: int) -> str:
    """Run the writer in this process; return what is wrong, or nothing."""
    number = ERRORS[at % len(ERRORS)]
    LIBRARY.faulty_disk_set(os.fsencode(scenario.disk), at, number, int(number != errno.EIO or scenario.eio_stays))
    error: BaseException | None = None
    try:
        scenario.write()
    except (MixtralRunError, OSError) as raised:
        error = raised
    except BaseException:
        return f"{errno.errorcode[number]}: {traceback.format_exc()[-1500:]}"
    LIBRARY.faulty_disk_set(b"", 0, 0, 0)
    shown = from_os_error(error) if isinstance(error, OSError) else error
    wrong = []
    if error is not None and shown is None:
        wrong.append(f"the user sees a traceback: {error!r}")
    if isinstance(shown, MixtralRunError) and os.strerror(number) not in str(shown):
        wrong.append(f"without the system's own word: {shown}")
    if isinstance(shown, MixtralRunError) and shown.next_command is None:
        wrong.append(f"without a next command: {shown}")
    found = scenario.content()
    if found not in (good, new):
        wrong.append(f"neither the earlier nor the new state: {found}, after {shown}")
    if error is None and new is not None and found != new:
        wrong.append("no error, and not the new state")
    scenario.write()
    if new is not None and scenario.content() != new:
        wrong.append("the same command afterwards does not write the new state")
    return "; ".join(wrong) and f"call {at}, {errno.errorcode[number]}: {'; '.join(wrong)}"


def run_killed(scenario: Scenario, at: int) -> None:
    """Run the writer in this process, which ends at a call."""
    LIBRARY.faulty_disk_set(os.fsencode(scenario.disk), at, -1, 0)
    scenario.write()
    os._exit(1)


def after_kill(scenario: Scenario, good: Content, new: Content, at: int) -> str:
    """Return what is wrong with what a killed process left, or nothing."""
    wrong = []
    found = scenario.content()
    if found not in (good, new):
        wrong.append(f"neither the earlier nor the new state: {found}")
    scenario.write()
    if scenario.content() != new:
        wrong.append("the same command afterwards does not write the new state")
    return "; ".join(wrong) and f"call {at}, killed: {'; '.join(wrong)}"


def prepare_in_fork(scenario: Scenario) -> None:
    """Prepare in a fork: a process that has joined a job has threads, after which no fork is safe."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            scenario.prepare()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def in_fork(scenario: Scenario, good: Content, new: Content | None, at: int) -> dict[str, object]:
    """Run the writer in a fork on a copy of the good state."""
    shutil.rmtree(scenario.disk, ignore_errors=True)
    shutil.copytree(scenario.folder / "backup", scenario.disk, symlinks=True)
    if new is None:
        return forked(lambda: count(scenario))
    if not scenario.is_killed:
        return forked(lambda: {"wrong": run(scenario, good, new, at)})
    pid = os.fork()
    if pid == 0:
        run_killed(scenario, at)
    if os.waitpid(pid, 0)[1] != signal.SIGKILL:
        return {"wrong": f"call {at}: the process was not killed"}
    return forked(lambda: {"wrong": after_kill(scenario, good, new, at)})


def count(scenario: Scenario) -> dict[str, object]:
    """Run the writer undisturbed."""
    LIBRARY.faulty_disk_set(os.fsencode(scenario.disk), 0, 0, 0)
    scenario.write()
    return {"calls": LIBRARY.faulty_disk_calls(), "content": scenario.content()}


def forked(work: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Return the result of a function that runs in a fork of this process."""
    end, start = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        result: dict[str, object] = {}
        try:
            result = work()
        except BaseException:
            result = {"wrong": traceback.format_exc()[-1500:]}
        os.write(start, json.dumps(result).encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end, "rb") as stream_:
        content = stream_.read()
    os.waitpid(pid, 0)
    found: dict[str, object] = json.loads(content or b'{"wrong": "the process ended by a signal"}')
    return found


def run_scenario(name: str, folder: Path, step: int) -> dict[str, object]:
    """Run a scenario once for every `step`-th of its calls. Return the number of runs and what went wrong."""
    scenario = SCENARIOS[name](folder)
    scenario.disk.mkdir(parents=True)
    prepare_in_fork(scenario)
    good = scenario.content()
    shutil.copytree(scenario.disk, folder / "backup", symlinks=True)
    whole = in_fork(scenario, good, None, 0)
    calls, new = whole["calls"], whole["content"]
    assert isinstance(calls, int) and isinstance(new, dict) and new != good, whole
    places = range(1, calls + 1, step)
    found = [in_fork(scenario, good, new, at)["wrong"] for at in places]
    return {"runs": len(places), "wrong": [each for each in found if each]}


def main() -> None:
    for line in sys.stdin:
        name, folder, step = json.loads(line)
        print(json.dumps(forked(partial(run_scenario, name, Path(folder), step))), flush=True)


if __name__ == "__main__":
    main()
