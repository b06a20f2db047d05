"""Settings of a job at both sides of each bound, and the words of its container, written by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.generate import ChatConfig, GenerateConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.trial import SmokeConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig, VerifyConfig
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs import engine_command, job_spec, jobs, taking
from mixtral_run.fleet.jobs.container_paths import hides_image, mount_for, path_inside
from mixtral_run.fleet.jobs.host_facts import HostFacts
from mixtral_run.fleet.jobs.job_spec import (
    Container,
    JobOptions,
    JobSpec,
    bind,
    container_argv,
    host_path,
    make_spec,
    torchrun_words,
)
from mixtral_run.fleet.jobs.jobs import JobRow, RunningJob

HOST = Host("gpu-1", "10.0.0.1", user="ops", port=2222)


FACTS = HostFacts(folder="/home/ops/jobs", kernels="/k", num_gpus=4)


def finetune(**more: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"load": Path("m"), "save": Path("s"), "mock_data": True, **more})


def test_what_is_assumed_where_nothing_is_said() -> None:
    assert dataclasses.asdict(HostFacts()) == {
        "docker": ("docker",), "uid": 1000, "gid": 1000, "group_of_checkpoints": None, "folder": "", "kernels": "",
        "num_gpus": 0, "cdi": False, "address": "", "interface": "", "rdma": (), "bridges": (), "rdma_group": None,
        "folders": ("/var/lib/mixtral-run/checkpoints", "/var/lib/mixtral-run/huggingface"),
    }  # fmt: skip
    assert dataclasses.asdict(JobOptions()) == {
        "on": (), "inventory": None, "image": "mixtral-run:local", "shm_size": "32g", "environment": (),
        "ulimits": ("memlock=-1", "stack=67108864", "nofile=1048576:1048576"),
        "checkpoints_folder": None, "hf_home": None, "min_hosts": None, "max_restarts": None,
        "nccl_debug": None, "nccl_timeout": None, "rendezvous_address": None,
        "rendezvous_port": 29400, "detach": False, "wait": None, "share": False,
    }  # fmt: skip
    assert dataclasses.asdict(Container()) == {"attach": ("--detach",), "program": None, "more": (), "environment": {}}
    spec = JobSpec(name="n", verb="v", config={}, options=JobOptions())
    assert (spec.num_hosts, spec.rendezvous, spec.mounts, spec.files, spec.output) == (1, "", (), (), None)
    row = JobRow("j", "v", HOST, "exited", 0, False, "", "")
    assert (row.num_hosts, row.running) == (1, False) and RunningJob("j", "v", (HOST,)).addresses == {}
    assert (job_spec.STOP_SECONDS, job_spec.RENDEZVOUS_PORT, jobs.KEPT_CONTAINERS) == (330, 29400, 10)
    assert (jobs.KILLED, jobs.SIGNALLED, taking.BUSY, taking.CORDONED, taking.ANSWER_SECONDS) == (
        137, (130, 143), 75, 76, 20,
    )  # fmt: skip
    assert engine_command.PORT_INSIDE == 8000 and taking.BusyError("x").jobs == ()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"shm_size": "1"}, None), ({"shm_size": "64gb"}, None), ({"shm_size": "0g"}, "--shm-size"),
        ({"image": "/a:b@c"}, None), ({"image": "//a"}, "--image"), ({"image": ""}, "--image"),
        ({"environment": ("A=",)}, None), ({"environment": ("A",)}, "--env: expected NAME=VALUE; found 'A'"),
        ({"environment": ("1=2",)}, "--env: expected NAME=VALUE; found '1=2'"),
        ({"environment": ("A_TOKEN=x",)}, "--env A_TOKEN: `docker inspect`"),
        ({"ulimits": ("none",)}, None), ({"ulimits": ("none", "a=1")}, "--ulimit"), ({"ulimits": ("a=-1:-1",)}, None),
        ({"ulimits": ()}, None), ({"ulimits": ("rtprio=x",)}, "--ulimit"),
        ({"checkpoints_folder": "a"}, "--checkpoints-folder"), ({"hf_home": "a"}, "--hf-home"),
        ({"wait": "forever"}, None), ({"wait": "999999"}, None), ({"wait": "1234567"}, "--wait"),
        ({"share": True}, None), ({"wait": "1m", "share": True}, "--wait, --share: expected one of them; found both"),
        ({"min_hosts": 1}, None), ({"detach": True}, None),
        ({"min_hosts": 1, "detach": True}, "--min-hosts: expected no --detach"),
        ({"nccl_timeout": 60}, None), ({"nccl_timeout": 61}, None),
        ({"nccl_timeout": 59}, "at least 60 seconds; found 59"),
    ],
)  # fmt: skip
def test_each_setting_by_itself(given: dict[str, Any], problem: str | None) -> None:
    if problem is None:
        JobOptions(**given).check()
        return
    with pytest.raises(ConfigError, match="Some settings of the job are wrong") as caught:
        JobOptions(**given).check()
    (found,) = caught.value.problems
    assert problem in found


@pytest.mark.parametrize(
    ("restarts", "num_hosts", "expected"),
    [(None, 1, False), (0, 1, False), (1, 1, True), (2, 1, True), (1, 2, False), (None, 2, False), (0, 0, False)],
)
def test_who_starts_a_container_again(restarts: int | None, num_hosts: int, expected: bool) -> None:
    assert JobOptions(max_restarts=restarts).restarts_container(num_hosts) is expected


@pytest.mark.parametrize(("seconds", "minutes"), [(60, 1), (61, 2), (119, 2), (120, 2), (181, 4)])
def test_a_time_in_whole_minutes(seconds: int, minutes: int) -> None:
    spec = make_spec("j", "finetune", finetune(), JobOptions(nccl_timeout=seconds), 1)
    assert spec.config["distributed_timeout_minutes"] == minutes
    # A verb without processes has no such setting.
    convert = ConvertConfig(hf_model_path="/h/m", output_path=Path("x"))
    spec = make_spec("j", "convert", convert, JobOptions(nccl_timeout=seconds), 1)
    assert "distributed_timeout_minutes" not in spec.config
    assert "distributed_timeout_minutes" in make_spec("j", "finetune", finetune(), JobOptions(), 1).config


def test_the_file_of_a_job_by_hand() -> None:
    spec = JobSpec(
        name="j", verb="v", config={"resume": None, "a": "é", "b": 1, "c": 2},
        defaults={"resume": None, "b": 1, "c": 3}, options=JobOptions(),
    )  # fmt: skip
    assert spec.config_json() == '{\n  "resume": null,\n  "a": "é",\n  "c": 2\n}\n'


@pytest.mark.parametrize(
    ("config", "output"),
    [
        ({"save": "/a", "output_path": "/b"}, "/a"), ({"save": None, "output_path": "/b", "output": "/d"}, "/b"),
        ({"work_path": "/c", "output": "/d"}, "/c"), ({"output": "/d"}, "/d"), ({"load": "/e"}, None),
    ],
)  # fmt: skip
def test_the_output_of_a_job(config: dict[str, Any], output: str | None) -> None:
    assert JobSpec(name="j", verb="v", config=config, options=JobOptions()).output == output


def test_which_folders_are_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_spec._outermost(dict.fromkeys(("/a/b", "/a", "/ab", "/c", "/a/b/c"))) == ("/a", "/ab", "/c")
    assert [path_inside(each, "--x") for each in ("a/b", "/a/b")] == ["/checkpoints/a/b", "/a/b"]
    for inside in ("/checkpoints", "/checkpoints/x", "/huggingface", "/huggingface/x"):
        assert mount_for(inside, True, "--x") is mount_for(inside, False, "--x") is None
    assert mount_for("/checkpoints2/x", False, "--x") == "/checkpoints2"
    assert mount_for("/huggingface2", False, "--x") == "/huggingface2"
    assert (mount_for("/opt/x", False, "--x"), mount_for("/data/x/y", True, "--x")) == ("/opt/x", "/data/x")
    for path, written in (("/opt/x", True), ("/usr", False), ("/usr/bin", False), ("/", False)):
        with pytest.raises(ConfigError, match="it would hide a folder of the container") as caught:
            mount_for(path, written, "--x")
        assert caught.value.found == path
    hidden = {"/": True, "/bin": True, "/usr": True, "/usr/bin": True, "/usr/bin/x": False, "/us": False, "/zz": False,
              "/a": False, "/lib64": True, "/lib6": False}  # fmt: skip
    assert {each: hides_image(each) for each in hidden} == hidden
    # A folder of data that is here as well, but named absolutely, is the host's.
    absolute = make_spec("j", "finetune", finetune(mock_data=False, data_path=(str(tmp_path),)), JobOptions(), 1)
    assert absolute.config["data_path"] == [str(tmp_path)] and absolute.mounts == (str(tmp_path.parent),)
    monkeypatch.chdir(tmp_path)
    relative = make_spec("j", "finetune", finetune(mock_data=False, data_path=("x.jsonl",)), JobOptions(), 1)
    assert relative.config["data_path"] == ["/checkpoints/x.jsonl"] and relative.mounts == ()
    inputs = make_spec("j", "finetune", finetune(mock_data=False, data_path=("/opt/x.jsonl",)), JobOptions(), 1)
    assert inputs.mounts == ("/opt/x.jsonl",)
    adapters = ExportConfig(adapter=("/opt/a:0.5",), output_path=Path("p"))
    assert make_spec("j", "export", adapters, JobOptions(), 1).mounts == ("/opt/a",)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("question,answer\na,b\n")
    two = make_spec("j", "finetune", finetune(mock_data=False, data_path=("a.csv", "b.csv")), JobOptions(), 1)
    assert two.config["data_path"] == ["/job/data_path-001.csv", "/job/data_path-002.csv"]
    smoke = make_spec("j", "smoke", SmokeConfig(load=Path("/data/l"), work_path=Path("w")), JobOptions(), 1)
    assert smoke.mounts == ("/data",)
    (tmp_path / "hf").mkdir()
    named = ConvertConfig(hf_model_path="hf/x", output_path=Path("/out/x"))
    assert make_spec("j", "convert", named, JobOptions(), 1).mounts == ("/out",)


def test_paths_of_both_folders_on_the_host() -> None:
    folders = JobOptions(checkpoints_folder="/c", hf_home="/h").folders()
    found = {
        each: host_path(each, folders)
        for each in ("/checkpoints", "/checkpoints/a", "/huggingface/a/b", "/huggingface", "/huggingface2", "/x")
    }
    assert list(found.values()) == ["/c", "/c/a", "/h/a/b", "/h", "/huggingface2", "/x"]
    assert bind("/a", "/b") == ["--mount", "type=bind,source=/a,target=/b"]
    assert bind("/a", "/b", read_only=True) == ["--mount", "type=bind,source=/a,target=/b,readonly"]


def test_a_container_without_gpus_and_with_words_of_its_own() -> None:
    """The group of the checkpoints folder is that of the user, and no limits are asked for."""
    spec = JobSpec(name="j", verb="v", config={}, options=JobOptions(ulimits=("none",)))
    facts = dataclasses.replace(FACTS, num_gpus=0, uid=7, gid=8, group_of_checkpoints=8)
    container = Container(attach=("--rm",), program=("sh", "-l"), more=("--publish", "1:2"), environment={"A": "b"})
    assert container_argv(spec, facts, container) == [
        "docker", "run", "--rm", "--init", "--name", "j", "--label", "org.mixtral-run.job=j",
        "--label", "org.mixtral-run.verb=v", "--label", "org.mixtral-run.num_hosts=1",
        "--read-only", "--tmpfs", "/tmp:exec,mode=1777", "--tmpfs", "/home/mixtral:exec,mode=1777",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "16384",
        "--shm-size", "32g", "--stop-timeout", "330", "--user", "7:8",
        "--mount", "type=bind,source=/var/lib/mixtral-run/checkpoints,target=/checkpoints",
        "--mount", "type=bind,source=/var/lib/mixtral-run/huggingface,target=/huggingface",
        "--mount", "type=bind,source=/home/ops/jobs/j,target=/job,readonly",
        "--mount", "type=bind,source=/k,target=/kernels",
        "--workdir", "/checkpoints", "--publish", "1:2", "--env", "A=b", "--env", "PYTHONUNBUFFERED=1",
        "--env", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=390", "--env", "TRITON_CACHE_DIR=/kernels",
        "mixtral-run:local", "sh", "-l",
    ]  # fmt: skip
    for limit in ("rtprio=5", "core=0"):
        limited = dataclasses.replace(spec, options=JobOptions(ulimits=(limit,)))
        assert container_argv(limited, facts).count("--ulimit") == container_argv(limited, facts).count(limit) == 1
    for group in (None, 8, 9, 7):
        argv = container_argv(spec, dataclasses.replace(facts, group_of_checkpoints=group))
        assert ("--group-add" in argv) is (group in (9, 7))


@pytest.mark.parametrize(
    ("own", "num_gpus", "processes"), [(None, 0, "2"), (None, 1, "1"), (None, 4, "4"), (3, 8, "3"), (1, 8, "1")]
)
def test_the_processes_of_a_host(own: int | None, num_gpus: int, processes: str) -> None:
    spec = JobSpec(
        name="j", verb="v", config={"nproc_per_node": own}, options=JobOptions(), num_hosts=3, rendezvous="a:1"
    )
    assert torchrun_words(spec, dataclasses.replace(FACTS, num_gpus=num_gpus), ["x"]) == [
        "python", "-m", "mixtral_run.launch.torchrun", "--nnodes", "3", "--nproc-per-node", processes,
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "a:1", "--rdzv-id", "j", "--max-restarts", "0", "x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "group", "limits", "expected"),
    [
        ((), None, ("none",), []),
        (("m",), None, ("none",), ["--device", "/dev/infiniband", "--ulimit", "memlock=-1"]),
        (("m",), 0, ("memlock=5",), ["--device", "/dev/infiniband", "--group-add", "0"]),
        (("m",), 4, ("stack=1",), ["--device", "/dev/infiniband", "--group-add", "4", "--ulimit", "memlock=-1"]),
    ],
)
def test_devices_for_nccl(
    devices: tuple[str, ...], group: int | None, limits: tuple[str, ...], expected: list[str]
) -> None:
    facts = dataclasses.replace(FACTS, rdma=devices, rdma_group=group)
    assert job_spec._rdma(JobOptions(ulimits=limits), facts) == expected


def test_values_that_are_no_paths_stay() -> None:
    chat = make_spec("j", "chat", ChatConfig(load=Path("m"), system="/opt/x"), JobOptions(), 1)
    assert (chat.config["system"], chat.mounts) == ("/opt/x", ())
    texts = GenerateConfig(load=Path("m"), prompt=("a", "/b"))
    assert make_spec("j", "generate", texts, JobOptions(), 1).config["prompt"] in (["a", "/b"], ("a", "/b"))
    assert make_spec("j", "verify", VerifyConfig(load=Path("a/b")), JobOptions(), 1).config["load"] == "a/b"
    assert make_spec("j", "verify", VerifyConfig(load=Path("/opt/m")), JobOptions(), 1).mounts == ("/opt/m",)
    assert container_argv(chat, FACTS)[-4:] == ["mixtral-run", "chat", "--config", "/job/config.json"]
