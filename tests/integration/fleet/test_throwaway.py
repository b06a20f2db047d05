"""rehearse --host where no engine answers: it says so and shows the way.

The same steps with an engine (host, bootstrap, job in its container) are what test_end_to_end.py does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("fault", ["no program", "no engine"])
def test_without_an_engine_it_says_so_and_shows_what_bootstrap_would_do(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "no program":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nowhere.sock")
    argv = [sys.executable, "-m", "mixtral_run", "rehearse", "--host"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no Docker engine answers here" in done.stdout
    lines = done.stdout.splitlines()
    roles = [line.split(" · ")[0].strip() for line in lines if " · " in line]
    assert list(dict.fromkeys(roles)) == [
        "preflight", "docker", "nvidia_container_toolkit", "swap", "hf_cache", "image", "acceptance",
    ]  # fmt: skip
