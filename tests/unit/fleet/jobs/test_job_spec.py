from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.evaluate import EvaluateConfig
from mixtral_run.config.verbs.generate import ChatConfig, GenerateConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.trial import RehearseConfig, SmokeConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig, VerifyConfig
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.host_folders import HostFolders
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.host_facts import FACTS_SCRIPT, HostFacts, check_same_gpus, parse_facts
from mixtral_run.fleet.jobs.job_spec import ALWAYS_SENT, JobOptions, bind, container_argv, host_path, make_spec

FACTS = HostFacts(
    uid=1001, gid=1002, group_of_checkpoints=1000, folder="/home/ops/jobs", kernels="/k,2", num_gpus=8, cdi=True
)


def finetune(**more: object) -> FinetuneConfig:
    return FinetuneConfig(**{"load": Path("mixtral"), "save": Path("/data/out/my adapter"), "mock_data": True, **more})


def test_the_container_of_a_job() -> None:
    spec = make_spec("finetune-1", "finetune", finetune(), JobOptions(nccl_debug="INFO", environment=("A=b c",)), 1)
    assert container_argv(spec, FACTS) == [
        "docker", "run", "--detach", "--init", "--name", "finetune-1",
        "--label", "org.mixtral-run.job=finetune-1", "--label", "org.mixtral-run.verb=finetune",
        "--label", "org.mixtral-run.num_hosts=1", "--label", "org.mixtral-run.output=/data/out/my adapter",
        "--device", "nvidia.com/gpu=all",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "16384",
        "--shm-size", "32g", "--stop-timeout", "330",
        "--ulimit", "memlock=-1", "--ulimit", "stack=67108864", "--ulimit", "nofile=1048576:1048576",
        "--user", "1001:1002", "--group-add", "1000",
        "--mount", "type=bind,source=/var/lib/mixtral-run/checkpoints,target=/checkpoints",
        "--mount", "type=bind,source=/var/lib/mixtral-run/huggingface,target=/huggingface",
        "--mount", "type=bind,source=/home/ops/jobs/finetune-1,target=/job,readonly",
        "--mount", 'type=bind,"source=/k,2",target=/kernels',
        "--mount", "type=bind,source=/data/out,target=/data/out",
        "--workdir", "/checkpoints", "--env", "PYTHONUNBUFFERED=1", "--env", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=390",
        "--env", "TRITON_CACHE_DIR=/kernels", "--env", "NCCL_DEBUG=INFO", "--env", "A=b c",
        "mixtral-run:local", "mixtral-run", "finetune", "--config", "/job/config.json",
    ]  # fmt: skip


def test_a_container_that_is_started_again() -> None:
    options = JobOptions(max_restarts=4)
    argv = container_argv(make_spec("j", "finetune", finetune(), options, 1), FACTS)
    assert argv[argv.index("--restart") + 1] == "on-failure:4"
    assert "type=bind,source=/home/ops/jobs/j/state,target=/job-state" in argv
    assert argv[argv.index("mixtral-run:local") + 1 :] == [
        "python", "-m", "mixtral_run.launch.restarts", "/job-state", "--resumes",
        "mixtral-run", "finetune", "--config", "/job/config.json",
    ]  # fmt: skip
    convert = ConvertConfig(hf_model_path="/models/hf", output_path=Path("x"))
    assert "--resumes" not in container_argv(make_spec("j", "convert", convert, options, 1), FACTS)
    # The containers of several hosts must start at the same time: the launcher starts them again.
    several = container_argv(make_spec("j", "finetune", finetune(), options, 2, "10.0.0.1:29400"), FACTS)
    assert "--restart" not in several and "mixtral_run.launch.restarts" not in several
    assert "--restart" not in container_argv(
        make_spec("j", "finetune", finetune(), JobOptions(max_restarts=0), 1), FACTS
    )


def test_without_gpus_none_are_asked_for_and_without_cdi_all_by_the_runtime() -> None:
    spec = make_spec("j", "finetune", finetune(), JobOptions(), 1)
    none = container_argv(spec, dataclasses.replace(FACTS, num_gpus=0))
    assert "--gpus" not in none
    assert "--device" not in none
    # NVIDIA's hooks fail in a read-only root; without GPUs there are none.
    assert "--read-only" in none and none.count("--tmpfs") == 2
    assert "--read-only" not in container_argv(spec, FACTS)
    runtime = container_argv(spec, dataclasses.replace(FACTS, cdi=False))
    assert runtime[runtime.index("--gpus") + 1] == "all"


def test_sudo_stands_before_docker_where_it_is_needed() -> None:
    spec = make_spec("j", "finetune", finetune(), JobOptions(), 1)
    assert container_argv(spec, dataclasses.replace(FACTS, docker=("sudo", "-n", "docker")))[:4] == [
        "sudo",
        "-n",
        "docker",
        "run",
    ]


def test_several_hosts_meet_at_the_first() -> None:
    spec = make_spec("j", "finetune", finetune(), JobOptions(nccl_timeout=3600), 2, "10.0.0.1:29400")
    argv = container_argv(spec, dataclasses.replace(FACTS, address="10.0.0.2", interface="eth1"))
    assert {"GLOO_SOCKET_IFNAME=eth1", "NCCL_SOCKET_IFNAME==eth1"} <= set(argv)
    assert argv[argv.index("--network") + 1] == "host"
    assert argv[argv.index("python") :] == [
        "python", "-m", "mixtral_run.launch.torchrun",
        "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "10.0.0.1:29400", "--rdzv-id", "j", "--local-addr", "10.0.0.2",
        "--max-restarts", "0", "-m", "mixtral_run", "finetune", "--config", "/job/config.json",
    ]  # fmt: skip
    assert spec.config["distributed_timeout_minutes"] == 60


def test_paths_are_the_hosts_and_files_that_lie_here_are_sent(tmp_path: Path) -> None:
    data = tmp_path / "my data.jsonl"
    data.write_text("{}")
    own = finetune(mock_data=False, data_path=(str(data),), valid_data_path=(str(data),))
    spec = make_spec("j", "finetune", own, JobOptions(), 1)
    assert spec.config["data_path"] == ["/job/data_path.jsonl"]
    assert spec.config["valid_data_path"] == ["/job/valid_data_path.jsonl"]
    assert spec.files == ((data, "data_path.jsonl"), (data, "valid_data_path.jsonl"))
    assert spec.config["load"] == "/checkpoints/mixtral"
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    sent = make_spec("j", "finetune", finetune(chat_template=str(template)), JobOptions(), 1)
    assert (sent.config["chat_template"], sent.files) == (
        "/job/chat_template.jinja",
        ((template, "chat_template.jinja"),),
    )
    assert make_spec("j", "finetune", finetune(chat_template="mixtral"), JobOptions(), 1).mounts == ("/data/out",)
    there = make_spec("j", "finetune", finetune(mock_data=False, data_path=("/data/set.jsonl",)), JobOptions(), 1)
    assert there.config["data_path"] == ["/data/set.jsonl"]
    assert there.mounts == ("/data",)


def test_each_source_of_data_finds_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "my.csv"
    data.write_text("question,answer\na,b\n")
    texts = (f"{data}:2", "OWNER/NAME@v1:train:0.5", "/data/set:1", str(data) + ":.5")
    spec = make_spec("j", "finetune", finetune(mock_data=False, data_path=texts), JobOptions(), 1)
    assert spec.config["data_path"] == [
        "/job/data_path-001.csv:2", "OWNER/NAME@v1:train:0.5", "/data/set:1", "/job/data_path-004.csv:.5"
    ]  # fmt: skip
    assert spec.files == ((data, "data_path-001.csv"), (data, "data_path-004.csv")) and spec.mounts == ("/data",)
    (tmp_path / "folder").mkdir()
    for text, words in (("-", "Standard input is not sent"), ("folder", "A folder of data is not sent to a host")):
        with pytest.raises(ConfigError, match=words):
            make_spec("j", "finetune", finetune(mock_data=False, data_path=(text,)), JobOptions(), 1)


def test_adapters_with_weights_are_mounted() -> None:
    config = ExportConfig(adapter=("one:0.7", "/data/two:-3e-1"), output_path=Path("peft"))
    spec = make_spec("j", "export", config, JobOptions(), 1)
    assert spec.config["adapter"] == ["/checkpoints/one:0.7", "/data/two:-3e-1"]
    assert spec.mounts == ("/data",)


def test_a_model_by_name_is_left_alone_and_one_by_folder_is_mounted() -> None:
    named = ConvertConfig(hf_model_path="mistralai/Mixtral-8x7B-v0.1", output_path=Path("/checkpoints/x"))
    assert make_spec("j", "convert", named, JobOptions(), 1).config["hf_model_path"] == "mistralai/Mixtral-8x7B-v0.1"
    folder = ConvertConfig(hf_model_path="/models/hf/mixtral", output_path=Path("x"))
    assert make_spec("j", "convert", folder, JobOptions(), 1).mounts == ("/models/hf",)


@pytest.mark.parametrize(("path", "mount"), [("/opt/models", "/opt/models"), ("/home/base", "/home/base")])
def test_an_input_does_not_hide_the_image(path: str, mount: str) -> None:
    config = ConvertConfig(hf_model_path=path, output_path=Path("x"))
    assert make_spec("j", "convert", config, JobOptions(), 1).mounts == (mount,)
    assert make_spec("j", "finetune", finetune(load=Path(path), save=Path("x")), JobOptions(), 1).mounts == (mount,)


@pytest.mark.parametrize(
    "path", ["/opt/out", "/opt", "/opt/mixtral-run/out", "/home/out", "/usr/local/out", "/etc/out", "/job"]
)
def test_an_output_whose_folder_would_hide_the_image_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"--save(.|\n)*/data/NAME"):
        make_spec("j", "finetune", finetune(save=Path(path)), JobOptions(), 1)
    config = SmokeConfig(load=Path(path), work_path=Path("x"))
    with pytest.raises(ConfigError, match="--load"):
        make_spec("j", "smoke", config, JobOptions(), 1)


@pytest.mark.parametrize(
    ("path", "mount"), [("/out", "/out"), ("/home/ubuntu/out", "/home/ubuntu"), ("/opt/a/b", "/opt/a")]
)
def test_an_output_elsewhere_has_its_folder(path: str, mount: str) -> None:
    assert make_spec("j", "finetune", finetune(save=Path(path)), JobOptions(), 1).mounts == (mount,)


def test_a_path_that_climbs_is_refused() -> None:
    with pytest.raises(ConfigError, match="--load"):
        make_spec("j", "finetune", finetune(load=Path("../../etc")), JobOptions(), 1)


def test_words_of_prompts_stay_in_the_file() -> None:
    config = GenerateConfig(load=Path("m"), prompt=("'; rm -rf / #", "$(id)"))
    spec = make_spec("j", "generate", config, JobOptions(), 1)
    assert not any("rm -rf" in word or "$(id)" in word for word in container_argv(spec, FACTS))
    assert "rm -rf" in spec.config_json()


def test_an_image_of_an_earlier_kit_gets_no_default_that_it_may_not_know() -> None:
    sent = json.loads(make_spec("j", "finetune", finetune(seed=7), JobOptions(), 1).config_json())
    assert sent == {
        "load": "/checkpoints/mixtral", "save": "/data/out/my adapter", "mock_data": True, "seed": 7,
        # These had other defaults before.
        "tensor_model_parallel_size": None, "expert_model_parallel_size": None, "layout": None, "resume": None,
        "train_iters": None, "data_path": [], "valid_data_path": [], "clip_grad": 1.0,
    }  # fmt: skip
    asked = make_spec("j", "finetune", finetune(attention_precision="fp8"), JobOptions(), 1).config_json()
    assert FinetuneConfig.from_json(asked).attention_precision == "fp8"


def test_a_default_that_changes_is_always_sent() -> None:
    """A job may run in an image of another version: setting_defaults.json has the defaults that all versions share.

    A new setting belongs into that file; its default must be what the kit did before it. A setting whose default
    changes belongs into ALWAYS_SENT.
    """
    classes = (ConvertConfig, VerifyConfig, FinetuneConfig, AlignConfig, PretrainConfig, GenerateConfig, ChatConfig,
               EvaluateConfig, ExportConfig, SmokeConfig, RehearseConfig)  # fmt: skip
    known = json.loads((Path(__file__).parents[2] / "config/setting_defaults.json").read_text())
    found = {
        each.__name__: {name: value for name, value in each.defaults().items() if name not in ALWAYS_SENT}
        for each in classes
    }
    assert found == known


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "my_password"])
def test_a_secret_does_not_go_by_environment(name: str) -> None:
    with pytest.raises(ConfigError, match="docker inspect"):
        JobOptions(environment=(f"{name}=x",)).check()


def test_all_problems_of_the_options_at_once() -> None:
    options = JobOptions(
        shm_size="much", image="-v", environment=("x",), ulimits=("a b",), hf_home="rel", nccl_timeout=1
    )
    with pytest.raises(ConfigError) as caught:
        options.check()
    assert len(caught.value.problems) == 6


def test_a_mount_takes_colons_commas_and_quotes() -> None:
    assert bind("/a:b", "/a:b") == ["--mount", "type=bind,source=/a:b,target=/a:b"]
    assert bind('/a,"b', "/c") == ["--mount", 'type=bind,"source=/a,""b",target=/c']


def test_paths_of_the_container_on_the_host() -> None:
    folders = JobOptions(checkpoints_folder="/srv/ckpt").folders()
    assert host_path("/checkpoints/a", folders) == "/srv/ckpt/a"
    assert host_path("/checkpoints", folders) == "/srv/ckpt"
    assert host_path("/checkpoints2/a", folders) == "/checkpoints2/a"


def test_folders_are_those_of_the_job_then_those_of_the_host_then_those_of_the_role() -> None:
    host = Host("gpu-01", "gpu-01", checkpoints_folder="/data/c", hf_home="/data/h")
    assert JobOptions().folders(host) == ("/data/c", "/data/h")
    assert JobOptions(hf_home="/x").folders(host) == ("/data/c", "/x")
    assert JobOptions(checkpoints_folder="/x").folders(host) == ("/x", "/data/h")
    default = ("/var/lib/mixtral-run/checkpoints", "/var/lib/mixtral-run/huggingface")
    assert JobOptions().folders(Host("gpu-02", "gpu-02")) == JobOptions().folders() == default


def test_a_container_mounts_the_folders_of_its_host_and_is_labeled_with_its_output_there() -> None:
    config = FinetuneConfig(load=Path("base"), save=Path("adapter"), mock_data=True)
    spec = make_spec("j", "finetune", config, JobOptions(), 1)
    argv = container_argv(spec, dataclasses.replace(FACTS, folders=HostFolders("/data/c", "/data/h")))
    mounts = [word for word in argv if word.startswith("type=bind,source=/data/")]
    assert mounts == ["type=bind,source=/data/c,target=/checkpoints", "type=bind,source=/data/h,target=/huggingface"]
    assert "org.mixtral-run.output=/data/c/adapter" in argv


def test_jobs_on_several_hosts_get_what_nccl_needs_for_rdma() -> None:
    facts = dataclasses.replace(FACTS, rdma=("mlx5_0", "mlx5_1"), bridges=("mlx5_4",), rdma_group=44, interface="eth1")

    def argv(num_hosts: int, **options: Any) -> list[str]:
        found = container_argv(make_spec("j", "finetune", finetune(), JobOptions(**options), num_hosts, "a:1"), facts)
        return found[: found.index("mixtral-run:local")]

    words = argv(2)
    at = words.index("/dev/infiniband")
    assert words[at - 3 : at + 3] == ["--network", "host", "--device", "/dev/infiniband", "--group-add", "44"][:6]
    assert words.count("memlock=-1") == 1 and "NCCL_IB_HCA=^=mlx5_4" in words
    assert argv(2, ulimits=("none",)).count("memlock=-1") == 1
    assert "memlock=-1" not in argv(2, ulimits=("memlock=64:64",))
    # The user's own setting is the last one.
    own = argv(2, environment=("NCCL_IB_HCA=mlx5_0", "NCCL_SOCKET_IFNAME=ib0"))
    assert {"NCCL_IB_HCA=mlx5_0", "NCCL_SOCKET_IFNAME=ib0"} <= set(own) and "NCCL_IB_HCA=^=mlx5_4" not in own
    assert "A=b=c=d" in argv(1, environment=("A=b=c=d",))
    alone = argv(1)
    assert not {"/dev/infiniband", "NCCL_IB_HCA=^=mlx5_4", "--network"} & set(alone)
    assert not [word for word in alone if "SOCKET_IFNAME" in word]
    # A host without a device, without a known interface and without another device of its own.
    facts = FACTS
    assert not [word for word in argv(2) if "SOCKET_IFNAME" in word or "NCCL_IB_HCA" in word]


@pytest.mark.parametrize("everybody", [True, False])
def test_the_devices_of_a_host_are_found(tmp_path: Path, everybody: bool) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("docker", "sudo"):
        program = tmp_path / "bin" / name
        program.write_text("#!/bin/sh\n# STAND-IN for an engine that answers; for sudo, which asks for a password.\n"
                           + ("exit 1\n" if name == "sudo" else ""))  # fmt: skip
        program.chmod(0o755)
    for name, state, vpd in (("mlx5_0", "4: ACTIVE", "x"), ("mlx5_1", "1: DOWN", "x"),
                             ("mlx5_2", "4: ACTIVE", "SW_MNG"),
                             ("mlx5_3", "4: ACTIVE", "x")):  # fmt: skip
        device = tmp_path / "sys/class/infiniband" / name
        (device / "ports/1").mkdir(parents=True)
        (device / "device").mkdir()
        (device / "ports/1/state").write_text(state + "\n")
        (device / "device/vpd").write_text(vpd)

    def found() -> HostFacts:
        argv = ["sh", "-c", FACTS_SCRIPT, "facts", str(tmp_path), "image", str(tmp_path / "none"), str(tmp_path)]
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
        return parse_facts(done.stdout)[0]

    assert found().rdma == (), "devices that no container can be given"
    node = tmp_path / "dev/infiniband/uverbs0"
    node.parent.mkdir(parents=True)
    node.touch()
    node.chmod(0o666 if everybody else 0o660)
    facts = found()
    assert (facts.rdma, facts.bridges) == (("mlx5_0", "mlx5_3"), ("mlx5_2",))
    assert facts.rdma_group == (None if everybody else node.stat().st_gid)


def test_facts_are_parsed() -> None:
    lines = ("docker=sudo -n docker", "uid=1", "gid=2", "group=", "folder=/f", "kernels=/k", "gpus=8", "cdi=0")
    text = "\n".join((*lines, "image=1", "checkpoints=1", "cordon=", "address=10.0.0.1", "interface=eth0", "rdma=a,b,a",
                      "bridges=", "rdma_group=44"))  # fmt: skip
    facts, reported = parse_facts(text)
    assert facts == HostFacts(
        docker=("sudo", "-n", "docker"),
        uid=1,
        gid=2,
        folder="/f",
        kernels="/k",
        num_gpus=8,
        address="10.0.0.1",
        interface="eth0",
        rdma=("a", "b"),
        rdma_group=44,
    )
    assert reported["image"] == "1"


def test_a_name_on_the_hub_stays_one() -> None:
    """The job prefers a folder of that name below its working directory."""
    spec = make_spec("j", "finetune", finetune(load=Path("mistralai/Mixtral-8x7B-v0.1")), JobOptions(), 1)
    assert spec.config["load"] == "mistralai/Mixtral-8x7B-v0.1"
    assert spec.mounts == ("/data/out",)
    smoke = make_spec("j", "smoke", SmokeConfig(load=Path("runs/smoke"), hf_model_path="a/b"), JobOptions(), 1)
    assert smoke.config["load"] == "/checkpoints/runs/smoke"


def test_hosts_with_different_numbers_of_gpus_are_refused() -> None:
    eight, four = dataclasses.replace(FACTS, num_gpus=8), dataclasses.replace(FACTS, num_gpus=4)
    check_same_gpus([eight], ["gpu-01"])
    check_same_gpus([eight, eight, eight], ["gpu-01", "gpu-02", "gpu-03"])
    with pytest.raises(ConfigError, match="must have the same number of GPUs") as refused:
        check_same_gpus([eight, four, eight], ["gpu-01", "gpu-02", "gpu-03"])
    assert refused.value.problems == ("gpu-01: 8 GPUs", "gpu-02: 4 GPUs", "gpu-03: 8 GPUs")
