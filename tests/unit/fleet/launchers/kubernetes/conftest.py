"""The cluster of these tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixtral_run.fleet.launchers.kubernetes import follow
from tests.support.servers.standin_kubectl import install
from tests.unit.fleet.launchers.kubernetes.standin_cluster import StandIn


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    programs = install(tmp_path / "cluster")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    return StandIn(tmp_path / "cluster")
