"""Settings of a job at both sides of each bound, and the whole commands that a host gets, written by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.trial import SmokeConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig
from mixtral_run.errors import ConfigError, HostError, WeightsError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs import engine_command, host_facts, job_spec, jobs, taking
from mixtral_run.fleet.jobs.container_paths import hides_image, mount_for, path_inside
from mixtral_run.fleet.jobs.engine_command import engine_words, max_rank, read_adapter_config
from mixtral_run.fleet.jobs.host_facts import HostFacts, parse_facts
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
from mixtral_run.fleet.ssh.connection import Answer

HOST = Host("gpu-1", "10.0.0.1", user="ops", port=2222)
FACTS = HostFacts(folder="/home/ops/jobs", kernels="/k", num_gpus=4)


def finetune(**more: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"load": Path("m"), "save": Path("s"), "mock_data": True, **more})


def test_what_is_assumed_where_nothing_is_said() -> None:
    assert dataclasses.asdict(HostFacts()) == {
        "docker": ("docker",), "uid": 1000, "gid": 1000, "group_of_checkpoints": None, "folder": "", "kernels": "",
        "num_gpus": 0, "cdi": False, "address": "", "interface": "", "rdma": (), "bridges": (), "rdma_group": None,
    }  # fmt: skip
    assert dataclasses.asdict(JobOptions()) == {
        "on": (), "inventory": None, "image": "mixtral-run:local", "shm_size": "32g", "environment": (),
        "ulimits": ("memlock=-1", "stack=67108864", "nofile=1048576:1048576"),
        "checkpoints_folder": "/var/lib/mixtral-run/checkpoints", "hf_home": "/var/lib/mixtral-run/huggingface",
        "min_hosts": None, "max_restarts": None, "nccl_debug": None, "nccl_timeout": None, "rendezvous_address": None,
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
        ({"ulimits": ()}, None), ({"checkpoints_folder": "a"}, "--checkpoints-folder"), ({"hf_home": "a"}, "--hf-home"),
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
    options = JobOptions(checkpoints_folder="/c", hf_home="/h")
    found = {
        each: host_path(each, options)
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


FACT_LINES = {
    "docker": "docker", "uid": "1", "gid": "2", "group": "3", "folder": "/f=g", "kernels": "/k", "gpus": "8",
    "cdi": "1", "image": "0", "checkpoints": "0", "cordon": "", "address": "", "interface": "", "rdma": "",
    "bridges": "b,a,b", "rdma_group": "",
}  # fmt: skip


def text_of(**changes: str | None) -> str:
    lines = {**FACT_LINES, **changes}
    return "odd\n" + "\n".join(f"{name}={value}" for name, value in lines.items() if value is not None)


def test_facts_by_hand() -> None:
    facts, lines = parse_facts(text_of())
    assert facts == HostFacts(
        uid=1, gid=2, group_of_checkpoints=3, folder="/f=g", kernels="/k", num_gpus=8, cdi=True, bridges=("b", "a"),
    )  # fmt: skip
    assert lines == FACT_LINES
    for changes, problem in (
        ({"uid": "12345678901"}, "uid="), ({"gpus": "12345"}, "gpus="), ({"cordon": None}, "no value of cordon"),
        ({"interface": "a" * 16}, "interface="), ({"rdma": ",".join(["a"] * 65)}, "rdma="),
        ({"address": "10.0.0"}, "address="), ({"cdi": "2"}, "cdi="), ({"docker": "podman"}, "docker="),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            parse_facts(text_of(**changes))
    assert parse_facts(text_of(rdma=",".join(["a"] * 64)))[0].rdma == ("a",)


def test_ranks_at_each_step() -> None:
    steps = [1, 8, 16, 32, 64, 128, 256, 320, 512]
    assert [max_rank(each) for each in steps] == steps
    assert [max_rank(each + 1) for each in steps[:-1]] == steps[1:]
    with pytest.raises(ConfigError) as caught:
        max_rank(513)
    assert (caught.value.expected, caught.value.found) == ("at most 512", "513")


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ('{"r": 1}', 1), ('{"r": 7, "peft_type": "LORA", "target_modules": "all-linear"}', 7),
        ('{"r": 4, "target_modules": ["q_proj", "v_proj"]}', 4),
        ('{"r": 4, "target_modules": ["m.experts.0.w1", "x.w2", "w3"]}', 4),
        ('{"r": 0}', "r: expected a whole number, 1 or more; found 0"),
        ('{"r": true}', "r: expected a whole number, 1 or more; found True"),
        ('{"r": 8.0}', "r: expected a whole number, 1 or more; found 8.0"),
        ("{}", "r: expected a whole number, 1 or more; found None"),
        ('{"r": 4, "target_modules": ["w1"]}',
         "target_modules: vLLM wants all of w1, w2 and w3 of an expert; w2, w3 is missing"),
        ('{"r": 4, "alpha_pattern": {"a": 1}}', "alpha_pattern: engines do not serve adapters with several alphas"),
        ("[]", "expected a JSON object"),
    ],
)  # fmt: skip
def test_the_rank_of_an_adapter(text: str, rank: int | str) -> None:
    if isinstance(rank, int):
        assert read_adapter_config(text, "x") == rank
    else:
        with pytest.raises(WeightsError, match="cannot be served as it is") as caught:
            read_adapter_config(text, "x")
        assert caught.value.problems == (rank,) and caught.value.where == "x"


def test_words_of_an_engine() -> None:
    common = ["--host", "0.0.0.0", "--port", "8000", "--served-model-name", "base"]
    vllm, sglang = ServeConfig(load=Path("x")), ServeConfig(load=Path("x"), engine="sglang")
    plain = ["serve", "/m", *common, "--tensor-parallel-size", "1"]
    other = ["-m", "sglang.launch_server", "--model-path", "/m", *common, "--tp", "2"]
    for adapter, rank in ((None, None), ("/a", None), (None, 8)):
        assert engine_words(vllm, "/m", adapter, rank, 0) == plain
        assert engine_words(sglang, "/m", adapter, rank, 2) == other
    assert engine_words(vllm, "/m", "/a", 1, 1) == [
        *plain, "--enable-lora", "--max-loras", "1", "--max-lora-rank", "1", "--lora-modules", "adapter=/a",
    ]  # fmt: skip
    assert engine_command.engine_entrypoint("vllm") == ("--entrypoint", "vllm")
    assert engine_command.engine_entrypoint("sglang") == ("--entrypoint", "python3")


class Recorder:
    """STAND-IN for SSH: it notes each call, and answers with what it was given."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.calls: list[Any] = []
        self.answer = answer or Answer(0, "", "")

    def each(self, hosts: Any, work: Any) -> list[Any]:
        return [work(host) for host in hosts]

    def run(self, *given: Any, **more: Any) -> Answer:
        self.calls.append(("run", *given, more))
        return self.answer

    def check(self, *given: Any, **more: Any) -> str:
        self.calls.append(("check", *given, more))
        return ""

    def send(self, *given: Any) -> None:
        self.calls.append(("send", *given))


def test_the_whole_commands_for_a_job() -> None:
    ssh: Any = Recorder()
    jobs.engine(ssh, HOST, "ps", "-a")
    jobs.engine(ssh, HOST, "ps", timeout_seconds=None)
    assert ssh.calls == [
        ("run", HOST, ["sh", "-c", jobs.ENGINE_SCRIPT, "docker", "ps", "-a"], {"timeout_seconds": 60}),
        ("run", HOST, ["sh", "-c", jobs.ENGINE_SCRIPT, "docker", "ps"], {"timeout_seconds": None}),
    ]
    assert jobs.ENGINE_SCRIPT == host_facts.FIND_ENGINE + 'exec $docker "$@"'
    ssh.calls.clear()
    spec = JobSpec(name="j", verb="v", config={"a": 1}, files=((Path("/x"), "y"),), options=JobOptions())
    facts = dataclasses.replace(FACTS, docker=("sudo", "-n", "docker"))
    jobs.send_files(ssh, HOST, facts, spec)
    write = ["sh", "-c", 'cat > "$1.partial" && mv "$1.partial" "$1"', "write"]
    *sent, (_, host, prune, more) = ssh.calls
    assert sent == [
        ("check", HOST, ["mkdir", "-p", "/home/ops/jobs/j", "/home/ops/jobs/j/state"], {}),
        ("check", HOST, [*write, "/home/ops/jobs/j/config.json"], {"stdin": b'{\n  "a": 1\n}\n'}),
        ("send", HOST, [*write, "/home/ops/jobs/j/y"], Path("/x")),
    ]
    assert (host, more, prune[:2], prune[3:]) == (HOST, {}, ["sh", "-c"], [
        "prune", "sudo -n docker", "org.mixtral-run.job", "11", "/home/ops/jobs", '{{.Label "org.mixtral-run.job"}}',
    ])  # fmt: skip
    ssh.calls.clear()
    jobs._rows_of(ssh, HOST)
    (_, _, words, _) = ssh.calls[0]
    assert words[3:5] == ["list", "org.mixtral-run.job"] and words[5].split("\t") == [
        '{{index .Config.Labels "org.mixtral-run.job"}}', '{{index .Config.Labels "org.mixtral-run.verb"}}',
        "{{.State.Status}}", "{{.State.ExitCode}}", "{{.State.OOMKilled}}", "{{.State.StartedAt}}",
        '{{index .Config.Labels "org.mixtral-run.output"}}', '{{index .Config.Labels "org.mixtral-run.num_hosts"}}',
    ]  # fmt: skip


def test_a_start_has_five_minutes_and_the_words_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    ssh: Any = Recorder()
    monkeypatch.setattr(jobs, "send_files", lambda *_: None)
    spec = JobSpec(name="j", verb="finetune", config={}, options=JobOptions())
    jobs.start_on(ssh, HOST, FACTS, spec)
    ((_, _, argv, more),) = ssh.calls
    verbs = "finetune|align|pretrain|generate|chat|evaluate|serve|smoke|rehearse|network"
    lock = "/tmp/mixtral-run.start.lock"
    assert argv[:4] == ["sh", "-c", taking.START_SCRIPT, "start"] and more == {"timeout_seconds": 300}
    assert argv[4:12] == ["docker", taking.CORDON_FILE, lock, verbs, "", "", "docker", "run"]
    attached = taking.start_argv(["x"], spec, FACTS, attached=True)
    assert attached[8:] == ["j", "/home/ops/jobs/j/started", "x"]
    ssh.answer, ssh.calls = Answer(125, "", "e" * 200 + "\n"), []
    with pytest.raises(HostError, match="The container of j could not be started on gpu-1") as caught:
        jobs.start_on(ssh, HOST, FACTS, spec)
    assert caught.value.found == "e" * 200 and caught.value.next_command == f'mixtral-run explain "{"e" * 120}"'
    assert ssh.calls[1][2][3:] == ["docker", "rm", "--force", "j"]


@pytest.mark.parametrize(
    ("verb", "share", "needs"),
    [
        ("finetune", False, True), ("finetune", True, False), ("shell", False, True), ("shell", True, False),
        ("convert", False, False), ("network", False, True), ("verify", False, False), ("convert", True, False),
    ],
)  # fmt: skip
def test_who_needs_a_free_host(verb: str, share: bool, needs: bool) -> None:
    assert taking.needs_free_host(verb, share=share) is needs
    spec = JobSpec(name="j", verb=verb, config={}, options=JobOptions(share=share))
    assert bool(taking.start_argv(["x"], spec, FACTS)[7]) is needs
    error = taking.busy_error([("h", "j")], ["p"])
    assert (error.jobs, error.problems) == ((("h", "j"),), ("h: j is running", "p"))
    assert [taking.job_in(each) for each in ("a " + "b" * 128, "a " + "b" * 129)] == ["b" * 128, "another job"]


@pytest.mark.parametrize(
    ("answer", "needs_image", "what", "command"),
    [
        (Answer(255, "", "Connection refused"), True, "gpu-1 refuses the connection", None),
        (Answer(254, "", "a\nb"), True, "gpu-1 cannot run jobs: its Docker engine does not answer.",
         "mixtral-run bootstrap ops@10.0.0.1:2222"),
        (Answer(0, "odd", ""), True, "gpu-1 cannot run jobs: its answer is not in the expected form.",
         "mixtral-run status gpu-1"),
        (Answer(0, text_of(cordon="1 x"), ""), True, "gpu-1 takes no jobs: it is cordoned.", None),
        (Answer(0, text_of(), ""), True, "There is no image of the kit on gpu-1.",
         "mixtral-run bootstrap ops@10.0.0.1:2222 --tags image"),
        (Answer(0, text_of(), ""), False, "gpu-1 has no checkpoints folder.",
         "mixtral-run bootstrap ops@10.0.0.1:2222 --tags hf_cache; or --checkpoints-folder FOLDER"),
        (Answer(0, text_of(image="1"), ""), True, "gpu-1 has no checkpoints folder.", None),
        (Answer(0, text_of(image="1", checkpoints="1"), ""), True, None, None),
        (Answer(0, text_of(checkpoints="1"), ""), False, None, None),
    ],
)  # fmt: skip
def test_a_host_that_cannot_run_a_job(answer: Answer, needs_image: bool, what: str | None, command: str | None) -> None:
    ssh: Any = Recorder(answer)
    options = JobOptions(checkpoints_folder="/c", image="i")
    if what is None:
        assert [each.num_gpus for each in jobs.facts_of([HOST, HOST], options, ssh, needs_image=needs_image)] == [8, 8]
        words = ["sh", "-c", host_facts.FACTS_SCRIPT, "facts", "/c", "i", jobs.CORDON_FILE]
        assert ssh.calls == [("run", HOST, words, {})] * 2
        return
    more = {} if needs_image else {"needs_image": False}
    with pytest.raises(HostError) as caught:
        jobs.facts_of([HOST], options, ssh, **more)  # type: ignore[arg-type]
    assert caught.value.what.startswith(what) and command in (None, caught.value.next_command)
    with pytest.raises(HostError, match="Several hosts cannot run the job; nothing was started") as caught:
        jobs.facts_of([HOST, HOST], options, ssh, needs_image=needs_image)
    assert len(caught.value.problems) == 2


def test_an_engine_that_says_nothing_has_its_exit_code() -> None:
    assert jobs._engine_problem(HOST, Answer(3, "", " \n"), "x").found == "exit code 3"
    denied = "ops: permission denied while trying to connect to the Docker daemon socket"
    problem = jobs._engine_problem(HOST, Answer(3, "", denied), "does")
    assert problem.found == denied and '"ops"' in str(problem.next_command) and "USER" not in str(problem.next_command)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("num_hosts", [1, 2])
def test_a_start_on_hosts(monkeypatch: pytest.MonkeyPatch, num_hosts: int, fails: bool) -> None:
    """Only several hosts are compared; only after a failure the containers are removed, from each of them."""
    ssh: Any = Recorder()
    hosts = (HOST, dataclasses.replace(HOST, name="gpu-2"))[:num_hosts]
    compared: list[Any] = []
    specs: list[Any] = []
    monkeypatch.setattr(jobs, "job_name", lambda verb: f"{verb}-1")
    monkeypatch.setattr(jobs, "facts_of", lambda *_: [FACTS] * num_hosts)
    monkeypatch.setattr(jobs, "check_same_gpus", lambda *given: compared.append(given))
    monkeypatch.setattr(jobs, "refuse_taken", lambda *_: None)
    monkeypatch.setattr(jobs, "remembered_hosts", lambda: ())
    monkeypatch.setattr(jobs, "remember_hosts", list)

    def start_on(*given: Any) -> None:
        specs.append(given[3])
        if fails:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "start_on", start_on)
    options = JobOptions(rendezvous_port=5)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            jobs.start("finetune", finetune(), options, ssh, hosts)
        assert [(each[1].name, each[2][3:]) for each in ssh.calls] == [
            (host.name, ["docker", "rm", "--force", "finetune-1"]) for host in hosts
        ]
        return
    assert jobs.start("finetune", finetune(), options, ssh, hosts).hosts == hosts and ssh.calls == []
    assert compared == ([([FACTS, FACTS], ["gpu-1", "gpu-2"])] if num_hosts == 2 else [])
    assert [each.rendezvous for each in specs] == ["10.0.0.1:5"] * num_hosts
    compared.clear()
    jobs.start("finetune", finetune(nproc_per_node=1), options, ssh, hosts)
    jobs.start("finetune", finetune(), dataclasses.replace(options, rendezvous_address="a"), ssh, hosts)
    assert specs[-1].rendezvous == "a:5" and len(compared) == (num_hosts == 2)


def test_the_first_five_jobs_are_named_where_none_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [JobRow(f"j{number}", "v", HOST, "exited", 0, False, "", "") for number in range(7)]
    monkeypatch.setattr(jobs, "list_jobs", lambda *_: (rows, []))
    with pytest.raises(ConfigError) as caught:
        jobs.find_job("x", [HOST])
    assert (caught.value.found, caught.value.where) == ("j0, j1, j2, j3, j4", "on gpu-1")
    assert jobs.find_job("j3", [HOST]) == [rows[3]]
    # Two are running: neither is preferred.
    rows[:2] = [dataclasses.replace(each, state="running") for each in rows[:2]]
    with pytest.raises(ConfigError, match="Several jobs are called 'j'"):
        jobs.find_whole_job("j", [HOST], prefer_running=True)
    with pytest.raises(HostError, match="two"):
        jobs._raise_all([HostError("a"), HostError("b")], "two")
    jobs._raise_all([], "none")


def test_same_output_is_asked_of_jobs_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    row: Any = JobRow("j", "convert", HOST, "running", 0, False, "", "")
    monkeypatch.setattr(jobs, "list_jobs", lambda *given: asked.append(given) or ([row], []))
    ssh: Any = SimpleNamespace()
    # A job without an output has it in common with no other.
    jobs.refuse_taken(ssh, [HOST], JobSpec(name="j", verb="shell", config={}, options=JobOptions()))
    assert asked == [([HOST], ssh)]
