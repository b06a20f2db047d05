"""Inventories with encrypted variables: the password is found from every folder, and a missing one is explained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.plays.runner import Play, environment, read_inventory
from mixtral_run.fleet.plays.vault import next_for_vault


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with an inventory whose group_vars are encrypted."""
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "hosts.yml").write_text("all: {hosts: {gpu-01: }}")
    (tmp_path / "password").write_text("words\n")
    (tmp_path / "group_vars/all.yml").write_text("swap_size_gib: 3")
    # In a process of its own: Ansible replaces functions of the interpreter, which torch does not expect.
    encrypt = [
        sys.executable,
        "-m",
        "ansible.cli.vault",
        "encrypt",
        "--vault-password-file",
        str(tmp_path / "password"),
    ]
    subprocess.run([*encrypt, str(tmp_path / "group_vars/all.yml")], check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("ANSIBLE_VAULT_PASSWORD_FILE", raising=False)
    return tmp_path


def test_a_missing_password_is_reported_with_what_to_do(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        read_inventory(Path("hosts.yml"))
    assert "ANSIBLE_VAULT_PASSWORD_FILE=FILE" in str(refused.value.next_command)
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", "password")
    assert read_inventory(Path("hosts.yml"))["_meta"]["hostvars"]["gpu-01"]["swap_size_gib"] == 3
    (fleet / "hosts.yml").write_text("all: [")
    with pytest.raises(ConfigError) as refused:
        read_inventory(Path("hosts.yml"))
    assert refused.value.next_command is None


def test_password_files_are_found_from_the_folder_of_a_play(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", "password")
    monkeypatch.setenv("ANSIBLE_VAULT_IDENTITY_LIST", "prod@password, dev@prompt,password")
    settings = environment(Play(playbook=fleet, hosts=()))
    assert settings["ANSIBLE_VAULT_PASSWORD_FILE"] == str(fleet / "password")
    assert settings["ANSIBLE_VAULT_IDENTITY_LIST"] == f"prod@{fleet}/password,dev@prompt,{fleet}/password"
    monkeypatch.delenv("ANSIBLE_VAULT_PASSWORD_FILE")
    monkeypatch.delenv("ANSIBLE_VAULT_IDENTITY_LIST")
    assert not [name for name in environment(Play(playbook=fleet, hosts=())) if "VAULT" in name]


@pytest.mark.parametrize(
    "error",
    [
        "[ERROR]: Attempting to decrypt but no vault secrets found.",
        "[ERROR]: Decryption failed (no vault secrets were found that could decrypt).",
        "[ERROR]: The vault password file /x/pw was not found",
    ],
)
def test_ansibles_errors_about_passwords_are_known(error: str) -> None:
    assert next_for_vault(error) and next_for_vault("[ERROR]: YAML parsing failed") is None


def test_the_playbooks_run_from_the_folder_of_another_inventory_as_documented(fleet: Path) -> None:
    """Run the command of docs/fleet.md in a shell, with the words that it leaves open, as far as the list of tasks."""
    root = Path(__file__).parents[3]
    text = (root / "docs/fleet.md").read_text()
    line = next(line.strip() for line in text.splitlines() if line.startswith("    ANSIBLE_CONFIG="))
    assert "ANSIBLE_VAULT_PASSWORD_FILE=" in line
    command = line.replace("KIT", str(root)).replace("FILE ", "password ").replace("INVENTORY", "hosts.yml")
    words = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(fleet)}
    done = subprocess.run(
        ["sh", "-c", f"{command} --list-tasks"], cwd=fleet, env=words, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Keep other operators away" in done.stdout
