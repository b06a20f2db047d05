from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.hosts import (
    Host,
    find_hosts,
    forget_hosts,
    hosts_of_inventory,
    parse_host,
    parse_hosts,
    remember_hosts,
    remembered_hosts,
)
from mixtral_run.fleet.selection import inventory_of


@pytest.mark.parametrize(
    ("text", "user", "address", "port", "name"),
    [
        ("gpu-01", None, "gpu-01", None, "gpu-01"),
        ("ubuntu@gpu-01", "ubuntu", "gpu-01", None, "gpu-01"),
        ("ubuntu@gpu-02:2222", "ubuntu", "gpu-02", 2222, "gpu-02:2222"),
        ("gpu_03.example.org", None, "gpu_03.example.org", None, "gpu_03.example.org"),
        ("ops@[2001:db8::1]:22", "ops", "2001:db8::1", 22, "2001:db8::1:22"),
        ("2001:db8::1", None, "2001:db8::1", None, "2001:db8::1"),
        ("first.last@10.0.0.1", "first.last", "10.0.0.1", None, "10.0.0.1"),
    ],
)
def test_a_host_is_parsed(text: str, user: str | None, address: str, port: int | None, name: str) -> None:
    host = parse_host(text)
    assert (host.user, host.address, host.port, host.name) == (user, address, port, name)
    assert parse_host(host.target) == host


@pytest.mark.parametrize(
    "text",
    [
        "", "@gpu", "-oProxyCommand=touch /tmp/x", "ops@-oProxyCommand=x", "-l@gpu", "gpu 01", "gpu;reboot", "gpu$(id)",
        "gpu\n01", "gpu:port", "gpu:0", "gpu:70000", "gpu:", "gpu`id`", "u;v@gpu", "gpu/01", "gpu:２２",
    ],
)  # fmt: skip
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_host(text)
    assert caught.value.exit_code == 2


def test_all_problems_of_a_command_line_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hosts(["gpu-01", "gpu:x", "a b", "root@gpu-01"])
    assert len(caught.value.problems) == 3
    assert "named twice" in str(caught.value)


def test_an_ansible_name_has_no_colon_and_keeps_its_connection() -> None:
    host = parse_host("ubuntu@gpu-02:2222")
    assert host.inventory_name == "gpu-02-2222"
    assert host.ansible_variables() == {"ansible_host": "gpu-02", "ansible_user": "ubuntu", "ansible_port": 2222}
    jumping = dataclasses.replace(host, ssh_options=("-o", "ProxyCommand=ssh -W %h:%p bastion"))
    assert jumping.ansible_variables()["ansible_ssh_common_args"] == "-o 'ProxyCommand=ssh -W %h:%p bastion'"


LISTING = {
    "_meta": {
        "hostvars": {
            "gpu-01": {"ansible_host": "10.0.0.1", "ansible_user": "ops", "ansible_port": "2200"},
            "gpu-02": {"ansible_ssh_common_args": "-o ProxyJump=bastion -J 'a b'", "ansible_private_key_file": "/k"},
            "db": {},
        }
    },
    "all": {"children": ["ungrouped", "mixtral_hosts", "other"]},
    "mixtral_hosts": {"children": ["rack_1"], "hosts": ["gpu-02"]},
    "rack_1": {"hosts": ["gpu-01", "gpu-02"]},
    "other": {"hosts": ["db"]},
}


def test_an_inventorys_group_is_read_with_its_children() -> None:
    inventory = Path("/racks/hosts.yml")
    second, first = hosts_of_inventory(LISTING, inventory)
    assert first == Host("gpu-01", "10.0.0.1", "ops", 2200, inventory="/racks/hosts.yml")
    assert second == Host(
        "gpu-02",
        "gpu-02",
        identity_file="/k",
        ssh_options=("-o", "ProxyJump=bastion", "-J", "a b"),
        inventory="/racks/hosts.yml",
    )
    without_group = {key: value for key, value in LISTING.items() if key != "mixtral_hosts"}
    without_group["all"] = {"children": ["rack_1", "other"]}
    assert [host.name for host in hosts_of_inventory(without_group, inventory)] == ["gpu-01", "gpu-02", "db"]


def test_hosts_of_several_inventories_are_reported_apart() -> None:
    first, second = (
        Host("gpu-01", "10.0.0.1", inventory="/racks/a b.yml"),
        Host("gpu-02", "x", inventory="/racks/a b.yml"),
    )
    assert inventory_of([first, second]) == Path("/racks/a b.yml")
    assert inventory_of([parse_host("gpu-03")]) is None
    with pytest.raises(ConfigError) as caught:
        inventory_of([first, parse_host("gpu-03:2222"), second])
    assert caught.value.problems == (
        "mixtral-run bootstrap -i '/racks/a b.yml' --limit gpu-01,gpu-02",
        "mixtral-run bootstrap gpu-03:2222",
    )


def test_the_fleet_is_remembered_and_found_by_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first, second = parse_hosts(["ubuntu@gpu-01", "ops@gpu-02:2222"])
    remember_hosts([first])
    remember_hosts([second, first])
    assert remembered_hosts() == (first, second)
    assert find_hosts(["gpu-01,gpu-02"], remembered_hosts()) == (first, second)
    assert find_hosts(["root@gpu-01"], remembered_hosts()) == (parse_host("root@gpu-01"),)
    with pytest.raises(ConfigError) as caught:
        find_hosts(["gpu-01,gpu:x", "a b", "new-01", "root@new-01"], remembered_hosts())
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["'gpu", "'a b'", "new-01 is named twice"]
    forget_hosts([first])
    assert remembered_hosts() == (second,)
    assert (tmp_path / "mixtral-run").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "mixtral-run/hosts.json").stat().st_mode & 0o777 == 0o600
