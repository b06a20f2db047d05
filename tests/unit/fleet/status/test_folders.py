"""Folders that status reads: of the command line, else of the inventory or the last bootstrap, else the defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.fleet.bootstrap import bootstrap
from mixtral_run.fleet.hosts import Host, hosts_of_inventory, parse_host, remember_hosts, remembered_hosts
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from mixtral_run.fleet.status.read_fleet import DEFAULT_FOLDERS, read_fleet
from mixtral_run.fleet.status.read_runs import runs_on


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
    assert asked["own"] == {**DEFAULT_FOLDERS, "checkpoints": "/data/c", "hf_home": "/data/h"}
    assert asked["odd"] == DEFAULT_FOLDERS
    read_fleet(hosts, folders={"checkpoints": "/other"})
    assert {values["checkpoints"] for values in asked.values()} == {"/other"} and asked["own"]["hf_home"] == "/data/h"
    runs_on(hosts, ["a"])
    assert asked == {"own": ["/data/c/a"], "odd": [DEFAULT_FOLDERS["checkpoints"] + "/a"]}
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
    assert (host.checkpoints_folder, host.hf_home) == (DEFAULT_FOLDERS["checkpoints"], DEFAULT_FOLDERS["hf_home"])
    from_inventory = Host("gpu-01", "x", inventory="/i.yml", checkpoints_folder="/inventory")
    assert bootstrap._with_folders([from_inventory], ())[0].checkpoints_folder == "/inventory"
    assert bootstrap._with_folders([from_inventory], words)[0].checkpoints_folder == "/word"
