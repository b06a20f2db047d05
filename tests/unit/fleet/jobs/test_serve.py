"""`serve --on HOST`: the engine's container, what is refused, and the wait for an answer."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.errors import ConfigError, HostError, WeightsError
from mixtral_run.fleet.jobs import interactive, jobs, queue
from mixtral_run.fleet.jobs import serve as serving
from mixtral_run.fleet.jobs.engine_command import max_rank, read_adapter_config
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import JobRow
from mixtral_run.fleet.jobs.taking import BusyError
from mixtral_run.fleet.ssh.connection import Answer
from tests.unit.fleet.jobs.test_interactive import HOST
from tests.unit.fleet.jobs.test_job_spec import FACTS

PEFT = {"peft_type": "LORA", "r": 12, "target_modules": ["q_proj", "w1", "w2", "w3"]}
OPTIONS = JobOptions(on=("gpu-01",))


class _Host:
    """STAND-IN for a host: its folders, its engine, and a server that answers after some looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: dict[str, str] = {
            "/var/lib/mixtral-run/checkpoints/hf": "ok\n{}", "/data/peft": f"ok\n{json.dumps(PEFT)}",
            "/data/kit": "checkpoint\n",
        }  # fmt: skip
        self.commands: list[tuple[str, ...]] = []
        self.started: list[list[str]] = []
        self.others: list[JobRow] = []
        self.refusal = ""
        self.has_image, self.looks, self.state, self.pull = True, 3, "running", 0
        for module in (serving, interactive):
            monkeypatch.setattr(module, "remember", lambda *_: None)
        monkeypatch.setattr(interactive, "hosts_of", lambda *_: (HOST,))
        monkeypatch.setattr(jobs, "list_jobs", lambda *_: (self.others, []))
        monkeypatch.setattr(serving, "facts_of", lambda *_, **__: [FACTS])
        monkeypatch.setattr(serving, "engine", self.engine)
        monkeypatch.setattr(serving, "start_on", self.start)
        monkeypatch.setattr(serving, "list_jobs", lambda hosts, _: ([self.row(hosts[0])], []))
        monkeypatch.setattr(serving, "POLL_SECONDS", 0.0)

    def check(self, host: Any, words: list[str], **_: Any) -> str:
        return self.folders.get(words[4], "none\n")

    def engine(self, ssh: Any, host: Any, *words: str, **_: Any) -> Answer:
        self.commands.append(words)
        if words[0] == "exec":
            self.looks -= 1
            return Answer(int(self.looks > 0), "", "")
        if words[0] == "logs":
            return Answer(0, "ValueError: no such model\n", "")
        return Answer({"image": int(not self.has_image), "pull": self.pull}[words[0]], "", "no such image\n")

    def start(self, ssh: Any, host: Any, facts: Any, spec: Any, container: Any) -> None:
        if self.refusal:
            raise HostError("The container could not be started.", found=self.refusal)
        self.name = spec.name
        self.started.append(serving.container_argv(spec, facts, container))

    def row(self, host: Any) -> JobRow:
        return JobRow(self.name, "serve", host, self.state, 1, False, "2026-11-30T00:00:00", "")

    def serve(self, **settings: Any) -> Any:
        config = ServeConfig(**({"load": Path("hf"), "adapter": Path("/data/peft")} | settings)).check()
        return serving.serve(config, OPTIONS, self)  # type: ignore[arg-type]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> _Host:
    return _Host(monkeypatch)


def test_vllm_with_an_adapter(host: _Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.serve(engine_arg=("--max-model-len=8192",))
    (argv,) = host.started
    image = argv.index("vllm/vllm-openai:v0.33.0")
    assert argv[image + 1 :] == [
        "serve", "/checkpoints/hf", "--host", "0.0.0.0", "--port", "8000", "--served-model-name", "base",
        "--tensor-parallel-size", "8", "--enable-lora", "--max-loras", "1", "--max-lora-rank", "16",
        "--lora-modules", "adapter=/data/peft", "--max-model-len=8192",
    ]  # fmt: skip
    options = argv[:image]
    assert options[:4] == ["docker", "run", "--detach", "--init"]
    assert options[options.index("--publish") + 1] == "127.0.0.1:8000:8000"
    assert options[options.index("--entrypoint") + 1] == "vllm"
    for word in ("nvidia.com/gpu=all", "HF_HOME=/huggingface", "HOME=/tmp", "type=bind,source=/data,target=/data",
                 "no-new-privileges", "org.mixtral-run.verb=serve"):  # fmt: skip
        assert word in options
    shown = capsys.readouterr().err
    assert "of the host only" in shown and "ssh -N -L 8000:127.0.0.1:8000 -l ops -- 10.0.0.1" in shown
    assert f"mixtral-run stop {host.name}" in shown
    assert sum(words[0] == "exec" for words in host.commands) == 3


def test_sglang_and_another_address(host: _Host) -> None:
    host.serve(engine="sglang", bind="0.0.0.0", port=9000, tensor_parallel=4, engine_image="mirror/sglang:x")
    (argv,) = host.started
    words = argv[argv.index("mirror/sglang:x") + 1 :]
    assert words == [
        "-m", "sglang.launch_server", "--model-path", "/checkpoints/hf", "--host", "0.0.0.0", "--port", "8000",
        "--served-model-name", "base", "--tp", "4", "--enable-lora", "--max-loras-per-batch", "1", "--max-lora-rank",
        "12", "--lora-paths", "adapter=/data/peft",
    ]  # fmt: skip
    assert argv[argv.index("--publish") + 1] == "0.0.0.0:9000:8000"


def test_a_model_by_name_and_a_dry_run(host: _Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert host.serve(load=Path("mistralai/Mixtral-8x7B-v0.1"), adapter=None, dry_run=True) is None
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("serve", words.index("--entrypoint")) + 1] == "mistralai/Mixtral-8x7B-v0.1"
    assert "--enable-lora" not in words
    assert not host.started and not host.commands, "nothing is pulled or started"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"adapter": Path("/data/kit")}, "export --on gpu-01"),
        ({"adapter": Path("/data/none")}, "no adapter_config.json"),
        ({"load": Path("/data/kit")}, "convert --from-megatron"),
        ({"load": Path("/data/none")}, "no config.json"),
    ],
)
def test_folders_that_no_engine_serves(host: _Host, settings: dict[str, Any], found: str) -> None:
    with pytest.raises(WeightsError) as caught:
        host.serve(**settings)
    assert found in str(caught.value) and not host.started


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"target_parameters": ["experts.gate_up_proj"]}, "order of gpt-oss"),
        ({"use_dora": True}, "DoRA"),
        ({"rank_pattern": {"q_proj": 4}}, "several ranks"),
        ({"target_modules": ["w1", "w3"]}, "w2 is missing"),
        ({"r": "8"}, "whole number"),
        ({"peft_type": "LOHA"}, "expected LORA"),
    ],
)
def test_adapters_that_would_be_served_wrongly(host: _Host, changes: dict[str, Any], found: str) -> None:
    host.folders["/data/peft"] = f"ok\n{json.dumps(PEFT | changes)}"
    with pytest.raises(WeightsError) as caught:
        host.serve()
    assert found in str(caught.value) and "--format vllm" in str(caught.value) and not host.started


def test_ranks_are_rounded_up_to_the_engines_steps() -> None:
    steps = {1: 1, 2: 8, 8: 8, 9: 16, 33: 64, 256: 256, 257: 320, 512: 512}
    assert {rank: max_rank(rank) for rank in steps} == steps
    with pytest.raises(ConfigError, match="too large"):
        max_rank(513)
    for text in ("", "[]", '{"r": true}'):
        with pytest.raises(WeightsError):
            read_adapter_config(text, "x")


def test_a_server_that_ends_or_never_answers(host: _Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.looks, host.state = 100, "exited"
    with pytest.raises(HostError, match="failed on gpu-01"):
        host.serve()
    assert "ValueError: no such model" in capsys.readouterr().err
    host.state = "running"
    config = ServeConfig(load=Path("hf"))
    object.__setattr__(config, "wait_minutes", 0)
    with pytest.raises(HostError, match="does not answer"):
        serving.serve(config, OPTIONS, host)  # type: ignore[arg-type]


def test_the_image_is_pulled(host: _Host) -> None:
    host.has_image = False
    host.serve()
    assert ("pull", "--quiet", "vllm/vllm-openai:v0.33.0") in host.commands
    host.pull = 1
    with pytest.raises(HostError, match="cannot pull"):
        host.serve()


def test_a_busy_host_is_refused_before_an_image_is_pulled(
    host: _Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host.has_image = False
    host.others = [JobRow("finetune-1", "finetune", HOST, "running", 0, False, "", "")]
    with pytest.raises(BusyError, match="finetune-1 is running"):
        host.serve()
    assert not host.commands and not host.started
    host.serve(dry_run=True)
    assert "docker run" in capsys.readouterr().out
    # --wait: the other job ends meanwhile.
    monkeypatch.setattr(queue.time, "sleep", lambda _: host.others.clear())
    monkeypatch.setattr(sys.modules[__name__], "OPTIONS", JobOptions(on=("gpu-01",), wait="1h"))
    host.serve()
    assert len(host.started) == 1 and "waiting for a free host" in capsys.readouterr().err


def test_a_port_that_is_taken(host: _Host) -> None:
    host.refusal = "Bind for 127.0.0.1:9000 failed: port is already allocated."
    with pytest.raises(HostError, match=r"Port 9000 of gpu-01 is taken") as caught:
        host.serve(port=9000)
    assert "--port" in str(caught.value)
    host.refusal = "No space left on device"
    with pytest.raises(HostError, match="could not be started"):
        host.serve()


def test_settings_that_are_wrong() -> None:
    found = ServeConfig(
        load=Path("x"), bind="all", prove="host:8000", engine_image="-x", base_name="a", adapter_name="a", dry_run=True
    ).problems()
    assert [each.split(":")[0] for each in found] == [
        "--prove", "--bind", "--engine-image", "--base-name and --adapter-name", "--dry-run and --prove",
    ]  # fmt: skip
