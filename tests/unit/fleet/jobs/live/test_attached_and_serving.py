"""Containers that read this terminal, and servers that are waited for: what is asked, said and raised."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs import interactive
from mixtral_run.fleet.jobs import serve as serving
from mixtral_run.fleet.jobs.host_facts import HostFacts
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import RunningJob
from mixtral_run.fleet.jobs.taking import BusyError
from mixtral_run.fleet.ssh.connection import Answer
from tests.unit.fleet.jobs.test_job_parts import HOSTS, row


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"detach": True}, "--detach"), ({"max_restarts": 0}, "--max-restarts"), ({"min_hosts": 0}, "--min-hosts"),
        ({"detach": True, "min_hosts": 1}, "--detach, --min-hosts"), ({}, None),
    ],
)  # fmt: skip
def test_what_a_terminal_cannot_use(given: dict[str, Any], flags: str | None) -> None:
    if flags is None:
        interactive.refuse_unused("chat", JobOptions())
        return
    with pytest.raises(ConfigError, match="chat reads this terminal") as caught:
        interactive.refuse_unused("chat", JobOptions(**given))
    assert caught.value.found == flags
    assert caught.value.next_command == f"the same without {flags.replace(', ', ' and ')}"


def test_one_host_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        interactive, "hosts_of", lambda words, *more: HOSTS[: len(words)] if more == (None, None) else 0
    )
    assert interactive.only_host("chat", JobOptions(on=("a",))) == HOSTS[0]
    assert interactive.only_host("chat", JobOptions(on=("a", "b")), HOSTS[2:]) == HOSTS[2]
    for number in (0, 2, 3):
        with pytest.raises(ConfigError, match="chat runs on one host") as caught:
            interactive.only_host("chat", JobOptions(on=tuple("abc")[:number]))
        assert caught.value.found == f"--on {','.join(host.name for host in HOSTS[:number])}"


@pytest.mark.parametrize(
    ("inventory", "entry", "remembered"), [(None, None, 1), (None, "x", 0), (Path("i"), None, 0), (Path("i"), "x", 0)]
)
def test_which_host_is_remembered(
    monkeypatch: pytest.MonkeyPatch, inventory: Path | None, entry: str | None, remembered: int
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(interactive, "remembered_hosts", lambda: "known")
    monkeypatch.setattr(interactive, "inventory_entry_of", lambda host, known: entry if known == "known" else host)
    monkeypatch.setattr(interactive, "remember_hosts", found.extend)
    interactive.remember(HOSTS[0], JobOptions(inventory=inventory))
    assert found == [HOSTS[0]] * remembered


@pytest.mark.parametrize(("here", "there"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_terminal_is_one_at_both_ends(monkeypatch: pytest.MonkeyPatch, here: bool, there: bool) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: here))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: there))
    assert interactive._has_terminal() is (here and there)


@pytest.mark.parametrize(
    ("code", "stopped", "end"),
    [(0, 0, 0), (1, 0, 1), (75, 0, 75), (254, 0, 254), (255, 0, None), (-1, 1, None), (-9, 1, None)],
)
def test_the_end_of_a_connection(monkeypatch: pytest.MonkeyPatch, code: int, stopped: int, end: int | None) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(interactive.subprocess, "Popen", lambda _: SimpleNamespace(wait=lambda: code))
    monkeypatch.setattr(interactive, "engine", lambda *given, **__: asked.append(given[1:]))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    ssh: Any = None
    if end is None:
        with pytest.raises(HostError, match="The connection to gpu-1 failed or was lost") as caught:
            interactive._call(ssh, HOSTS[0], "chat-1", ["ssh", "host", "words"])
        assert caught.value.next_command == "mixtral-run jobs gpu-1, which lists what may still run there"
    else:
        assert interactive._call(ssh, HOSTS[0], "chat-1", ["ssh"]) == end
    assert asked == [(HOSTS[0], "stop", "--time", "10", "chat-1")] * stopped
    monkeypatch.setattr(interactive.subprocess, "Popen", MagicMock(side_effect=FileNotFoundError))
    with pytest.raises(HostError, match="ssh is not installed here"):
        interactive._call(ssh, HOSTS[0], "chat-1", ["ssh", "host", "words"])


@pytest.mark.parametrize(
    ("code", "mark", "end"),
    [(75, 1, "busy"), (76, 1, 76), (75, 0, 75), (75, 2, 75), (74, 1, 74), (77, 1, 77), (0, 1, 0)],
)
def test_a_host_that_somebody_took_before(
    monkeypatch: pytest.MonkeyPatch, code: int, mark: int, end: int | str
) -> None:
    """Only a shell that still runs is named of the containers there."""
    rows = [row(verb="shell", state="exited", job="s1"), row(verb="convert", state="running", job="c1"),
            row(verb="shell", state="running", job="s2")]  # fmt: skip
    asked: list[Any] = []
    for name in ("send_files", "remember", "_container", "terminal_argv"):
        monkeypatch.setattr(interactive, name, lambda *_, **__: [])
    monkeypatch.setattr(interactive, "start_argv", lambda *_, **more: [] if more == {"attached": True} else None)
    monkeypatch.setattr(interactive, "refuse_taken", lambda *_: asked.append("taken"))
    monkeypatch.setattr(interactive, "facts_of", lambda *_: asked.append("facts"))
    monkeypatch.setattr(interactive, "_call", lambda *_: code)
    monkeypatch.setattr(interactive, "list_jobs", lambda *_: (rows, []))
    ssh: Any = SimpleNamespace(run=lambda *_: Answer(mark, "", ""), known_hosts="k")
    facts: Any = SimpleNamespace(folder="/f")
    spec: Any = SimpleNamespace(name="chat-1", options=None)
    if end == "busy":
        for jobs in ("s2", "another job"):
            with pytest.raises(BusyError) as caught:
                interactive._run_attached(ssh, HOSTS[0], facts, spec)
            assert caught.value.jobs == (("gpu-1", jobs),)
            rows.pop()
    else:
        assert interactive._run_attached(ssh, HOSTS[0], facts, spec) == end
        assert asked == (["taken", "taken", "facts"] if code == 76 and mark == 1 else ["taken"])


class Engine:
    """STAND-IN for the engine of a server's host: exit codes by the first word; the server answers after some looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **codes: int) -> None:
        self.calls: list[Any] = []
        self.codes, self.now, self.slept = codes, 0.0, list[float]()
        monkeypatch.setattr(serving, "engine", self.run)
        monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def run(self, _: Any, host: Host, *words: str, **more: Any) -> Answer:
        self.calls.append((host.name, words, more))
        return Answer(self.codes.get(words[0], 0), "\n".join(map(str, range(18))) + "\n", "first\nlast\n")

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


SERVER = RunningJob("serve-1", "serve", HOSTS[:1])


def test_a_server_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ssh: Any = None
    rows = [row(job="serve-1", state="running"), row(job="other")]
    monkeypatch.setattr(serving, "list_jobs", lambda *_: (rows, []))
    found = Engine(monkeypatch, exec=1)
    with pytest.raises(HostError, match="The server does not answer after 2 minutes") as caught:
        serving._wait(ssh, SERVER, 2)
    assert found.slept == [5.0] * 24 and caught.value.where == "serve-1 on gpu-1"
    health = "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5).read()"
    assert found.calls[0] == ("gpu-1", ("exec", "serve-1", "python3", "-c", health), {})
    # One that is not listed yet is waited for as well; one that has ended is not.
    rows[:] = [row(job="other")]
    with pytest.raises(HostError, match="after 1 minutes"):
        serving._wait(ssh, SERVER, 1)
    rows[:] = [row(job="serve-1", code=1)]
    capsys.readouterr()
    with pytest.raises(HostError, match="serve-1 failed on gpu-1"):
        serving._wait(ssh, SERVER, 1)
    assert found.calls[-1][1] == ("logs", "--tail", "60", "serve-1")
    said = capsys.readouterr().err.splitlines()
    assert said == ["waiting until the server answers; it loads the model (Ctrl-C leaves it running) …"] + [
        f"  | {text}" for text in [*map(str, range(5, 18)), "first", "last"]
    ]
    good = Engine(monkeypatch)
    serving._wait(ssh, SERVER, 1)
    assert good.slept == [] and serving.POLL_SECONDS == 5.0


@pytest.mark.parametrize(("inspect", "pull"), [(0, 1), (1, 0), (1, 1), (2, 2)])
def test_an_image_is_pulled_without_a_limit_of_time(monkeypatch: pytest.MonkeyPatch, inspect: int, pull: int) -> None:
    found = Engine(monkeypatch, image=inspect, pull=pull)
    ssh: Any = None
    if inspect and pull:
        with pytest.raises(HostError, match="gpu-1 cannot pull the engine's image") as caught:
            serving._pull(ssh, HOSTS[0], "i")
        assert (caught.value.where, caught.value.found) == ("i", "last")
    else:
        serving._pull(ssh, HOSTS[0], "i")
    pulls = [("gpu-1", ("pull", "--quiet", "i"), {"timeout_seconds": None})] if inspect else []
    assert found.calls == [("gpu-1", ("image", "inspect", "i"), {}), *pulls]


@pytest.mark.parametrize("bind", ["127.0.0.1", "localhost", "::1", "0.0.0.0", "::"])
@pytest.mark.parametrize("adapter", [None, Path("/a")])
def test_how_a_server_is_asked(capsys: pytest.CaptureFixture[str], bind: str, adapter: Path | None) -> None:
    config = ServeConfig(load=Path("x"), adapter=adapter, bind=bind, port=9000, adapter_name="mine", base_name="all")
    serving._say_how(config, SERVER)
    said = capsys.readouterr().err.splitlines()
    local = bind in ("127.0.0.1", "localhost", "::1")
    assert said[0] == f"✓ gpu-1 serves on port 9000{', of the host only' if local else f' of {bind}'}"
    assert [each for each in said if "ssh -N" in each] == (
        ["  from here: ssh -N -L 9000:127.0.0.1:9000 -- gpu-1"] if local else []
    )
    assert said[-2] == (
        "  curl http://127.0.0.1:9000/v1/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{"all" if adapter is None else "mine"}", "prompt": "Once", "max_tokens": 16}}\''
    )
    assert said[-1] == "  output: mixtral-run logs serve-1; to stop it: mixtral-run stop serve-1"
    spec: Any = SimpleNamespace(config={"load": "/m", "adapter": None})
    container = serving.serving_container(config, spec, MagicMock(num_gpus=1), None)
    assert container.more[-1] == f"[{bind}]:9000:8000".replace("[", "" if ":" not in bind else "[").replace(
        "]", "" if ":" not in bind else "]"
    )


def test_folders_are_looked_at_with_a_bound() -> None:
    asked: list[Any] = []
    ssh: Any = SimpleNamespace(check=lambda host, words: asked.append((host, words)) or "ok\na\nb")
    assert serving._look(ssh, HOSTS[0], "/f", "x.json") == ("ok", "a\nb")
    assert asked == [(HOSTS[0], ["sh", "-c", serving._LOOK, "look", "/f", "x.json", "1000000"])]


def test_which_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = ServeConfig(load=Path("x"))
    serving._check(hub, JobOptions())
    for given, options, problem in (
        ({"load": "s3://b/x"}, {}, "--load: expected a folder"), ({"adapter": "s3://b/x"}, {}, "--adapter: expected"),
        ({}, {"min_hosts": 0}, "--min-hosts: a server runs on one host; found 0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            serving._check(ServeConfig.from_mapping({"load": "x", **given}), JobOptions(**options))  # type: ignore[arg-type]
        assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(problem)
    error = HostError("x", found=None)
    assert serving._port_error(HOSTS[0], hub, error) is error
    for text in ("port is already allocated", "address already in use"):
        found = serving._port_error(HOSTS[0], hub, HostError("x", found=text))
        assert found.what == "Port 8000 of gpu-1 is taken." and found.where == "127.0.0.1:8000"
    assert "--on HOST, or --prove URL" in str(serving.refuse_here())


@pytest.mark.parametrize("detach", [False, True])
def test_a_server_in_the_background_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], detach: bool
) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(serving, "when_free", lambda *_: SERVER)
    monkeypatch.setattr(serving, "_wait", lambda *given: waited.append(given[1:]))
    config = ServeConfig(load=Path("x"), wait_minutes=3)
    assert serving.serve(config, JobOptions(on=("gpu-1",), detach=detach), MagicMock()) == SERVER
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "serve-1 runs on gpu-1; to stop it: mixtral-run stop serve-1"
    assert (said[1:] == ["output: mixtral-run logs -f serve-1"]) is detach
    assert waited == ([] if detach else [(SERVER, 3)])


def test_the_first_of_two_signals_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> int:
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return 0

    process = SimpleNamespace(wait=wait, terminate=lambda: None)
    monkeypatch.setattr(interactive.subprocess, "Popen", lambda _: process)
    monkeypatch.setattr(interactive, "_stop", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    ssh: Any = None
    assert interactive._call(ssh, HOSTS[0], "chat-1", ["ssh"]) == 129


def test_a_server_is_a_job_of_one_host_and_needs_no_image_of_the_kit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    facts = HostFacts(folder="/f", kernels="/k")
    monkeypatch.setattr(serving, "facts_of", lambda *given, **more: asked.append((given[0], more)) or [facts])
    monkeypatch.setattr(serving, "_check_model", lambda *_: None)
    ssh: Any = None
    config = ServeConfig(load=Path("x/y"), dry_run=True)
    assert serving._start(config, JobOptions(on=("gpu-1",)), ssh, HOSTS[:1]) is None
    words = capsys.readouterr().out.split()
    assert asked == [([HOSTS[0]], {"needs_image": False})]
    assert "org.mixtral-run.num_hosts=1" in words and "--network" not in words
