"""Every verb that starts a container on a host, found in click's own tree, asks the host whether it may."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from mixtral_run.cli.main import root
from mixtral_run.errors import CheckFailed, HostError, MixtralRunError
from mixtral_run.fleet import up
from mixtral_run.fleet.hosts import Host, parse_hosts, remember_hosts
from mixtral_run.fleet.jobs import interactive, jobs
from mixtral_run.fleet.jobs.host_facts import FACTS_SCRIPT
from mixtral_run.fleet.jobs.taking import CORDONED, START_SCRIPT, BusyError
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from tests.unit.fleet.test_hostile_hosts import facts

ON = ("--on", "gpu-01")
WORDS: dict[str, tuple[str, ...]] = {
    "convert": (*ON, "--hf-model-path", "mistralai/Mixtral-8x7B-v0.1", "--output-path", "mixtral"),
    "verify": (*ON, "--load", "mixtral"),
    "finetune": (*ON, "--load", "mixtral", "--save", "adapter", "--mock-data"),
    "align": (*ON, "--method", "dpo", "--load", "mixtral", "--save", "adapter", "--data-path", "/data/pairs.jsonl"),
    "pretrain": (*ON, "--load", "mixtral", "--mock-data"),
    "generate": (*ON, "--load", "mixtral", "--prompt", "Once"),
    "chat": (*ON, "--load", "mixtral"),
    "evaluate": (*ON, "--load", "mixtral", "--data-path", "/data/test.jsonl"),
    "serve": (*ON, "--load", "hf"),
    "export": (*ON, "--adapter", "adapter", "--output-path", "peft"),
    "smoke": ON,
    "rehearse": ON,
    "shell": ON,
    "status": ("--network", "gpu-01", "gpu-02"),
    "up": ("gpu-01", "--mock-data"),
}
"""A command line of each verb."""
BESIDE = ("convert", "verify", "export", "up")
"""Verbs that start next to a job. `up` starts with convert."""
READERS = ("fetch", "logs", "runs", "stop")
"""Verbs whose --on says where to look. They start no container."""
RECORD = json.dumps({"reason": "Xid 79 on GPU 5", "by": "ops@laptop", "at": "2026-01-01T00:00:00Z"})


def verbs_with_hosts() -> set[str]:
    """The verbs that start containers: they have --on, the options of a job's container, or --network-floor."""
    context = click.Context(root)
    found = set()
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        assert command is not None
        if {"on", "shm_size", "network_floor"} & {each.name for each in command.params}:
            found.add(name)
    return found


class Fleet:
    """STAND-IN for two hosts behind SSH. It answers the scripts of the kit, and notes what would start a container.

    cordoned: names of the hosts whose facts say so. late: the cordon is there only when the container starts.
    """

    def __init__(self) -> None:
        self.cordoned: tuple[str, ...] = ("gpu-01", "gpu-02")
        self.late = False
        self.running = ""
        self.commands: list[Sequence[str]] = []
        self.asked: list[str] = []
        self.started: list[str] = []
        self.attached: list[str] = []

    def run(self, host: Host, command: Sequence[str], **_: Any) -> Answer:
        self.commands.append(command)
        script = command[2] if list(command[:2]) == ["sh", "-c"] else ""
        if script == FACTS_SCRIPT:
            self.asked.append(host.name)
            cordon = f"1 {RECORD}" if host.name in self.cordoned and not self.late else ""
            return Answer(0, facts(cordon=cordon), "")
        if script == START_SCRIPT:
            self.late = False
            return Answer(CORDONED, "", RECORD)
        if script == jobs._LIST_SCRIPT:
            return Answer(0, self.running, "")
        if script == jobs.ENGINE_SCRIPT and command[4] not in ("run", "create", "start"):
            return Answer(0, "", "")
        if list(command[:2]) == ["test", "-e"]:
            return Answer(1, "", "")  # no container was about to start
        if "converted=1" in script:
            return Answer(0, "converted=0\niteration=\nexported=0\n", "")
        if " run " in f" {shlex.join(command)} ":
            self.started.append(shlex.join(command))
        return Answer(0, "ok\n{}", "")

    def call(self, argv: Sequence[str]) -> int:
        """Answer the command of an interactive container, in the place of ssh."""
        self.attached.append(argv[-1])
        words = shlex.split(argv[-1])
        if START_SCRIPT not in words:
            self.started.append(argv[-1])
        self.late = False
        return CORDONED


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fleet:
    found = Fleet()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    remember_hosts(parse_hosts(["gpu-01", "gpu-02"]))
    monkeypatch.setattr(Ssh, "run", lambda _, host, command, **more: found.run(host, command, **more))
    monkeypatch.setattr(Ssh, "send", lambda *_: None)
    monkeypatch.setattr(interactive, "_call", lambda *words: found.call(words[-1]))
    monkeypatch.setattr(up, "bootstrap", lambda _: type("End", (), {"text": "", "raise_if_bad": lambda _: None})())
    monkeypatch.chdir(tmp_path)
    return found


def run(verb: str, *words: str) -> None:
    root.main([verb, *(words or WORDS[verb])], standalone_mode=False, prog_name="mixtral-run")


def test_each_verb_has_a_command_line_here() -> None:
    assert verbs_with_hosts() == {*WORDS, *READERS}


@pytest.mark.parametrize("verb", READERS)
def test_a_reader_starts_nothing(verb: str, fleet: Fleet) -> None:
    fleet.running = "finetune-1\tfinetune\texited\t0\tfalse\t2026-01-01T00:00:00Z\t\t1\n"
    with contextlib.suppress(MixtralRunError):
        run(verb, *ON, *([] if verb == "runs" else ["finetune-1"]))
    assert fleet.commands and not fleet.started and not fleet.asked


@pytest.mark.parametrize("late", [False, True], ids=["cordoned", "cordoned at the last moment"])
@pytest.mark.parametrize("verb", WORDS)
def test_a_cordoned_host_starts_no_verb(verb: str, late: bool, fleet: Fleet) -> None:
    fleet.late = late
    with pytest.raises(CheckFailed if late and verb == "status" else HostError) as caught:
        run(verb)
    text = str(caught.value)
    for part in ("gpu-01 takes no jobs", "Xid 79 on GPU 5", "ops@laptop", "2026-01-01T00:00:00Z",
                 "mixtral-run uncordon gpu-01"):  # fmt: skip
        assert part in text
    assert not fleet.started


@pytest.mark.parametrize("verb", sorted(set(WORDS) - {"up", "status"}))
def test_any_asks_every_host(verb: str, fleet: Fleet) -> None:
    with pytest.raises(HostError, match="No host can run the job") as caught:
        run(verb, *("any" if word == "gpu-01" else word for word in WORDS[verb]))
    assert [each.split(":")[0] for each in caught.value.problems] == ["gpu-01", "gpu-02"]
    assert all("cordoned" in each for each in caught.value.problems)
    assert fleet.asked == ["gpu-01", "gpu-02"] and not fleet.started


@pytest.mark.parametrize("verb", WORDS)
def test_a_busy_host_starts_no_verb_that_uses_its_gpus(verb: str, fleet: Fleet) -> None:
    fleet.cordoned, fleet.late = (), True
    fleet.running = "finetune-1\tfinetune\trunning\t0\tfalse\t2026-01-01T00:00:00Z\t\t1\n"
    with pytest.raises(HostError) as caught:
        run(verb)
    assert isinstance(caught.value, BusyError) == (verb not in BESIDE)
    if isinstance(caught.value, BusyError):
        assert caught.value.jobs[0] == ("gpu-01", "finetune-1")
        assert not fleet.attached, "the terminal was lent before anybody asked"
    assert not fleet.started
