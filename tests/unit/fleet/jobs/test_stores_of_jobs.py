"""Jobs whose checkpoints are in an object store: no path of the host, no mount, no fetch, and keys in no argument."""

import json
from pathlib import Path

import pytest

from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs import jobs
from mixtral_run.fleet.jobs.fetch import refuse_store
from mixtral_run.fleet.jobs.job_spec import JobOptions, container_argv, make_spec
from mixtral_run.fleet.jobs.serve import serve
from tests.unit.fleet.jobs.test_job_spec import FACTS

CONFIG = FinetuneConfig.from_mapping({"load": "s3://bucket/base", "save": "s3://bucket/run", "mock_data": True})


def test_a_url_is_no_path_of_the_host() -> None:
    spec = make_spec("j", "finetune", CONFIG, JobOptions(), 1)
    assert json.loads(spec.config_json())["save"] == "s3://bucket/run" and spec.mounts == ()
    argv = container_argv(spec, FACTS)
    assert "org.mixtral-run.output=s3://bucket/run" in argv
    again = FinetuneConfig.from_json(spec.config_json()).check()
    assert again.load == CONFIG.load and again.save == CONFIG.save
    export = ExportConfig(adapter=("s3://bucket/run:0.5", "own:0.5"), output_path=Path("out"))
    values = make_spec("j", "export", export, JobOptions(), 1).config
    assert values["adapter"] == ["s3://bucket/run:0.5", "/checkpoints/own:0.5"]


def test_the_list_of_jobs_shows_it_and_fetch_names_the_way() -> None:
    cells = ["j", "finetune", "exited", "0", "false", "2026-11-30T10:00:00Z", "s3://bucket/run", "1"]
    row = jobs._row(Host("gpu-01", "10.0.0.1"), "\t".join(cells))
    assert row.output == "s3://bucket/run"
    with pytest.raises(ConfigError, match="aws s3 cp --recursive s3://bucket/run"):
        refuse_store(row.job, row.output)
    refuse_store(row.job, "/checkpoints/run")


def test_several_hosts_need_a_folder_that_they_share() -> None:
    with pytest.raises(ConfigError, match="MIXTRAL_RUN_STORE_CACHE=/checkpoints/stores"):
        make_spec("j", "finetune", CONFIG, JobOptions(), 2)
    options = JobOptions(environment=("MIXTRAL_RUN_STORE_CACHE=/checkpoints/stores",))
    assert make_spec("j", "finetune", CONFIG, options, 2).num_hosts == 2


def test_keys_are_refused_as_arguments() -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY"):
        with pytest.raises(ConfigError) as error:
            JobOptions(environment=(f"{name}=neverShown",)).check()
        assert "store-credentials" in str(error.value) and "neverShown" not in str(error.value)
    JobOptions(environment=("AWS_ENDPOINT_URL=https://minio.example",)).check()


def test_a_server_takes_no_url_and_no_second_host() -> None:
    config = ServeConfig.from_mapping({"load": "s3://bucket/model"})
    with pytest.raises(ConfigError) as error:
        serve(config, JobOptions(on=("gpu-01",), min_hosts=1))
    assert "--load" in str(error.value) and "--min-hosts" in str(error.value)
