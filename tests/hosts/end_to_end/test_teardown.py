"""Teardown leaves a host as it was; passwords are asked for where keys are missing."""

from __future__ import annotations

import json

import pytest

from mixtral_run.fleet.testhosts import hosts as targets
from mixtral_run.fleet.testhosts.image import ssh_key
from tests.hosts.end_to_end.fleet import IMAGE, NAMES, SETTINGS, Fleet, Operator, answer_prompt, changed_hosts
from tests.hosts.snapshot import difference, snapshot

pytestmark = pytest.mark.timeout(1800)


def test_teardown_leaves_the_host_as_it_was(operator: Operator, fleet: Fleet, bootstrapped: dict[str, int]) -> None:
    host, target = fleet.hosts[NAMES[1]], fleet.target(NAMES[1])
    assert changed_hosts(operator.run("bootstrap", target, *SETTINGS)) == {target.split("@")[1]: 0}
    visit = json.loads(operator.call("status", target, "--history", "--json").stdout)[0]["visits"][-1]
    assert (visit["verb"], visit["outcome"], visit["num_changed"]) == ("bootstrap", "done", 0)
    words = ("teardown", target, "-e", "@variables.json")
    host.run("docker", "run", "--detach", "--name", "job", "--label", "org.mixtral-run.job=job",
             "--label", "org.mixtral-run.verb=finetune", "--entrypoint", "sleep", IMAGE, "1000000")  # fmt: skip
    assert "job (finetune) is running" in operator.run(*words, "--yes", code=3)
    host.run("docker", "rm", "--force", "job")
    assert "--yes" in operator.run(*words, code=2)
    assert difference(fleet.bare[NAMES[1]], snapshot(host))  # the comparison sees what bootstrap has added
    told = json.loads(operator.call(*words, "--yes", "--json").stdout)
    assert told["hosts"][0]["result"] == "done" and told["hosts"][0]["removed"]
    assert difference(fleet.bare[NAMES[1]], snapshot(host)) == []
    assert json.loads(operator.call(*words, "--yes", "--json").stdout)["hosts"][0]["removed"] == []
    lines = [json.loads(line) for line in host.shell("cat /var/log/mixtral-run/history.jsonl").splitlines()]
    assert [(line["verb"], line["state"]) for line in lines[-4:]] == [("teardown", "began"), ("teardown", "ended")] * 2
    first, second = (line["changed"] for line in lines[-3::2])
    assert "swap · Keep a swap file of the wanted size" in first and second == []


def test_a_password_puts_the_key_there_once(operator: Operator, fleet: Fleet) -> None:
    name, password = NAMES[0], 'it\'s a "pass" word'
    host = fleet.hosts[name]
    host.shell(f"rm -f ~{targets.USER}/.ssh/authorized_keys")
    targets.put(host, f"{targets.USER}:{password}\n", "/root/password", "600")
    host.shell("chpasswd < /root/password; rm /root/password")
    words = [fleet.target(name), "--check", "--tags", "preflight", "-e", "@variables.json"]
    assert "bootstrap --ask-pass" in operator.run("bootstrap", *words, code=3)
    answer_prompt(operator, ("bootstrap", "--ask-pass", *words), "SSH password", password)
    key = ssh_key().with_suffix(".pub").read_text().split()[1]
    assert host.shell(f"grep -c {key} ~{targets.USER}/.ssh/authorized_keys").strip() == "1"
    operator.run("bootstrap", *words)


def test_sudo_with_a_password(operator: Operator, fleet: Fleet) -> None:
    name, password = NAMES[1], "sudo's $(own) word"
    host = fleet.hosts[name]
    targets.put(host, f"{targets.USER}:{password}\n", "/root/password", "600")
    host.shell("chpasswd < /root/password; rm /root/password; sed -i 's/NOPASSWD://' /etc/sudoers.d/ops")
    words = ("bootstrap", fleet.target(name), "--check", "--tags", "preflight", "-e", "@variables.json")
    assert "bootstrap --ask-become-pass" in operator.run(*words, code=3)
    answer_prompt(operator, (*words, "--ask-become-pass"), "sudo password", password)
    host.shell("sed -i 's/ALL$/NOPASSWD:ALL/' /etc/sudoers.d/ops")
