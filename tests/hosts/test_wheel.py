"""Built wheel, installed without a checkout: its playbooks and roles run from the installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.hosts.conftest import HostMaker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(argv, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_every_playbook_role_and_plugin(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "ansible.cfg", "playbooks", "roles", "plugins", "meta"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    places = {
        "plugins": "collections/ansible_collections/mixtral_run/hosts/",
        "meta": "collections/ansible_collections/mixtral_run/hosts/",
    }
    missing = [
        name for name in tracked if f"mixtral_run/provisioning/{places.get(name.split('/')[0], '')}{name}" not in inside
    ]
    assert tracked
    assert missing == []
    assert "mixtral_run/fleet/status/status.html" in inside


def test_bootstrap_works_from_the_wheel_alone(wheel: Path, light_hosts: HostMaker, tmp_path: Path) -> None:
    (host,) = light_hosts(1)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    own = next(venv.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(own)
    # The dependencies come from this environment. A .pth file adds its folder, but not the editable kit in it.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    # A simulated host is this machine, so no package is installed. Only the checks of preflight run, and they fail.
    variables = "ansible_python_interpreter=/usr/bin/python3 preflight_mirrors=[]"
    done = subprocess.run(
        [
            str(venv / "bin/python"), "-m", "mixtral_run", "bootstrap", host.target, "--check", "--tags", "preflight",
            "--extra-vars", variables, "--extra-vars", '{"preflight_mirrors": [], "preflight_num_gpus": 8}',
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert "expected 8 GPUs; found 0 GPUs" in done.stdout
    plays = Path(os.environ["XDG_STATE_HOME"]) / "mixtral-run/plays"
    (command,) = plays.glob("*/artifacts/run/command")
    found = json.loads(command.read_text())
    assert str(own / "mixtral_run/provisioning/playbooks/bootstrap.yml") in found["command"]
    assert found["env"]["ANSIBLE_CONFIG"] == str(own / "mixtral_run/provisioning/ansible.cfg")
    assert not any(str(ROOT) in word for word in found["command"][1:])
