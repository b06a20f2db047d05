"""The program for hosts contains every module that it imports, and runs in a Python without Ansible."""

import json
import subprocess
import sys
from pathlib import Path

from mixtral_run.fleet.status.payload import status_payload


def test_it_runs_in_a_python_that_has_nothing_installed(tmp_path: Path) -> None:
    folders = {"checkpoints": str(tmp_path), "hf_home": str(tmp_path), "image": "none"}
    # -I and -S: no site-packages, as on a host.
    argv = [sys.executable, "-I", "-S", "-", json.dumps(folders)]
    done = subprocess.run(argv, input=status_payload(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["checkpoints"] == []
