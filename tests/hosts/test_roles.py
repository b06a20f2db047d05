"""Molecule scenarios of every role, and one of the whole chain, on hosts with systemd, SSH and their own engine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtral_run.fleet import testhosts
from mixtral_run.fleet.testhosts.engine import CACHE
from mixtral_run.fleet.testhosts.shell import call
from tests.support import scenario_results
from tests.support.scenario_results import Scenario

ROOT = Path(__file__).parents[2]
SCENARIOS = [
    *(f"roles/{role}/molecule/{role}" for role in (
        "preflight", "nvidia_driver", "docker", "nvidia_container_toolkit", "swap", "hf_cache", "image", "health",
        "acceptance",
    )),
    "tests/molecule/bootstrap",
]  # fmt: skip
SCENARIO_SECONDS = 1500
# Files that run the scenarios. If one of them changes, all scenarios run again.
HARNESS = tuple(
    str(place.relative_to(ROOT))
    for place in (Path(testhosts.__file__).parent, Path(__file__), Path(scenario_results.__file__),
                  ROOT / "tests/base_images.py")
)  # fmt: skip


def test_no_scenario_is_left_out() -> None:
    found = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("roles/*/molecule/*/molecule.yml")}
    found |= {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/molecule/*/molecule.yml")}
    assert found == set(SCENARIOS)
    assert {path.parent.name for path in ROOT.glob("roles/*/tasks")} == {Path(name).name for name in SCENARIOS[:-1]}


@pytest.mark.timeout(SCENARIO_SECONDS)
@pytest.mark.parametrize("folder", SCENARIOS, ids=[Path(name).name for name in SCENARIOS])
def test_scenario(folder: str, docker_engine: None, tmp_path: Path) -> None:
    scenario = Scenario(ROOT, folder, HARNESS, CACHE / "scenarios")
    key = scenario.key(call("docker", "version", "--format", "{{.Server.Version}}"))
    passed = scenario.passed(key)
    if passed is not None:
        pytest.skip(
            f"scenario {scenario.name}: unchanged since it passed on {passed.when} in {passed.seconds:.0f} s "
            f"({key[:12]}); run make test-all to run it again"
        )
    began = time.monotonic()
    run_scenario(scenario, tmp_path)
    scenario.record(key, time.monotonic() - began)


def run_scenario(scenario: Scenario, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOLECULE_GLOB": f"{scenario.folder}/molecule.yml",
        "MIXTRAL_RUN_ROOT": str(ROOT),
        "MIXTRAL_RUN_TEST_INVENTORY": str(tmp_path / "hosts.json"),
        # A folder of its own, so that molecule finds no state of a killed run, which would say that hosts exist.
        "MOLECULE_EPHEMERAL_DIRECTORY": str(tmp_path / "molecule"),
        # Host keys too: the ports of a scenario's hosts belonged to others before.
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "ANSIBLE_NOCOLOR": "1",
        "NO_COLOR": "1",
    }
    argv = [sys.executable, "-m", "molecule", "--base-config", "mixtral_run/fleet/testhosts/molecule/base.yml"]
    argv += ["test", "-s", scenario.name]
    log = tmp_path / "molecule.log"
    with log.open("w") as stream:
        done = subprocess.run(argv, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"scenario {scenario.name}:\n" + "\n".join(log.read_text().splitlines()[-120:])
