"""State of a host that `up` reads over a real sshd, from files as the jobs write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig, UpConfig
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.hosts import parse_host
from mixtral_run.fleet.jobs.job_spec import JobOptions, make_spec
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.up import Done, _check_same_training, _settings_of, _what_is_done
from tests.hosts.conftest import HostMaker


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))


def test_what_is_done_is_read_with_its_records(light_hosts: HostMaker, tmp_path: Path) -> None:
    (made,) = light_hosts(1)
    host, folder = parse_host(made.target), tmp_path / "checkpoints, and more"
    options = JobOptions(checkpoints_folder=str(folder))
    bare = _what_is_done(Ssh(), host, UpConfig(mock_data=True), options)
    assert bare == Done(False, 0, False, {}, {}, {})
    # The echo of some shells would turn these into line breaks.
    odd = {"source": 'C:\\new\\t="ü"'}
    write(folder / "mixtral/latest_checkpointed_iteration.txt", "0\n")
    write(folder / "mixtral/mixtral_run.json", odd)
    write(folder / "adapter/latest_checkpointed_iteration.txt", "20\n")
    write(folder / "adapter/iter_0000020/mixtral_run.json", {"data_sha256": "abc"})
    write(folder / "adapter-peft/adapter_config.json", {})
    write(folder / "adapter-peft/mixtral_run.json", {"iteration": 10})
    found = _what_is_done(Ssh(), host, UpConfig(mock_data=True), options)
    assert found == Done(True, 20, True, {"data_sha256": "abc"}, odd, {"iteration": 10})
    assert found.export_is_old


def test_a_job_that_trains_on_something_else_is_not_followed(light_hosts: HostMaker, tmp_path: Path) -> None:
    (made,) = light_hosts(1)
    host, data = parse_host(made.target), tmp_path / "my.jsonl"
    data.write_text("first")
    config = FinetuneConfig(load=Path("mixtral"), save=Path("adapter"), data_path=(str(data),))
    spec = make_spec("finetune-1", "finetune", config, JobOptions(), 1)
    job = made.folder / "home/.local/state/mixtral-run/jobs/finetune-1"
    write(job / "config.json", spec.config_json())
    ((file, name),) = spec.files
    write(job / name, file.read_text())
    started = Done(True, 0, False, _settings_of(Ssh(), host, "finetune-1"))
    _check_same_training(host, config, started)
    data.write_text("second")
    with pytest.raises(ConfigError, match="trained on another file"):
        _check_same_training(host, config, started)
    assert _settings_of(Ssh(), host, "finetune-of-another-user") == {}
