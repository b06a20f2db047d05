"""Facts about hosts, words of engines, and the whole commands that a host gets for a job, written by hand."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, HostError, WeightsError
from mixtral_run.fleet.host_folders import DEFAULT_FOLDERS
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs import engine_command, host_facts, job_log, jobs, run_on_hosts, stop, taking
from mixtral_run.fleet.jobs.engine_command import engine_words, max_rank, read_adapter_config
from mixtral_run.fleet.jobs.host_facts import HostFacts, parse_facts
from mixtral_run.fleet.jobs.job_log import JobFollower
from mixtral_run.fleet.jobs.job_spec import (
    JobOptions,
    JobSpec,
)
from mixtral_run.fleet.jobs.jobs import JobRow, RunningJob
from mixtral_run.fleet.jobs.lost_hosts import HostLost
from mixtral_run.fleet.ssh.connection import Answer

HOST = Host("gpu-1", "10.0.0.1", user="ops", port=2222)


FACTS = HostFacts(folder="/home/ops/jobs", kernels="/k", num_gpus=4)


def finetune(**more: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"load": Path("m"), "save": Path("s"), "mock_data": True, **more})


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


def test_each_host_is_asked_for_its_own_folder_of_checkpoints() -> None:
    ssh: Any = Recorder(Answer(0, text_of(image="1", checkpoints="1"), ""))
    hosts = [dataclasses.replace(HOST, checkpoints_folder="/data/c", hf_home="/data/h"), HOST]
    facts = jobs.facts_of(hosts, JobOptions(), ssh)
    assert [each.folders for each in facts] == [("/data/c", "/data/h"), DEFAULT_FOLDERS]
    assert [call[2][4] for call in ssh.calls] == ["/data/c", DEFAULT_FOLDERS.checkpoints]
    lost: Any = Recorder(Answer(0, text_of(image="1"), ""))
    with pytest.raises(HostError) as caught:
        jobs.facts_of(hosts[:1], JobOptions(), lost)
    assert caught.value.expected == "/data/c"


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
    hosts = (HOST, dataclasses.replace(HOST, name="gpu-2", address="10.0.0.2"))[:num_hosts]
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


def test_the_first_of_the_jobs_with_the_same_output_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [JobRow(name, "convert", HOST, "running", 0, False, "", "/o") for name in ("j1", "j2")]
    monkeypatch.setattr(jobs, "list_jobs", lambda *_: (rows, []))
    spec = JobSpec(name="j", verb="convert", config={"output_path": "/o"}, options=JobOptions())
    ssh: Any = None
    with pytest.raises(taking.OutputTakenError) as caught:
        jobs.refuse_taken(ssh, [HOST], spec)
    assert caught.value.next_command == "mixtral-run stop j1; or another output for this job"
    # More containers than the job says it has are no reason to look for others.
    rows[1] = dataclasses.replace(rows[0], since="x")
    monkeypatch.setattr(jobs, "list_jobs", lambda *_: (rows, [HostError("gpu-2")]))
    assert jobs.find_whole_job("j1", [HOST]) == (rows, [])


def test_a_job_to_stop_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    said: list[str] = []
    row = JobRow("j", "convert", HOST, "exited", 0, False, "", "")
    monkeypatch.setattr(stop, "find_whole_job", lambda *given, **more: asked.append((given, more)) or ([row], []))
    ssh: Any = "ssh"
    stop.stop_job("j", [HOST], said.append, ssh)
    assert asked == [(("j", [HOST], "ssh"), {"prefer_running": True})] and said == ["j has already ended."]


def test_jobs_and_hosts_are_compared_by_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that comes over a connection is equal to a name here, and never the same object."""

    def named(job: str, **more: Any) -> JobRow:
        values = {"verb": "convert", "host": HOST, "state": "exited", "exit_code": 0, "output": "", **more}
        return JobRow(job=job, out_of_memory=False, since="", **values)

    name, same = "".join(["j", "ob-1"]), "".join(["jo", "b-1"])
    assert name is not same
    rows = [named(same), named("job-12")]
    monkeypatch.setattr(jobs, "list_jobs", lambda *_: (rows, []))
    assert jobs.find_whole_job(name, [HOST]) == (rows[:1], [])
    ssh: Any = Recorder()
    assert jobs.stop([named(name)], ssh) == rows[:1]
    rows[:] = [named("x", state="running", output="".join(["/", "o"]))]
    spec = JobSpec(name="j", verb="convert", config={"output_path": "".join(["/o", ""])}, options=JobOptions())
    with pytest.raises(taking.OutputTakenError):
        jobs.refuse_taken(ssh, [HOST], spec)
    # Hosts are equal by what they are.
    one, two = HOST, dataclasses.replace(HOST, name="gpu-2")
    job = RunningJob(name, "finetune", (one, two))
    lost = HostLost(job, dataclasses.replace(one))
    assert "--on gpu-2 --resume auto" in str(lost.next_command)
    assert run_on_hosts._hosts_left(job, JobOptions(min_hosts=1, inventory=Path("i")), lost) == ("gpu-2",)
    follower = JobFollower(job, ssh, io.StringIO(), say=print)
    follower._cut_off(dataclasses.replace(two))
    assert follower._alive() == [one]
    row = named(same, state="running")
    monkeypatch.setattr(job_log, "list_jobs", lambda *_: ([row], []))
    assert follower._row_of(follower._logs[0]) == row
