"""Wrong settings and insufficient hosts: the message names host, expected, found and next, and nothing is changed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_run.fleet.testhosts import hosts
from mixtral_run.fleet.testhosts.__main__ import inventory

ROOT = Path(__file__).parents[2]
NAME = "bad-input"
NOWHERE = "http://127.0.0.1:9"
# All files except those that any login over SSH changes and those of the machine that the host runs on.
FILES = (
    "find / -xdev -type f -not -path '/proc/*' -not -path '/home/*' -not -path '/root/*' -not -path '/tmp/*' "
    "-not -path '/var/log/*' -not -path '/run/*' -not -path '/var/lib/systemd/*' -not -name '*.pyc' "
    "-printf '%p %s %m %T@\\n' | sort"
)


@pytest.fixture(scope="module")
def inventory_file(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    hosts.reimage(NAME, standin=hosts.StandIn(gpus=4, driver="470.82.01"))
    path = tmp_path_factory.mktemp("bad-input") / "hosts.json"
    path.write_text(json.dumps(inventory([NAME])))
    yield path
    hosts.remove(NAME)


@pytest.mark.parametrize(
    ("tags", "variables", "expected"),
    [
        ("swap", {"swap_size_gib": "many"}, ["swap_size_gib", "float"]),
        ("docker", {"docker_state": "gone"}, ["docker_state", "present, absent", "gone"]),
        ("preflight", {"preflight_checks": {"gpu": "warn"}}, ["preflight_checks", "gpu: warn", "fabric_manager"]),
        (
            "docker",
            {"docker_repository_key_fingerprint": "9DC858229FC7DD38854AE2D88D81803C0EBFCD88"},
            ["not the pinned one; nothing was changed", "expected: 9DC858229FC7DD38854AE2D88D81803C0EBFCD88", "next:"],
        ),
        ("docker", {"docker_repository_key_url": f"{NOWHERE}/gpg"}, ["key cannot be fetched", NOWHERE, "next:"]),
        (
            "docker",
            {"docker_repository_url": f"{NOWHERE}/debian"},
            ["does not answer", f"{NOWHERE}/debian/dists/", "next:"],
        ),
        (
            "preflight",
            {"preflight_free_gib": 90000, "preflight_mirrors": [NOWHERE]},
            [
                f"{NAME} is not ready: 5 shortfalls.",
                "expected 8 GPUs; found 4 GPUs",
                "expected NVIDIA driver 525 or newer; found driver 470.82.01",
                "90000 GiB for checkpoints under /srv/checkpoints",
                f"expected {NOWHERE} answers",
                "no time service has synchronized it",
            ],
        ),
        ("image", {"image_source": "registry", "image_registry_reference": "a:latest"}, ["names no digest", "next:"]),
        ("image", {"image_kit_folder": "/nonexistent"}, ["image_kit_folder", "not the package mixtral_run"]),
        ("swap", {"swap_path": "/swapfile"}, ["takes no swap file", f"{NAME}: /swapfile", "next:"]),
        ("acceptance", {}, ["not accepted", NAME, "run the image role"]),
    ],
    ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else None,
)
def test_it_is_refused_in_words(inventory_file: Path, tags: str, variables: dict, expected: list) -> None:
    host = hosts.find(NAME)
    before = host.shell(FILES)
    argv = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(inventory_file), "playbooks/bootstrap.yml"]
    argv += ["--tags", tags, "--extra-vars", json.dumps(variables)]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # Ansible wraps long lines if it assumes a terminal.
    output = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, output
    missing = [words for words in expected if words not in output]
    assert not missing, f"{missing} not in:\n{done.stdout}"
    assert f"{NAME} : " in output and "failed=1" in output
    assert host.shell(FILES) == before


SUDO = "printf 'Defaults requiretty\\nops ALL=(ALL) NOPASSWD: ALL\\n' >/etc/sudoers.d/ops-tty"
PRINTING = 'sed -i \'1i echo \\x27{"greeting": "welcome"}\\x27\' ~ops/.bashrc'
UNDO = "rm -f /etc/sudoers.d/ops-tty; sed -i /greeting/d ~ops/.bashrc"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (SUDO, ["sudo: sorry, you must have a tty to run sudo", "'Defaults:ops !requiretty'"]),
        (PRINTING, ['{"greeting": "welcome"}', "~/.bashrc", "next:"]),
    ],
    ids=["sudo asks for a terminal", "a start-up file prints JSON"],
)
def test_what_a_host_says_instead_of_a_result_is_shown(
    inventory_file: Path, tmp_path: Path, state: str, expected: list
) -> None:
    host = hosts.find(NAME)
    host.shell(f"touch ~ops/.bashrc; {state}")
    argv = [
        str(Path(sys.executable).parent / "mixtral-run"),
        "bootstrap",
        "-i",
        str(inventory_file),
        "--tags",
        "preflight",
    ]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "NO_COLOR": "1"}
    try:
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    finally:
        host.shell(UNDO)
    output = done.stdout + done.stderr
    assert done.returncode == 3, output
    missing = [words for words in expected if words not in output]
    assert not missing and "deserialization failed" not in output.partition("host  ")[2], output
