"""Variables that nothing uses are refused if they are misspelled settings, and warned of otherwise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.plays.role_variables import _variable_names, refuse_misspelled

ROOT = Path(__file__).parents[4]
NAMES = _variable_names()
KNOWN = {
    "docker_users",
    "docker_package_versions",
    "docker_daemon_settings",
    "hf_cache_home",
    "hf_cache_uid",
    "swap_size_gib",
    "swap_path",
}
ROLES = ("docker", "hf_cache", "swap")
OF_WELL_KNOWN_ROLES = """
docker_edition docker_packages_state docker_obsolete_packages docker_service_manage docker_service_state
docker_service_enabled docker_restart_handler_state docker_install_compose docker_install_compose_plugin
docker_compose_package docker_compose_version docker_compose_arch docker_compose_url docker_compose_path
docker_add_repo docker_repo_url docker_apt_release_channel docker_apt_ansible_distribution docker_apt_arch
docker_apt_repository docker_apt_ignore_key_error docker_apt_gpg_key docker_apt_filename docker_yum_repo_url
docker_yum_gpg_key docker_daemon_options docker_package docker_package_state
nvidia_driver_branch nvidia_driver_package_state nvidia_driver_package_version nvidia_driver_skip_reboot
nvidia_driver_persistence_mode_on nvidia_driver_module_file nvidia_driver_module_params
nvidia_driver_add_repos nvidia_driver_ubuntu_install_from_cuda_repo nvidia_driver_ubuntu_branch
nvidia_driver_ubuntu_cuda_repo_baseurl nvidia_driver_ubuntu_packages nvidia_driver_rhel_cuda_repo_gpgkey
"""
"""Variables of geerlingguy.docker 7 and nvidia.nvidia_driver 2."""


@pytest.mark.parametrize(
    ("name", "like", "is_misspelled"),
    [
        ("docker_user", "docker_users", True),
        ("hf_cache_hom", "hf_cache_home", True),
        ("hf_cache_udi", "hf_cache_uid", True),
        ("swap_szie_gib", "swap_size_gib", True),
        ("mixtral_sprad", "mixtral_spread", True),
        ("mixtral_stratgy", "mixtral_strategy", True),
        # The prefix itself is misspelled.
        ("dockr_users", "docker_users", True),
        ("hfcache_home", "hf_cache_home", True),
        ("Docker_Users", "docker_users", True),
        ("SWAP_PATH", "swap_path", True),
        # Those of other roles are like each other only by their prefix.
        ("docker_compose_version", "", False),
        ("swap_file_size_mb", "", False),
        ("docker_daemon_options", "docker_daemon_settings", False),
    ],
)
def test_a_misspelling_is_told_from_a_variable_of_another_role(name: str, like: str, is_misspelled: bool) -> None:
    (found,) = NAMES.unused_names([name, "docker_users"], (), KNOWN, ROLES, ["{{ mixtral_spread }}"])
    assert (found.name, found.like, found.is_misspelled) == (name, like, is_misspelled)
    assert NAMES.unused_names([name], (), KNOWN, ROLES, [f"{{{{ {name} | default }}}}", "{{ mixtral_spread }}"]) == []
    assert NAMES.unused_names([name], (), KNOWN, ROLES, [f"{name} in text", "{{ mixtral_spread }}"])


@pytest.mark.parametrize("name", ["docker-users", "docker.users", "hf-cache-home", "Docker-Daemon-Settings"])
def test_a_name_that_no_template_can_use_is_a_misspelling(name: str) -> None:
    """Ansible keeps such names of an inventory without a word."""
    (found,) = NAMES.unused_names([name], (), KNOWN, ROLES, [])
    assert (found.like, found.is_misspelled) == (name.lower().replace("-", "_").replace(".", "_"), True)


def test_variables_of_well_known_roles_are_warned_of_only() -> None:
    """One inventory may serve them and the kit."""
    names = OF_WELL_KNOWN_ROLES.split()
    files = sorted(ROOT.glob("roles/*/meta/argument_specs.yml"))
    specs = {file.parts[-3]: yaml.safe_load(file.read_text())["argument_specs"]["main"]["options"] for file in files}
    known = {name for options in specs.values() for name in options}
    unused = NAMES.unused_names(names, (), known, tuple(specs), [])
    assert [each.name for each in unused if each.is_misspelled] == []
    assert set(names) - known == {each.name for each in unused}


def test_other_names_count_only_if_they_were_given_for_this_run() -> None:
    names = ["site_color", "ansible_user", "__docker_engine"]
    assert NAMES.unused_names(names, (), KNOWN, ROLES, []) == []
    assert [each.name for each in NAMES.unused_names(names, names, KNOWN, ROLES, [])] == ["site_color"]


def test_the_variables_of_the_playbooks_are_known() -> None:
    text = "".join(path.read_text() for path in (ROOT / "playbooks").glob("*.yml"))
    # mixtral_run.hosts is the collection.
    used = set(re.findall(r"mixtral_[a-z_]+", text)) | {NAMES.OWN}
    assert used == set(NAMES.OF_THE_PLAYBOOKS)


def test_misspelled_extra_variables_are_refused_together_before_a_host_is_contacted(tmp_path: Path) -> None:
    (tmp_path / "more.yml").write_text("hf_cache_hom: /x\nsite: 1\n")
    words = ["docker_user=x site=1", f"@{tmp_path / 'more.yml'}"]
    with pytest.raises(ConfigError) as refused:
        refuse_misspelled(words)
    assert [problem.partition(" ")[0] for problem in refused.value.problems] == ["docker_user", "hf_cache_hom"]
    assert "docker_users?" in str(refused.value) and "mixtral_own_variables" in str(refused.value)
    refuse_misspelled([*words, '{"mixtral_own_variables": ["docker_user", "hf_cache_hom"]}'])
    refuse_misspelled(['{"docker_user": "me", "docker_users": ["{{ docker_user }}"], "hf_cache_home": "/x"}'])


INVENTORY = {
    "all": {
        "hosts": {"good": {}, "bad": {"hf_cache_hom": "/x"}},
        "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
    }
}
GROUP_VARS = """\
docker_compose_version: 2
image_registry: r
docker_daemon_settings: {a: "{{ image_registry }}"}
"""
PLAY = """\
- hosts: all
  gather_facts: false
  tasks:
    - name: Check
      mixtral_run.hosts.role_arguments: {folder: ROOT/roles, roles: [docker], extra_vars: true}
    - name: Later
      ansible.builtin.debug: {msg: it began}
"""


@pytest.mark.parametrize("words", [(), ("--start-at-task", "Later")])
def test_a_plain_play_refuses_the_host_and_names_the_file(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(INVENTORY))
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars/all.yml").write_text(GROUP_VARS)
    (tmp_path / "play.yml").write_text(PLAY.replace("ROOT", str(ROOT)))
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "COLUMNS": "900"}
    argv = [Path(sys.executable).parent / "ansible-playbook", "-i", "hosts.yml", "play.yml", "-e", "site_color=1"]
    done = subprocess.run([*argv, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    shown = done.stdout + done.stderr
    assert done.returncode == 2 and "hf_cache_hom (hosts.yml:" in shown and "did you mean hf_cache_home?" in shown
    warned = "docker_compose_version (group_vars/all.yml:1); site_color (-e)."
    assert warned in " ".join(shown.split()) and "image_registry (" not in shown
    assert "docker_compose_version (group_vars/all.yml:1): no role" not in shown
    # Without the task, nobody would have looked at the variables: no host begins.
    assert shown.count("it began") == (0 if words else 1)


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ("8080: a\non: b\nmixtral_own_variables:\n", ""),
        ("mixtral_own_variables: docker_user, hf_cache_hom\ndocker_user: a\n", ""),
        ("mixtral_own_variables: 5\n", "mixtral_own_variables: expected a list of names; found 5"),
        (
            "mixtral_own_variables: {docker_user: a}\ndocker_user: a\n",
            "mixtral_own_variables: expected a list of names",
        ),
    ],
)
def test_keys_that_are_no_names_stop_no_host(tmp_path: Path, variables: str, refused: str) -> None:
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars/all.yml").write_text(variables)
    (tmp_path / "hosts").write_text(f"a ansible_connection=local ansible_python_interpreter={sys.executable}\n")
    (tmp_path / "play.yml").write_text(PLAY.replace("ROOT", str(ROOT)))
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "COLUMNS": "900"}
    argv = [Path(sys.executable).parent / "ansible-playbook", "-i", "hosts", "play.yml"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if refused else 0), done.stdout + done.stderr
    assert refused in done.stdout and "Task failed: '" not in done.stdout
