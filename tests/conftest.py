"""Marks the tests that run playbooks and containers on hosts: `-m host`, one of the lanes of tests/lanes.py."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent
HOST_PATHS = (
    ROOT / "integration/fleet",
    ROOT / "integration/test_roles.py",
    ROOT / "integration/test_targets.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        by_path = any(item.path.is_relative_to(path) for path in HOST_PATHS)
        if by_path or "docker_engine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.host)
