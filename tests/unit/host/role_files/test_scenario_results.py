"""The result of a scenario counts as long as nothing that the scenario depends on has changed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.scenario_results import MAX_AGE_DAYS, NO_CACHE, Scenario

ROOT = Path(__file__).parents[4]
HARNESS = ("mixtral_run/fleet/testhosts", "tests/hosts/test_roles.py", "tests/support/scenario_results.py")
FOLDERS = ("mixtral_run", "playbooks", "plugins", "roles", "tests/molecule")
FILES = ("ansible.cfg", "constraints.txt", "pyproject.toml", *HARNESS[1:])
ALL = ("swap", "acceptance", "bootstrap")
# One file of each kind, and which of three scenarios depend on it: a role alone, one that uses others, the whole chain.
KINDS = {
    "roles/swap/tasks/main.yml": ("swap", "bootstrap"),
    "roles/swap/defaults/main.yml": ("swap", "bootstrap"),
    "roles/swap/meta/argument_specs.yml": ("swap", "bootstrap"),
    "roles/swap/molecule/swap/verify.yml": ("swap",),
    "roles/swap/molecule/swap/molecule.yml": ("swap",),
    "roles/swap/molecule/swap/tasks/on_filesystem.yml": ("swap",),
    "roles/docker/vars/main.yml": ("acceptance", "bootstrap"),
    "roles/image/files/requirements.txt": ("acceptance", "bootstrap"),
    "roles/hf_cache/vars/main.yml": ("acceptance", "bootstrap"),
    "roles/docker/molecule/docker/verify.yml": (),
    "tests/molecule/bootstrap/kill_in_the_middle.py": ("bootstrap",),
    "tests/molecule/bootstrap/vars/fleet.yml": ("bootstrap",),
    "playbooks/bootstrap.yml": ("bootstrap",),
    "playbooks/teardown.yml": ("bootstrap",),
    "plugins/modules/preflight.py": ALL,
    "plugins/action/kit_image.py": ALL,
    "plugins/module_utils/mixtral_run_host/files.py": ALL,
    "mixtral_run/fleet/testhosts/__init__.py": ALL,
    "mixtral_run/fleet/testhosts/files/nvidia-smi": ALL,
    "mixtral_run/fleet/testhosts/molecule/base.yml": ALL,
    "tests/hosts/test_roles.py": ALL,
    "mixtral_run/terminal/report.py": ("acceptance", "bootstrap"),
    "mixtral_run/fleet/plays/provisioning.py": ALL,
    "ansible.cfg": ALL,
    "constraints.txt": ALL,
    "pyproject.toml": ALL,
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module")
def unchanged(checkout: Path) -> dict[str, str]:
    return keys(checkout)


def scenarios(root: Path, results: Path = Path("unused")) -> dict[str, Scenario]:
    folders = ("roles/swap/molecule/swap", "roles/acceptance/molecule/acceptance", "tests/molecule/bootstrap")
    return {Path(folder).name: Scenario(root, folder, HARNESS, results) for folder in folders}


def keys(root: Path) -> dict[str, str]:
    return {name: scenario.key() for name, scenario in scenarios(root).items()}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(("name", "expected"), KINDS.items())
def test_a_change_of_a_file_changes_the_key_of_the_scenarios_that_depend_on_it(
    checkout: Path, unchanged: dict[str, str], name: str, expected: tuple[str, ...]
) -> None:
    file = checkout / name
    content = file.read_bytes()
    try:
        file.write_bytes(content + b"\n")
        assert changed(unchanged, keys(checkout)) == set(expected)
    finally:
        file.write_bytes(content)


def test_a_new_file_another_name_and_another_mode_change_the_key(checkout: Path) -> None:
    before, file = keys(checkout), checkout / "plugins/modules/brand_new.py"
    file.touch()
    present = keys(checkout)
    assert changed(before, present) == set(ALL)
    renamed = file.rename(file.with_name("renamed.py"))
    other = keys(checkout)
    assert changed(present, other) == set(ALL)
    renamed.chmod(0o755)
    assert changed(other, keys(checkout)) == set(ALL)
    renamed.unlink()


@pytest.mark.parametrize("name", ["MIXTRAL_RUN_TEST_RELEASE", "ANSIBLE_PIPELINING"])
def test_what_the_environment_sets_changes_the_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(ROOT)
    monkeypatch.setenv(name, "trixie")
    assert changed(before, keys(ROOT)) == set(ALL)
    scenario = scenarios(ROOT)["swap"]
    assert scenario.key("20.10") != scenario.key("29.0")


def test_another_version_of_a_package_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = keys(ROOT), list(importlib.metadata.distributions())
    monkeypatch.setattr("importlib.metadata.distributions", lambda: found[1:])
    assert changed(before, keys(ROOT)) == set(ALL)


def test_a_scenario_whose_hosts_start_with_images_depends_on_their_recipe(checkout: Path) -> None:
    folder = "roles/nvidia_container_toolkit/molecule/nvidia_container_toolkit"
    inputs = Scenario(checkout, folder, HARNESS, Path("unused")).inputs()
    assert checkout / "roles/image/files/requirements.txt" in inputs
    assert checkout / "roles/docker/tasks/main.yml" in inputs
    assert checkout / "mixtral_run/terminal/report.py" not in inputs
    assert checkout / "roles/image/files/requirements.txt" not in scenarios(checkout)["swap"].inputs()


def test_a_computed_role_counts_as_every_role(checkout: Path) -> None:
    file = checkout / "roles/swap/molecule/swap/verify.yml"
    content = file.read_text()
    try:
        file.write_text(content + '\n- hosts: all\n  tasks: [{include_role: {name: "{{ any }}"}}]\n')
        inputs = {str(path.relative_to(checkout)) for path in scenarios(checkout)["swap"].inputs()}
        assert {"roles/preflight/tasks/main.yml", "mixtral_run/terminal/report.py"} <= inputs
    finally:
        file.write_text(content)


def test_a_harness_that_imports_the_kit_depends_on_it(checkout: Path) -> None:
    file = checkout / "mixtral_run/fleet/testhosts/__init__.py"
    content = file.read_text()
    try:
        file.write_text(content + "from mixtral_run.terminal.report import Report\n")
        assert checkout / "mixtral_run/terminal/report.py" in scenarios(checkout)["swap"].inputs()
    finally:
        file.write_text(content)
    assert checkout / "mixtral_run/terminal/report.py" not in scenarios(checkout)["swap"].inputs()


def test_no_tracked_file_that_the_chain_may_read_is_left_out() -> None:
    """The chain uses every role; only scenarios of the roles themselves are none of its business."""
    tracked = subprocess.run(
        ["git", "ls-files", "plugins", "roles", "playbooks", "mixtral_run", "tests/molecule"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    inputs = {str(path.relative_to(ROOT)) for path in scenarios(ROOT)["bootstrap"].inputs()}
    assert {name for name in tracked if "molecule/" not in name or name.startswith("tests/")} <= inputs


def test_a_result_is_found_until_it_is_old_or_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NO_CACHE, raising=False)
    scenario = scenarios(ROOT, tmp_path / "results")["swap"]
    assert scenario.passed("a" * 64) is None
    scenario.record("a" * 64, 41.26)
    found = scenario.passed("a" * 64)
    assert found is not None and found.seconds == 41.3 and found.when.endswith("UTC")
    assert scenario.passed("b" * 64) is None
    monkeypatch.setenv(NO_CACHE, "1")
    assert scenario.passed("a" * 64) is None
    monkeypatch.delenv(NO_CACHE)
    (file,) = (tmp_path / "results").iterdir()
    past = file.stat().st_mtime - (MAX_AGE_DAYS + 1) * 86400
    os.utime(file, (past, past))
    assert scenario.passed("a" * 64) is None
    scenario.record("c" * 64, 1)
    assert not file.exists()
