"""Wrong settings and insufficient hosts: the message names host, expected, found and next, and nothing is changed."""

import json
import os
import re
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


CASES: dict[str, list[tuple[dict[str, object], list[str]]]] = {
    "swap": [
        ({"swap_size_gib": "many"}, ["swap_size_gib", "float"]),
        ({"swap_path": "/swapfile"}, ["takes no swap file", "HOST: /swapfile", "next:"]),
    ],
    "docker": [
        ({"docker_state": "gone"}, ["docker_state", "present, absent", "gone"]),
        (
            {"docker_repository_key_fingerprint": "9DC858229FC7DD38854AE2D88D81803C0EBFCD88"},
            ["not the pinned one; nothing was changed", "expected: 9DC858229FC7DD38854AE2D88D81803C0EBFCD88", "next:"],
        ),
        ({"docker_repository_key_url": f"{NOWHERE}/gpg"}, ["key cannot be fetched", NOWHERE, "next:"]),
        ({"docker_repository_url": f"{NOWHERE}/debian"}, ["does not answer", f"{NOWHERE}/debian/dists/", "next:"]),
    ],
    "preflight": [
        ({"preflight_checks": {"gpu": "warn"}}, ["preflight_checks", "gpu: warn", "fabric_manager"]),
        (
            {"preflight_free_gib": 90000, "preflight_mirrors": [NOWHERE]},
            [
                "HOST is not ready: 5 shortfalls.",
                "expected 8 GPUs; found 4 GPUs",
                "expected NVIDIA driver 525 or newer; found driver 470.82.01",
                "90000 GiB for checkpoints under /srv/checkpoints",
                f"expected {NOWHERE} answers",
                "no time service has synchronized it",
            ],
        ),
    ],
    "image": [
        ({"image_source": "registry", "image_registry_reference": "a:latest"}, ["names no digest", "next:"]),
        ({"image_kit_folder": "/nonexistent"}, ["image_kit_folder", "not the package mixtral_run"]),
    ],
    "acceptance": [({}, ["not accepted", "HOST", "run the image role"])],
}
"""By the role whose tag is run: wrong variables, and words of the message, in which HOST stands for the host's name."""


@pytest.fixture(scope="module")
def inventory_file(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    hosts.reimage(NAME, standin=hosts.StandIn(gpus=4, driver="470.82.01"))
    path = tmp_path_factory.mktemp("bad-input") / "hosts.json"
    path.write_text(json.dumps(inventory([NAME])))
    yield path
    hosts.remove(NAME)


@pytest.mark.parametrize("tag", CASES)
def test_it_is_refused_in_words(inventory_file: Path, tmp_path: Path, tag: str) -> None:
    """One play for all cases of a role: the host has one name for each of them in the inventory."""
    host = hosts.find(NAME)
    fleet = json.loads(inventory_file.read_text())
    (entry,) = fleet["mixtral_hosts"]["hosts"].values()
    cases = {f"{NAME}-{number}": case for number, case in enumerate(CASES[tag])}
    fleet["mixtral_hosts"]["hosts"] = {name: {**entry, **variables} for name, (variables, _) in cases.items()}
    # The names are one machine's, whose lock only one of them can have.
    fleet["mixtral_hosts"]["vars"]["mixtral_locked_hosts"] = list(cases)[1:]
    (tmp_path / "hosts.json").write_text(json.dumps(fleet))
    before = host.shell(FILES)
    playbook = ("-i", str(tmp_path / "hosts.json"), "playbooks/bootstrap.yml", "--tags", tag)
    argv = [str(Path(sys.executable).parent / "ansible-playbook"), *playbook]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    for name, (variables, expected) in cases.items():
        said = message_of(name, done.stdout)
        missing = [words for words in expected if words.replace("HOST", name) not in said]
        assert not missing, f"{variables}: {missing} not in:\n{done.stdout}"
    assert host.shell(FILES) == before


def message_of(name: str, output: str) -> str:
    """Return what the play reports of a host at its end, without line breaks: Ansible wraps lines."""
    last = " ".join(output.partition("PLAY [Report how it ended]")[2].split())
    assert re.search(rf"{name} : \S+ \S+ \S+ failed=1 ", last), output
    return re.search(rf"fatal: \[{name}\](.*?)(?:fatal: \[|PLAY RECAP|$)", last)[1]


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
