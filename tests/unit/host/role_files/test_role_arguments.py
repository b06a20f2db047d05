"""The variables of all roles are checked in one task, by host, before a role begins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
PLAY = """
- hosts: all
  gather_facts: false
  tasks:
    - mixtral_run.hosts.role_arguments:
        folder: {root}/roles
        roles: [swap, docker]
    - ansible.builtin.import_role: {{name: swap, rolespec_validate: false}}
      when: false
    - ansible.builtin.import_role: {{name: docker, rolespec_validate: false}}
      when: false
"""


@pytest.mark.parametrize(
    ("variables", "problems"),
    [
        ({}, []),
        ({"swap_size_gib": "{{ 3 + 1 }}", "docker_users": "{{ ['ops'] }}"}, []),
        ({"swap_size_gib": "many"}, ["- swap: swap_size_gib: expected float; found 'many'\n", "next: correct them"]),
        # `-e NAME=VALUE` passes text: numbers and booleans are converted, a dict would be merged as text.
        ({"swap_size_gib": "4", "docker_live_restore": "no", "docker_log_max_files": "7"}, []),
        ({"docker_default_ulimits": "{}"}, ["docker_default_ulimits: expected a dict; found the text '{}'", "-e '{"]),
        (
            {"docker_state": "gone", "swap_state": "{{ 'a' ~ 'way' }}"},
            ["docker: value of docker_state must be one of: present, absent, got: gone", "swap: ", "got: away"],
        ),
    ],
)
def test_every_problem_of_a_host_is_reported_and_no_other_hosts(
    tmp_path: Path, variables: dict, problems: list[str]
) -> None:
    (tmp_path / "play.yml").write_text(PLAY.format(root=ROOT))
    hosts = {"bad": variables, "good": {}}
    (tmp_path / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": {"ansible_connection": "local"}}}))
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    argv = [Path(sys.executable).parent / "ansible-playbook", "-i", tmp_path / "hosts.json", tmp_path / "play.yml"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert "good                       : ok=1 " in done.stdout, done.stdout + done.stderr
    assert done.returncode == (2 if problems else 0), done.stdout + done.stderr
    assert all(words in done.stdout for words in problems)
    assert ("nothing was changed" in done.stdout) is bool(problems)
