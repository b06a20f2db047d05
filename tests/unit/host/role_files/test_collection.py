"""The repository as a collection: built, installed without a network, and used by FQCN from another folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mixtral_run

ROOT = Path(__file__).parents[4]
BIN = Path(sys.executable).parent
PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  roles:
    - role: mixtral_run.hosts.preflight
      vars:
        preflight_num_gpus: 0
        preflight_ram_gib: 900000
        preflight_free_gib: 900000
        preflight_mirrors: []
        preflight_checks: {os: skip, clock: skip, persistence: skip, driver: skip}
"""
STATE = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - mixtral_run.hosts.host_state:
    - ansible.builtin.debug: {msg: "RAM {{ ansible_facts['mixtral_run'].memory.ram_gib }}"}
"""


def _run(folder: Path, program: str, *words: object, code: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {
        "ANSIBLE_COLLECTIONS_PATH": str(folder / "collections"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOME": str(folder / "ansible"),
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
    }
    argv = [str(BIN / program), *map(str, words)]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the collection installed below, and without ansible.cfg."""
    folder = tmp_path_factory.mktemp("elsewhere")
    _run(folder, "ansible-galaxy", "collection", "build", ROOT, "--output-path", folder)
    (archive,) = folder.glob("mixtral_run-hosts-*.tar.gz")
    _run(folder, "ansible-galaxy", "collection", "install", archive, "--offline", "-p", folder / "collections")
    return folder


def test_it_has_the_version_of_the_package_and_nothing_that_only_developers_need(elsewhere: Path) -> None:
    place = elsewhere / "collections/ansible_collections/mixtral_run/hosts"
    assert json.loads((place / "MANIFEST.json").read_text())["collection_info"]["version"] == mixtral_run.__version__
    top = {path.name for path in place.iterdir()}
    assert {"mixtral_run", "playbooks", "plugins", "roles", "meta"} <= top
    assert not top & {"tests", "benchmarks", "inventory", ".git", ".venv"}
    assert not list(place.rglob("__pycache__"))


def test_a_role_and_its_module_run_by_fqcn(elsewhere: Path) -> None:
    (elsewhere / "site.yml").write_text(PLAY)
    said = _run(elsewhere, "ansible-playbook", "site.yml", "--check", code=2)
    assert "localhost is not ready: 2 shortfalls." in said
    assert "900000 GiB of RAM" in said and "900000 GiB for checkpoints under" in said


def test_a_module_runs_by_fqcn(elsewhere: Path) -> None:
    (elsewhere / "state.yml").write_text(STATE)
    kib = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1))
    assert f"RAM {round(kib / 2**20, 1)}" in _run(elsewhere, "ansible-playbook", "state.yml")


def test_its_playbooks_run_by_fqcn(elsewhere: Path) -> None:
    for name in ("bootstrap", "teardown"):
        said = _run(elsewhere, "ansible-playbook", "-i", "localhost,", f"mixtral_run.hosts.{name}", "--list-tasks")
        roles = set(re.findall(r"^      (?:mixtral_run\.hosts\.)?(\w+) : ", said, re.MULTILINE))
        assert roles >= {path.name for path in (ROOT / "roles").iterdir()} - {"preflight"}, said


def test_every_module_has_documentation(elsewhere: Path) -> None:
    names = sorted(path.stem for path in (ROOT / "plugins/modules").glob("*.py"))
    found = json.loads(_run(elsewhere, "ansible-doc", "--json", *(f"mixtral_run.hosts.{name}" for name in names)))
    assert set(found) == {f"mixtral_run.hosts.{name}" for name in names}
    for values in found.values():
        assert values["doc"]["short_description"] and values["doc"]["options"]


def test_modules_import_their_utilities_in_the_way_that_works_in_a_collection_too() -> None:
    for path in [*(ROOT / "plugins/modules").glob("*.py"), *(ROOT / "plugins/module_utils").rglob("*.py")]:
        assert "ansible.module_utils.mixtral_run_host" not in path.read_text(), f"{path}: import ..module_utils"


def test_galaxy_leaves_out_what_git_ignores() -> None:
    ignored = yaml.safe_load((ROOT / "galaxy.yml").read_text())["build_ignore"]
    for line in (ROOT / ".gitignore").read_text().split():
        name = line.strip("/")
        assert name in ignored or any(Path(name).match(pattern) for pattern in ignored), name
