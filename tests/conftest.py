"""For all tests: the marker of those on hosts (tests/lanes.py), an environment that no test changes, and a mesh."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mixtral_run.model.parallel.mesh import Mesh

# Before torch is imported. Threads that wait for each other gain nothing on small models, and lose where lanes and
# processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent
HOSTS = ROOT / "hosts"
OWN = frozenset(os.environ)
"""Variables that were there before any test."""


STATE = tempfile.TemporaryDirectory(prefix="mixtral-run-state-")
"""The kit's state folder in these tests. Docker gives a port of this machine to one test host after another: the keys
that other sessions recorded, and those of the person who tests, refuse them."""
# Before tests/support/processes/warm.py is imported, by a conftest.py further down: it forks only where the environment
# is as it was then.
os.environ["XDG_STATE_HOME"] = STATE.name
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def pytest_configure() -> None:
    """Make the tests independent of how they were started.

    A shell ignores SIGINT in what it starts in the background, nohup ignores SIGHUP, and a process that was started by
    another test runner may have signals blocked. All of this is inherited, by the processes that tests start too.
    """
    for number in STOPS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    os.umask(0o022)


def pytest_unconfigure() -> None:
    STATE.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HOSTS) or "docker_engine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.host)


@pytest.fixture(autouse=True)
def environment_as_found() -> Iterator[None]:
    """Restore the environment. Verbs that a test calls in this process set variables; the next test's would inherit.

    Megatron's go in any case: a fixture of a module that builds a model has set them before this one looks.
    """
    found = {name: value for name, value in os.environ.items() if name in OWN or not name.startswith("NVTE_")}
    yield
    if os.environ != found:
        os.environ.clear()
        os.environ.update(found)


@pytest.fixture(scope="module")
def mesh() -> Iterator["Mesh"]:
    """The mesh of one process on the CPU."""
    from mixtral_run.config.launch import LaunchConfig
    from mixtral_run.model.parallel.mesh import open_mesh

    with open_mesh(LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")) as joined:
        yield joined
