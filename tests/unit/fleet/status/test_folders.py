"""Folders that status reads: of the command line, else of the inventory or the last bootstrap, else the defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtral_run.fleet.bootstrap import bootstrap
from mixtral_run.fleet.host_folders import DEFAULT_FOLDERS
from mixtral_run.fleet.hosts import Host, hosts_of_inventory, parse_host, remember_hosts, remembered_hosts
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from mixtral_run.fleet.status.read_fleet import DEFAULT_IMAGE, read_fleet
from mixtral_run.fleet.status.read_runs import runs_on

ROOT = Path(__file__).parents[4]


def test_the_folders_of_a_host_are_read_and_the_command_line_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(_: Ssh, host: Host, argv: list[str], **__: Any) -> Answer:
        asked[host.name] = json.loads(argv[-1])
        return Answer(255, "", "lost")

    monkeypatch.setattr(Ssh, "run", run)
    variables = {
        "own": {"hf_cache_checkpoint_folder": "/data/c", "hf_cache_home": "/data/h"},
        "odd": {"hf_cache_checkpoint_folder": "{{ disk }}/c", "hf_cache_home": ["/x"]},
    }
    listing = {"_meta": {"hostvars": variables}, "all": {"hosts": ["own", "odd"]}}
    hosts = hosts_of_inventory(listing, Path("i.yml"))
    read_fleet(hosts)
    assert asked["own"] == {"image": DEFAULT_IMAGE, "checkpoints": "/data/c", "hf_home": "/data/h"}
    assert asked["odd"] == {"image": DEFAULT_IMAGE, **DEFAULT_FOLDERS._asdict()}
    read_fleet(hosts, folders={"checkpoints": "/other"})
    assert {values["checkpoints"] for values in asked.values()} == {"/other"} and asked["own"]["hf_home"] == "/data/h"
    runs_on(hosts, ["a"])
    assert asked == {"own": ["/data/c/a"], "odd": [DEFAULT_FOLDERS.checkpoints + "/a"]}
    runs_on(hosts, [], "/other")
    assert asked == {"own": ["/other"], "odd": ["/other"]}


def test_bootstrap_records_the_folders_and_a_later_job_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "v.yml").write_text("hf_cache_checkpoint_folder: /file\nhf_cache_home: /file/h\n")
    words = (f"@{tmp_path}/v.yml", "hf_cache_checkpoint_folder=/word")
    remember_hosts(bootstrap._with_folders([parse_host("ops@gpu-01")], words))
    remember_hosts([parse_host("gpu-01")])
    (host,) = remembered_hosts()
    assert (host.user, host.checkpoints_folder, host.hf_home) == (None, "/word", "/file/h")
    remember_hosts(bootstrap._with_folders([host], ()))
    (host,) = remembered_hosts()
    assert (host.checkpoints_folder, host.hf_home) == DEFAULT_FOLDERS
    from_inventory = Host("gpu-01", "x", inventory="/i.yml", checkpoints_folder="/inventory")
    assert bootstrap._with_folders([from_inventory], ())[0].checkpoints_folder == "/inventory"
    assert bootstrap._with_folders([from_inventory], words)[0].checkpoints_folder == "/word"


def test_an_inventory_without_folders_has_those_of_the_last_bootstrap_with_it(tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("all:\n  hosts:\n    gpu-01:\n    gpu-02:\n      hf_cache_home: /inventory/h\n")
    words = ("hf_cache_checkpoint_folder=/word", "hf_cache_home=/word/h")
    remember_hosts(bootstrap._with_folders(hosts_of((), inventory, None), words))
    first, second = hosts_of((), inventory, None)
    assert (first.checkpoints_folder, first.hf_home) == ("/word", "/word/h")
    assert (second.checkpoints_folder, second.hf_home) == ("/word", "/inventory/h")
    other = tmp_path / "other.yml"
    other.write_text(inventory.read_text())
    assert hosts_of(("gpu-01",), other, None)[0].checkpoints_folder is None


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        (
            {"hf_cache_checkpoint_folder": "{{ mixtral_checkpoint_folder }}", "mixtral_checkpoint_folder": "/data"},
            "/data",
        ),
        (
            {"hf_cache_checkpoint_folder": "{{disk}}/{{ name }}", "disk": "{{ root }}/d", "root": "/r", "name": 7},
            "/r/d/7",
        ),
        ({"hf_cache_checkpoint_folder": "{{ disk | default('/x') }}", "disk": "/d"}, None),
        ({"hf_cache_checkpoint_folder": "{{ missing }}/c"}, None),
        ({"hf_cache_checkpoint_folder": "{{ a }}", "a": "{{ hf_cache_checkpoint_folder }}"}, None),
        ({"hf_cache_checkpoint_folder": "{{ a }}", "a": "relative"}, None),
    ],
)
def test_templates_that_only_name_variables_are_resolved(variables: dict[str, Any], folder: str | None) -> None:
    assert Host("gpu-01", "gpu-01").with_folders(variables).checkpoints_folder == folder


def test_the_folder_of_the_example_inventory_is_known() -> None:
    variables = yaml.safe_load((ROOT / "inventory/group_vars/all.yml").read_text(encoding="utf-8"))
    assert Host("gpu-01", "gpu-01").with_folders(variables).checkpoints_folder == DEFAULT_FOLDERS.checkpoints
    changed = variables | {"mixtral_checkpoint_folder": "/data/checkpoints"}
    assert Host("gpu-01", "gpu-01").with_folders(changed).checkpoints_folder == "/data/checkpoints"


@pytest.mark.parametrize(
    ("words", "is_recorded"),
    [({}, True), ({"tags": ("hf_cache", "image")}, True), ({"tags": ("image",)}, False), ({"check": True}, False)],
)
def test_only_a_bootstrap_that_runs_the_role_records_folders(words: dict[str, Any], is_recorded: bool) -> None:
    assert bootstrap._sets_folders(bootstrap.BootstrapRequest(hosts=("gpu-01",), **words)) is is_recorded
