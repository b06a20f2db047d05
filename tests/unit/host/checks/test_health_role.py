"""What the role health writes on a host: firewall rules, units, and what it takes away again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

ROOT = Path(__file__).parents[4]
ROLE = ROOT / "roles/health"
WORDS: dict[str, Any] = {
    **yaml.safe_load((ROLE / "defaults/main.yml").read_text()),
    "__health_peers": ["10.0.0.11", "10.0.0.12"],
    "__health_ports": "32768-60999",
    "__health_program": "/opt/watch.py",
    "__health_record": "/var/health.json",
}


def rendered(name: str, **more: Any) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters |= {"bool": bool, "dirname": lambda path: path.rpartition("/")[0]}
    return environment.from_string((ROLE / "templates" / name).read_text()).render(**{**WORDS, **more})


def tasks(name: str) -> list[dict[str, Any]]:
    """All tasks of a file, also those within blocks."""
    found = []
    todo = yaml.safe_load((ROLE / "tasks" / name).read_text())
    while todo:
        task = todo.pop(0)
        found.append(task)
        todo += task.get("block", [])
    return found


def test_the_rules_are_those_of_the_documentation() -> None:
    shown = (ROOT / "docs/fleet.md").read_text().partition("```nft\n")[2].partition("```")[0]
    assert rendered("peers.nft").partition("\n")[2].rstrip() == shown.rstrip()


def test_ssh_and_running_connections_are_never_refused() -> None:
    text = rendered("peers.nft", ansible_port="50022", health_rendezvous_port="29555", __health_ports="20000-65000")
    lines = [line.strip() for line in text.splitlines()]
    first = lines.index("tcp dport 29555 reject with tcp reset")
    assert lines[first + 1] == "tcp dport 20000-65000 reject with tcp reset"
    for admitted in ("ct state established,related accept", "tcp dport 50022 accept", "ip saddr @peers accept"):
        assert lines.index(admitted) < first
    assert "auto-merge;" in text, "a network and an address in it are one interval"


def test_lists_and_numbers_may_be_text() -> None:
    lists = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    environment = jinja2.Environment()
    peers = environment.from_string(lists["__health_peers"])
    for given in ("10.0.0.11, 10.1.0.0/16,", ["10.0.0.11", "10.1.0.0/16"]):
        assert peers.render(health_peers=given) == "['10.0.0.11', '10.1.0.0/16']"
    words = {"health_watch_interval_minutes": "7", "health_watch_settle_minutes": "10", "__health_metrics": ""}
    assert "--interval-seconds 420 --settle-seconds 600\n" in rendered("health.service", **words)
    assert "OnUnitActiveSec=7min" in rendered("health.timer", **words)


def test_the_rules_are_there_before_the_network_and_after_those_of_the_host() -> None:
    words = {"__health_rules": "/etc/peers.nft", "__health_rules_checksum": "0a1b"}
    text = rendered("peers.service", **words)
    pairs = {tuple(line.split("=", 1)) for line in text.splitlines() if "=" in line and not line.startswith("#")}
    assert {
        ("DefaultDependencies", "no"), ("Before", "network-pre.target shutdown.target"),
        ("Conflicts", "shutdown.target"), ("PartOf", "nftables.service"), ("ReloadPropagatedFrom", "nftables.service"),
        ("After", "local-fs.target systemd-modules-load.service nftables.service"),
        ("ExecReload", "/usr/sbin/nft -f /etc/peers.nft"),
    } <= pairs  # fmt: skip
    assert text != rendered("peers.service", **{**words, "__health_rules_checksum": "2c3d"})
    (load,) = [task for task in tasks("present.yml") if task["name"] == "Load the rules"]
    assert "'reloaded'" in load["ansible.builtin.systemd_service"]["state"], "a restart leaves the ports open meanwhile"


def test_what_is_loaded_follows_from_what_systemd_has_read() -> None:
    loads = [each["ansible.builtin.systemd_service"] for each in tasks("present.yml")
             if "daemon_reload" in each.get("ansible.builtin.systemd_service", {})]  # fmt: skip
    assert len(loads) == 3
    assert all("__health_unread" in load[name] for load in loads for name in ("state", "daemon_reload"))


def test_folders_that_others_use_are_never_removed_with_what_is_in_them() -> None:
    for name in ("absent.yml", "unwatch.yml"):
        for task in tasks(name):
            module = task.get("ansible.builtin.file", {})
            removed = [module["path"], *task.get("loop", [])] if module.get("state") == "absent" else []
            assert not any("dirname" in path for path in removed)


def test_flags_that_the_host_gives_its_exporter_are_recognized() -> None:
    pattern = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__health_own_flags"]
    for line in ('ARGS="--web.listen-address=:9101"', "  --collector.textfile.directory=/var/lib/x \\"):
        assert re.search(pattern, line)
    for line in (
        'ARGS=""',
        "#  --web.listen-address=:9100",
        'ARGS="--collector.textfile"',
        'ARGS="--web.config.file=/x"',
    ):
        assert not re.search(pattern, line)


def test_services_that_were_disabled_are_remembered() -> None:
    shown = "\n\n".join(
        f"Id={name}\nActiveState={active}\nUnitFileState={state}\nNeedDaemonReload=no"
        for name, active, state in (
            ("prometheus-node-exporter.service", "active", "enabled"), ("chrony.service", "inactive", "disabled"),
            ("nvidia-dcgm.service", "active", "disabled"), ("nvidia-dcgm-exporter.service", "inactive", ""),
            ("mixtral-run-health.timer", "inactive", "disabled"),
        )
    )  # fmt: skip
    environment = jinja2.Environment()
    environment.filters["regex_findall"] = lambda text, pattern: re.findall(pattern, text)
    environment.tests["search"] = lambda text, pattern: re.search(pattern, text) is not None
    text = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__health_disabled"]
    found = environment.from_string(text).render(__health_units_before={"stdout": shown})
    assert found == "['chrony.service inactive', 'nvidia-dcgm.service active']"
