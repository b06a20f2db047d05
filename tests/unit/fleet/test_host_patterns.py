"""Choice of hosts: Ansible's own patterns choose the same hosts here, and `gpu-02:2222` stays a host with its port."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.fleet import selection
from mixtral_run.fleet.host_patterns import choose_hosts, split_patterns
from mixtral_run.fleet.hosts import groups_of, parse_hosts
from mixtral_run.fleet.plays import runner

NAMES = ("gpu-01", "gpu-02", "gpu-13", "cpu-01", "db.rack")
GROUPS = {
    "rack_1": ["gpu-01", "cpu-01"],
    "rack_2": ["gpu-02", "gpu-13"],
    "racks": ["gpu-01", "cpu-01", "gpu-02", "gpu-13"],
    "drained": [],
}
PATTERNS = (
    "all", "*", "gpu-*", "gpu-0?", "gpu-0[!3]", "gpu-*:!gpu-01", "gpu-*,!gpu-01", "!gpu-01,gpu-*", "rack_1",
    "rack_1:rack_2", "rack_*", "rack*", "racks:&gpu-*", "gpu-*,&rack_1", "racks:!rack_2", "racks:&gpu-*:!gpu-13",
    "rack_2[0]", "rack_2[1]", "racks[1:2]", "racks[1:]", "gpu-*[-1]", "~gpu-(01|13)", "~(g|c)pu-01", "!cpu-01",
    "&rack_1", "db.*", "gpu-01,gpu-01", "cpu-01,gpu-01", "all:!rack*", "~gpu-.*:!gpu-01", "all:!drained",
    "drained,gpu-01", "~g.u:cpu-01", "~c.u:*",
    "racks:!drained[0]", "rack_1,rack_2[0:0]", "racks[0:9]",
)  # fmt: skip


ASK = """
import json, sys
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
found = InventoryManager(loader=DataLoader(), sources=[sys.argv[1]])
print(json.dumps({pattern: [host.name for host in found.get_hosts(pattern)] for pattern in sys.argv[2:]}))
"""


@pytest.fixture(scope="module")
def ansible(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The hosts that Ansible selects by each pattern, of an inventory of the same hosts and groups.

    Asked in a process of its own: Ansible replaces functions of the interpreter, which torch does not expect.
    """
    file = tmp_path_factory.mktemp("inventory") / "hosts.ini"
    lines = [*NAMES]
    for group in ("rack_1", "rack_2"):
        lines += [f"[{group}]", *GROUPS[group]]
    file.write_text("\n".join([*lines, "[racks:children]", "rack_1", "rack_2", "[drained]", ""]))
    done = subprocess.run([sys.executable, "-c", ASK, str(file), *PATTERNS], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_selects_the_hosts_that_ansible_selects(pattern: str, ansible: Any) -> None:
    found = choose_hosts([pattern], parse_hosts(NAMES), GROUPS, others=False)
    assert ansible[pattern] and sorted(host.name for host in found) == sorted(ansible[pattern])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("gpu-02:2222", ["gpu-02:2222"]),
        ("ops@gpu-02:2222:!gpu-a:22", ["ops@gpu-02:2222", "!gpu-a:22"]),
        ("gpu-*:!gpu-a", ["gpu-*", "!gpu-a"]),
        ("a, b c", ["a", "b", "c"]),
        ("racks[1:2]:rack_1", ["racks[1:2]", "rack_1"]),
        ("[fe80::1]:22,::1", ["[fe80::1]:22", "::1"]),
        ("ops@fe80::1%eth0", ["ops@fe80::1%eth0"]),
        ("~gpu:1", ["~gpu:1"]),
        ("~gpu-(?:01|02):!gpu-01:~[ab:]:*", ["~gpu-(?:01|02)", "!gpu-01", "~[ab:]", "*"]),
    ],
)
def test_a_colon_before_digits_is_that_of_a_port(text: str, parts: list[str]) -> None:
    assert split_patterns(text) == parts


def test_hosts_with_ports_addresses_and_new_hosts_are_chosen() -> None:
    known = parse_hosts(["ops@gpu-02:2222", "10.0.0.1", "[fe80::1]:22"])

    def chosen(*words: str, others: bool = True) -> list[str]:
        return [host.target for host in choose_hosts(words, known, {}, others=others)]

    assert chosen("gpu-02:2222") == chosen("gpu-*") == chosen("all:!10.*:![[]*:!fe*") == ["ops@gpu-02:2222"]
    assert chosen("10.*", "new:2222,fe80::1") == ["10.0.0.1", "new:2222", "[fe80::1]:22"]
    assert chosen("[::1]:22") == ["[::1]:22"]
    for words, reported in (
        (("gpu-9*",), "gpu-9"), (("gpu-0*", "!gpu-99"), "gpu-99"), (("gpu-*:!gpu-*",), "none"),
        (("gpu-*[3]",), r"gpu-\*\[3\]"),
        (("new:x",), "new, x"), (("gpu-02:2222:nwe",), "nwe"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reported) as caught:
            chosen(*words)
        assert "gpu-02:2222" in str(caught.value.expected)
    with pytest.raises(ConfigError, match="new"):
        chosen("new", others=False)
    with pytest.raises(ConfigError, match="regular expression"):
        chosen("~(")


def test_groups_of_an_inventory_select_its_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listing = {
        "_meta": {"hostvars": {}}, "all": {"children": ["mixtral_hosts", "rack_1"]},
        "mixtral_hosts": {"hosts": ["gpu-01", "gpu-02"]}, "rack_1": {"children": ["top"], "hosts": []},
        "top": {"hosts": ["gpu-02", "db"]},
    }  # fmt: skip
    monkeypatch.setattr(runner, "read_inventory", lambda _: listing)

    def chosen(*words: str, limit: str | None = None) -> list[str]:
        return [host.name for host in selection.hosts_of(words, tmp_path, limit)]

    assert chosen() == chosen("mixtral_hosts") == ["gpu-01", "gpu-02"]
    assert chosen("rack_1") == chosen(limit="mixtral_hosts:&rack_1") == chosen("gpu-*", limit="!gpu-01") == ["gpu-02"]
    with pytest.raises(ConfigError) as caught:
        chosen("gpu-03")
    assert "gpu-01, gpu-02; groups: mixtral_hosts, rack_1, top" in str(caught.value.expected)


@pytest.mark.parametrize("pattern", ["rack_1[5]", "!rack_1[5]", "rack_1[0:-1]", "rack_1[:1]", "!drainde", "drained"])
def test_a_subscript_that_ansible_does_not_take_and_a_mistyped_group_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"matches no host|selects no host"):
        choose_hosts([pattern], parse_hosts(NAMES), GROUPS, others=False)


def test_characters_of_a_name_are_not_taken_for_a_range() -> None:
    """Ansible takes the first for the second and third host, and the other one for nothing."""
    with pytest.raises(ConfigError, match="two meanings"):
        choose_hosts(["gpu-*[1-2]"], parse_hosts(NAMES), GROUPS, others=False)
    found = choose_hosts(["gpu-0[1-2]"], parse_hosts(NAMES), GROUPS, others=False)
    assert [host.name for host in found] == ["gpu-01", "gpu-02"]


def test_hosts_of_an_inventory_are_in_the_order_of_ansible(tmp_path: Path) -> None:
    """Subscripts select by it: the hosts of a group, those of its children, then those of their children."""
    file = tmp_path / "hosts.ini"
    file.write_text("[a]\nx\n[b]\ny\n[deep]\nz\n[a:children]\ndeep\n[top:children]\na\nb\nnone\n[none]\n")
    words = ["ansible-inventory", "-i", str(file), "--list"]
    program = Path(sys.executable).parent / words[0]
    listing = json.loads(subprocess.run([program, *words[1:]], capture_output=True, text=True, check=True).stdout)
    asked = subprocess.run([sys.executable, "-c", ASK, str(file), "top"], capture_output=True, text=True, check=True)
    groups = groups_of(listing)
    assert groups["top"] == json.loads(asked.stdout)["top"] == ["x", "y", "z"]
    assert groups["none"] == []
