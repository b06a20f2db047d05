"""What a test needs and this machine may lack: the test is left out by name, and in CI that is a failure."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """End the test for want of something."""
    if os.environ.get("CI"):
        pytest.fail(f"CI has to run this test: {reason}")
    pytest.skip(reason)
