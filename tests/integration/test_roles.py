"""Every role on hosts with systemd, SSH and an engine of their own, by molecule: a scenario each, one for the chain."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCENARIOS = [
    *(f"roles/{role}/molecule/{role}" for role in (
        "preflight", "docker", "nvidia_container_toolkit", "swap", "hf_cache", "image", "acceptance",
    )),
    "tests/molecule/bootstrap",
]  # fmt: skip
SCENARIO_SECONDS = 1500


def test_no_scenario_is_left_out() -> None:
    found = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("roles/*/molecule/*/molecule.yml")}
    found |= {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/molecule/*/molecule.yml")}
    assert found == set(SCENARIOS)
    assert {path.parent.name for path in ROOT.glob("roles/*/tasks")} == {Path(name).name for name in SCENARIOS[:-1]}


@pytest.mark.timeout(SCENARIO_SECONDS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=[Path(name).name for name in SCENARIOS])
def test_scenario(scenario: str, docker_engine: None, tmp_path: Path) -> None:
    name = Path(scenario).name
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOLECULE_GLOB": f"{scenario}/molecule.yml",
        "MIXTRAL_RUN_ROOT": str(ROOT),
        "MIXTRAL_RUN_TEST_INVENTORY": str(tmp_path / "hosts.json"),
        "ANSIBLE_NOCOLOR": "1",
        "NO_COLOR": "1",
    }
    argv = [
        sys.executable,
        "-m",
        "molecule",
        "--base-config",
        "mixtral_run/fleet/testhosts/molecule/base.yml",
        "test",
        "-s",
        name,
    ]
    log = tmp_path / "molecule.log"
    with log.open("w") as stream:
        done = subprocess.run(argv, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"scenario {name}:\n" + "\n".join(log.read_text().splitlines()[-120:])
