"""For all tests: the marker of those on hosts (a lane of tests/lanes.py), and an environment that no test changes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported. Threads that wait for each other gain nothing on small models, and lose where lanes and
# processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent
HOSTS = ROOT / "hosts"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HOSTS) or "docker_engine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.host)


@pytest.fixture(autouse=True)
def environment_as_found() -> Iterator[None]:
    """Restore the environment. Verbs that a test calls in this process set variables; the next test's would inherit."""
    found = dict(os.environ)
    yield
    if os.environ != found:
        os.environ.clear()
        os.environ.update(found)
